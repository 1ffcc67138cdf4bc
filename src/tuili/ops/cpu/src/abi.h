// Written by `make abi` from contract.py: change that. What crosses the C boundary: one plain struct
// of arguments per op, passed by pointer, so that a call can be recorded (copy the struct) and replayed. Python checks
// shapes and dtypes before it calls; what only the values tell, a kernel checks itself. Sizes and strides in elements;
// dtype 0 is float32, 1 is bfloat16; numbers: what a weight or a cache is made of, as contract.py says. A size that an
// op may leave out is then 0.
#pragma once
#include <stdint.h>

extern "C" {

// A value that is outside of [low, high]: element `at` of an argument. Null stands for "there is none".
struct Fault {
    const char *kernel, *argument;
    int64_t at;
    double value, low, high;
};

// One call of a recorded program: a function of this library and its arguments.
struct Call {
    const Fault* (*function)(const void* args);
    const void* args;
};

// add.
struct AddArgs {
    const void* x;  // [...]
    const void* y;  // [...]
    void* out;  // [...]
    int64_t count, dtype;
};

// argmax.
struct ArgmaxArgs {
    const void* logits;  // [rows vocab]
    int64_t* ids;  // [rows]
    uint8_t* finite;  // [rows]
    int64_t dtype, logits_stride, rows, vocab;
};

// paged_attention, paged_attention_int8.
struct AttentionArgs {
    const void* q;  // [rows heads dim]
    const void* k_cache;  // [blocks kv_heads dim/side block_size side]; [blocks kv_heads dim/2 block_size 2]
    const void* v_cache;  // [blocks kv_heads block_size/side dim side]; [blocks kv_heads block_size/2 dim 2]
    const float* k_scales;  // [blocks kv_heads block_size]
    const float* v_scales;  // [blocks kv_heads block_size]
    const int64_t* block_table;  // [requests columns]
    const int64_t* query_start;  // [requests+1]
    const int64_t* context_len;  // [requests]
    void* out;  // [rows heads dim]
    int64_t block_size, block_table_stride, blocks, columns, dim, dtype, heads, kv_heads, numbers, q_stride, requests, rows, window;
    float scale, softcap;
};

// draw.
struct DrawArgs {
    const void* logits;  // [rows vocab]
    const float* temperature;  // [rows]
    const float* min_p;  // [rows]
    const int64_t* top_k;  // [rows]
    const float* top_p;  // [rows]
    const double* uniform;  // [rows]
    int64_t* ids;  // [rows]
    uint8_t* finite;  // [rows]
    int64_t dtype, logits_stride, rows, vocab;
};

// embedding.
struct EmbeddingArgs {
    const void* weight;  // [vocab dim]
    const int64_t* ids;  // [count]
    void* out;  // [count dim]
    int64_t count, dim, dtype, vocab;
};

// gated.
struct GatedArgs {
    const void* gate_up;  // [rows 2*dim]
    void* out;  // [rows dim]
    int64_t activation, dim, dtype, rows;
};

// packed_linear.
struct LinearArgs {
    const void* x;  // [rows inputs]
    const void* tiles;  // [outputs/16 inputs/even*even/side 16 side]
    const void* bias;  // [outputs] or none
    void* out;  // [rows outputs]
    int64_t dtype, inputs, numbers, outputs, rows, x_stride;
};

// locate.
struct LocateArgs {
    const int64_t* positions;  // [requests each]
    const int64_t* rows;  // [requests]
    const int64_t* blocks;  // [lines stride]
    int64_t* slots;  // [requests each]
    int64_t* context;  // [requests]
    int64_t* table;  // [requests stride]
    int64_t block_size, each, lines, requests, stride;
};

// logprobs.
struct LogprobsArgs {
    const void* logits;  // [rows vocab]
    const int64_t* tokens;  // [rows]
    float* chosen;  // [rows]
    int64_t* rank;  // [rows]
    float* top_values;  // [rows count]
    int64_t* top_ids;  // [rows count]
    int64_t count, dtype, logits_stride, rows, vocab;
};

// packed_embedding, int8_embedding, int4_embedding.
struct LookupArgs {
    const int64_t* ids;  // [count]
    const void* tiles;  // [outputs/16 inputs/even*even/side 16 side]; [outputs/16 inputs/4 16 4]; [outputs/16 inputs/group*group/8 16 4]
    const void* scales;  // [outputs]; [outputs/16 inputs/group 16]
    const void* zeros;  // [outputs/16 inputs/group 16] or none
    void* out;  // [count inputs]
    int64_t count, dtype, group, inputs, numbers, outputs;
};

// rms_norm.
struct NormArgs {
    const void* x;  // [rows heads? dim]
    const void* weight;  // [dim]
    void* out;  // [rows heads? dim]
    int64_t dim, dtype, heads, rows, x_stride;
    float eps, offset;
};

// int8_linear, int4_linear, int8_weight_linear, int4_weight_linear.
struct QuantizedArgs {
    const void* x;  // [rows inputs]
    const void* tiles;  // [outputs/16 inputs/4 16 4]; [outputs/16 inputs/group*group/8 16 4]
    const void* scales;  // [outputs]; [outputs/16 inputs/group 16]
    const void* zeros;  // [outputs/16 inputs/group 16] or none
    const void* bias;  // [outputs] or none
    void* out;  // [rows outputs]
    int64_t dtype, group, inputs, numbers, outputs, rows, x_stride;
};

// rotate.
struct RotateArgs {
    const void* x;  // [rows heads dim]
    const float* cos;  // [rows half]
    const float* sin;  // [rows half]
    void* out;  // [rows heads dim]
    int64_t dim, dtype, half, heads, rows, x_stride;
};

// scale.
struct ScaleArgs {
    const void* x;  // [...]
    void* out;  // [...]
    int64_t count, dtype;
    float factor;
};

// softcap.
struct SoftcapArgs {
    const void* x;  // [...]
    void* out;  // [...]
    int64_t count, dtype;
    float cap;
};

// store_floats, store_int8, store_int4.
struct StoreArgs {
    const void* matrix;  // [rows inputs]
    void* tiles;  // [rows/16 inputs/even*even/side 16 side]; [rows/16 inputs/4 16 4]; [rows/16 inputs/group*group/8 16 4]
    void* scales;  // [rows]; [rows/16 inputs/group 16]
    void* zeros;  // [rows/16 inputs/group 16] or none
    int64_t dtype, group, inputs, matrix_stride, numbers, rows;
};

// write_kv, write_kv_int8.
struct WriteArgs {
    const void* k;  // [count kv_heads dim]
    const void* v;  // [count kv_heads dim]
    void* k_cache;  // [blocks kv_heads dim/side block_size side]; [blocks kv_heads dim/2 block_size 2]
    void* v_cache;  // [blocks kv_heads block_size/side dim side]; [blocks kv_heads block_size/2 dim 2]
    float* k_scales;  // [blocks kv_heads block_size]
    float* v_scales;  // [blocks kv_heads block_size]
    const int64_t* slots;  // [count]
    int64_t block_size, blocks, count, dim, dtype, k_stride, kv_heads, numbers, v_stride;
};

const Fault* tuili_add(const AddArgs*);
const Fault* tuili_argmax(const ArgmaxArgs*);
const Fault* tuili_attention(const AttentionArgs*);
const Fault* tuili_draw(const DrawArgs*);
const Fault* tuili_embedding(const EmbeddingArgs*);
const Fault* tuili_gated(const GatedArgs*);
const Fault* tuili_linear(const LinearArgs*);
const Fault* tuili_locate(const LocateArgs*);
const Fault* tuili_logprobs(const LogprobsArgs*);
const Fault* tuili_lookup(const LookupArgs*);
const Fault* tuili_quantized(const QuantizedArgs*);
const Fault* tuili_rms_norm(const NormArgs*);
const Fault* tuili_rotate(const RotateArgs*);
const Fault* tuili_scale(const ScaleArgs*);
const Fault* tuili_softcap(const SoftcapArgs*);
const Fault* tuili_store(const StoreArgs*);
const Fault* tuili_widened(const QuantizedArgs*);
const Fault* tuili_write_kv(const WriteArgs*);
}

