// What crosses the C boundary: one plain struct of arguments per op, passed by pointer, so that a call can be recorded
// (copy the struct) and replayed. Sizes in elements unless a name says bytes; dtype 0 is float32, 1 is bfloat16.
#pragma once
#include <stdint.h>

extern "C" {

// out[rows, outputs] = x[rows, inputs] times the packed weight (see pack.h's layout in packed.py), plus bias or none.
struct LinearArgs {
    const void* x;
    const void* weight;
    const void* bias;
    void* out;
    int64_t rows, inputs, outputs, x_stride, dtype;
};

// As LinearArgs with integer weights of 8 or 4 bits (layouts in integer.py); activations rounded to int8 per row
// (tuili_quantized) or as they are (tuili_weight_only). group is 4 for 8 bits.
// scales: float32 [outputs] (8 bits), float16 [tiles][groups][16] (4 bits); zeros: uint8 like scales, or none (8).
// The last three are the library's own: the rounded rows, their factors, their sums by group.
struct QuantizedArgs {
    const void* x;
    const void* weight;
    const void* scales;
    const void* zeros;
    const void* bias;
    void* out;
    int64_t rows, inputs, outputs, x_stride, dtype, bits, group;
    int8_t* values;
    float* factors;
    int32_t* sums;
};

// Rows of a packed weight, unpacked: out[count, inputs].
struct GatherArgs {
    const void* weight;
    const int64_t* ids;
    void* out;
    int64_t count, inputs, dtype;
};

// As ops.paged_attention; contiguous caches in the layouts of ops/kvcache.py, int8 where there are scales; window 0: none,
// softcap 0: none.
struct AttentionArgs {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const int64_t* table;
    const int64_t* query_start;
    const int64_t* context_len;
    const float* k_scales;
    const float* v_scales;
    int64_t requests, table_stride, block_size, heads, kv_heads, dim, dtype, q_stride, window;
    float scale, softcap;
};

// x[n, heads, dim], row n at n * x_stride; weight[dim]; out contiguous.
struct NormArgs {
    const void* x;
    const void* weight;
    void* out;
    int64_t rows, heads, dim, x_stride, dtype;
    float eps, offset;
};

// x[n, heads, dim], row n at n * x_stride; cos, sin [n, half] float32; out contiguous.
struct RotateArgs {
    const void* x;
    const float* cos;
    const float* sin;
    void* out;
    int64_t rows, heads, dim, half, x_stride, dtype;
};

// out[rows, dim] = activation(x[rows, :dim]) * x[rows, dim:]; activation 0 silu, 1 gelu_tanh.
struct GatedArgs {
    const void* x;
    void* out;
    int64_t rows, dim, activation, dtype;
};

// out[rows, dim] = a + b.
struct AddArgs {
    const void* a;
    const void* b;
    void* out;
    int64_t rows, dim, dtype;
};

// out[rows, dim] = x * factor.
struct ScaleArgs {
    const void* x;
    void* out;
    int64_t rows, dim, dtype;
    float factor;
};

// out[rows, dim] = cap * tanh(x / cap).
struct SoftcapArgs {
    const void* x;
    void* out;
    int64_t rows, dim, dtype;
    float cap;
};

// out[i] = row ids[i] of a plain matrix whose rows take `bytes`.
struct EmbeddingArgs {
    const void* weight;
    const int64_t* ids;
    void* out;
    int64_t count, bytes;
};

// k, v [count, heads, dim] at row strides into the caches (see AttentionArgs) at slots[count].
struct WriteArgs {
    const void* k;
    const void* v;
    void* k_cache;
    void* v_cache;
    const int64_t* slots;
    float* k_scales;
    float* v_scales;
    int64_t count, heads, dim, block_size, k_stride, v_stride, dtype;
};

// What a decode step of `count` rows reads, from what the host knows of each: its position and its row of `blocks`
// [.., stride]. slots: where its K and V go; context: the positions that it has then; table [count, stride]: its blocks,
// as many as it uses.
struct LocateArgs {
    const int64_t* positions;
    const int64_t* rows;
    const int64_t* blocks;
    int64_t* slots;
    int64_t* context;
    int64_t* table;
    int64_t count, stride, block_size;
};

// One call of a recorded program: a function of this library and its arguments.
struct Call {
    void (*function)(const void* args);
    const void* args;
};

// matrix[rows, inputs] (row n at n * stride) into tiles: bits 0 as it is, 8 or 4 rounded, with scales and (or none)
// zeros as QuantizedArgs has them.
struct StoreArgs {
    const void* matrix;
    void* tiles;
    void* scales;
    void* zeros;
    int64_t rows, inputs, stride, dtype, bits, group;
};

// Rows of a weight that StoreArgs stored rounded, as floats of dtype: out[count, inputs].
struct LookupArgs {
    const void* tiles;
    const void* scales;
    const void* zeros;
    const int64_t* ids;
    void* out;
    int64_t count, inputs, dtype, bits, group;
};

// The best id of each row of logits[rows, vocab], row r at r * stride, and whether its value is finite.
struct ArgmaxArgs {
    const void* logits;
    int64_t* ids;
    uint8_t* finite;
    int64_t rows, vocab, stride, dtype;
};

// As ops.draw: one value per row of temperature (0: the best id), min_p (0: off), top_k (0: off), top_p, uniform.
struct DrawArgs {
    const void* logits;
    const float* temperature;
    const float* min_p;
    const int64_t* top_k;
    const float* top_p;
    const double* uniform;
    int64_t* ids;
    uint8_t* finite;
    int64_t rows, vocab, stride, dtype;
};

// As ops.logprobs: chosen, rank [rows] of tokens[rows]; top_ids, top_values [rows, count].
struct LogprobsArgs {
    const void* logits;
    const int64_t* tokens;
    float* chosen;
    int64_t* rank;
    float* top_values;
    int64_t* top_ids;
    int64_t rows, vocab, stride, dtype, count;
};
}
