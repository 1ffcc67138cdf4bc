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

// As ops.paged_attention; caches are contiguous [blocks, block_size, kv_heads, dim]; window 0: none, softcap 0: none.
struct AttentionArgs {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const int64_t* table;
    const int64_t* query_start;
    const int64_t* context_len;
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

// k, v [n, row] at row strides into caches of rows of `row` elements at slots[n]; element_bytes each.
struct WriteArgs {
    const void* k;
    const void* v;
    void* k_cache;
    void* v_cache;
    const int64_t* slots;
    int64_t count, row, k_stride, v_stride, element_bytes;
};
}
