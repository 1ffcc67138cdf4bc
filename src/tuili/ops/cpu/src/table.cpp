// The table of this instruction set's kernels.
#include "kernels.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

void JOIN(linear, TUILI_ISA)(const LinearArgs&, int64_t, int64_t, int64_t, int64_t);
void JOIN(quantize, TUILI_ISA)(const RoundedArgs&, int64_t, int64_t);
void JOIN(quantized, TUILI_ISA)(const RoundedArgs&, int64_t, int64_t, int64_t, int64_t);
void JOIN(widened, TUILI_ISA)(const QuantizedArgs&, int64_t, int64_t, int64_t, int64_t);
void JOIN(attention, TUILI_ISA)(const AttentionArgs&, const AttentionItem&);
void JOIN(merge, TUILI_ISA)(const AttentionArgs&, const AttentionItem&);
void JOIN(rms_norm, TUILI_ISA)(const NormArgs&, int64_t, int64_t);
void JOIN(rotate, TUILI_ISA)(const RotateArgs&, int64_t, int64_t);
void JOIN(gated, TUILI_ISA)(const GatedArgs&, int64_t, int64_t);
void JOIN(probe_read, TUILI_ISA)(const char*, int64_t);
int64_t JOIN(probe_multiply, TUILI_ISA)(int64_t, int64_t);
void JOIN(add, TUILI_ISA)(const AddArgs&, int64_t, int64_t);
void JOIN(scale, TUILI_ISA)(const ScaleArgs&, int64_t, int64_t);
void JOIN(softcap, TUILI_ISA)(const SoftcapArgs&, int64_t, int64_t);
void JOIN(store, TUILI_ISA)(const StoreArgs&, int64_t);
void JOIN(lookup, TUILI_ISA)(const LookupArgs&, int64_t, int64_t);
void JOIN(argmax, TUILI_ISA)(const ArgmaxArgs&, int64_t, int64_t);
void JOIN(draw, TUILI_ISA)(const DrawArgs&, int64_t, int64_t);
void JOIN(logprobs, TUILI_ISA)(const LogprobsArgs&, int64_t, int64_t);
void JOIN(write_kv, TUILI_ISA)(const WriteArgs&, int64_t, int64_t);

const Kernels* JOIN(TUILI_ISA, kernels)() {
    static constexpr Kernels table = {
        TEXT(TUILI_ISA),
        JOIN(linear, TUILI_ISA),   JOIN(quantize, TUILI_ISA),  JOIN(quantized, TUILI_ISA),
        JOIN(widened, TUILI_ISA),
        JOIN(attention, TUILI_ISA), JOIN(merge, TUILI_ISA),
        JOIN(rms_norm, TUILI_ISA), JOIN(rotate, TUILI_ISA),    JOIN(gated, TUILI_ISA),
        JOIN(probe_read, TUILI_ISA), JOIN(probe_multiply, TUILI_ISA),
        JOIN(add, TUILI_ISA),      JOIN(scale, TUILI_ISA),     JOIN(softcap, TUILI_ISA),
        JOIN(store, TUILI_ISA),    JOIN(lookup, TUILI_ISA),
        JOIN(argmax, TUILI_ISA),   JOIN(draw, TUILI_ISA),      JOIN(logprobs, TUILI_ISA),
        JOIN(write_kv, TUILI_ISA),
    };
    return &table;
}