// This thread's fault, until its next.
const Fault* fault(const char* kernel, const char* argument, int64_t at, double value, double low, double high);

// The first of `n` values that is not in [low, high].
template <class T>
inline const Fault* outside(const char* kernel, const char* argument, const T* values, int64_t n, T low, T high) {
    for (int64_t i = 0; i < n; i++) {
        T x = values[i];
        if (!(x >= low && x <= high)) return fault(kernel, argument, i, (double)x, (double)low, (double)high);
    }
    return nullptr;
}

inline const Fault* check(const DrawArgs& a) {
    const Fault* found = nullptr;
    if (!found) found = outside<float>("draw", "temperature", a.temperature, a.rows, 0, 3e38);
    if (!found) found = outside<float>("draw", "min_p", a.min_p, a.rows, 0, 1);
    if (!found) found = outside<float>("draw", "top_p", a.top_p, a.rows, 0, 1);
    if (!found) found = outside<double>("draw", "uniform", a.uniform, a.rows, 0, 1);
    return found;
}

inline const Fault* check(const EmbeddingArgs& a) {
    const Fault* found = nullptr;
    if (!found) found = outside<int64_t>("embedding", "ids", a.ids, a.count, 0, a.vocab - 1);
    return found;
}

inline const Fault* check(const LocateArgs& a) {
    const Fault* found = nullptr;
    if (!found) found = outside<int64_t>("locate", "positions", a.positions, a.requests * a.each, 0, a.stride * a.block_size - 1);
    if (!found) found = outside<int64_t>("locate", "rows", a.rows, a.requests, 0, a.lines - 1);
    return found;
}

inline const Fault* check(const LogprobsArgs& a) {
    const Fault* found = nullptr;
    if (!found) found = outside<int64_t>("logprobs", "tokens", a.tokens, a.rows, 0, a.vocab - 1);
    return found;
}

inline const Fault* check(const LookupArgs& a) {
    const Fault* found = nullptr;
    if (!found) found = outside<int64_t>("lookup", "ids", a.ids, a.count, 0, a.outputs - 1);
    return found;
}

inline const Fault* check(const WriteArgs& a) {
    const Fault* found = nullptr;
    if (!found) found = outside<int64_t>("write_kv", "slots", a.slots, a.count, 0, a.blocks * a.block_size - 1);
    return found;
}

#define TUILI_ABI "3975348b32323fda"
