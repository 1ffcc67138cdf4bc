// The kernels of one instruction set, as a table that cpuid chooses at load. Each works on a share of its op; every
// (row, output) is made by the same instructions whatever the share (law 5).
#pragma once
#include "abi.h"

// What a weight is made of, as contract.py numbers it.
enum Numbers : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT4 = 4, INT8 = 8 };

// One piece of attention: `queries` of request `request` from its `first` on, KV heads [kv_head, kv_head + spans),
// partitions [part, parts).
struct AttentionItem {
    int64_t request, kv_head, spans, first, queries, part, parts;
    bool split;    // by partitions: a piece each
    float* state;  // where it leaves its partitions' partial sums; null: it writes the output itself
};

// With the rounded rows, their factors and their sums by group.
struct RoundedArgs : QuantizedArgs {
    int8_t* values;
    float* factors;
    int32_t* sums;
};

struct Kernels {
    const char* name;
    void (*linear)(const LinearArgs&, int64_t row, int64_t rows, int64_t tile, int64_t tiles);
    void (*quantize)(const RoundedArgs&, int64_t row, int64_t rows);
    void (*quantized)(const RoundedArgs&, int64_t row, int64_t rows, int64_t tile, int64_t tiles);
    void (*widened)(const QuantizedArgs&, int64_t row, int64_t rows, int64_t tile, int64_t tiles);
    void (*attention)(const AttentionArgs&, const AttentionItem&);
    void (*merge)(const AttentionArgs&, const AttentionItem&);
    void (*rms_norm)(const NormArgs&, int64_t row, int64_t rows);
    void (*rotate)(const RotateArgs&, int64_t row, int64_t rows);
    void (*gated)(const GatedArgs&, int64_t row, int64_t rows);
    void (*probe_read)(const char* at, int64_t bytes);
    int64_t (*probe_multiply)(int64_t kind, int64_t rounds);  // kinds: 0 float32, 1 bfloat16, 2 int8; returns operations
    void (*add)(const AddArgs&, int64_t first, int64_t count);
    void (*scale)(const ScaleArgs&, int64_t first, int64_t count);
    void (*softcap)(const SoftcapArgs&, int64_t first, int64_t count);
    void (*store)(const StoreArgs&, int64_t tile);
    void (*lookup)(const LookupArgs&, int64_t first, int64_t count);
    void (*argmax)(const ArgmaxArgs&, int64_t row, int64_t rows);
    void (*draw)(const DrawArgs&, int64_t row, int64_t rows);
    void (*logprobs)(const LogprobsArgs&, int64_t row, int64_t rows);
    void (*write_kv)(const WriteArgs&, int64_t head, int64_t heads);
};

const Kernels* avx512_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx2_kernels();

constexpr int64_t TILE = 16;          // outputs per weight tile
constexpr int64_t CUT_ROWS = 64;      // the rows of a product may be cut into pieces from so many on
constexpr int64_t KEY_TILE = 64;      // keys attended at once
constexpr int64_t PARTITION = 512;    // keys summed before partial results are merged, in order
constexpr int64_t BLOCK_ROWS = 48;    // query heads that share a pass over the keys

// Floats of one partition's partial result: per row its sums, total (16 lanes) and maximum.
inline int64_t state_floats(int64_t rows, int64_t dim) { return (rows * ((dim + 15) / 16 * 16 + 17) + 15) / 16 * 16; }

// call(1) .. call(6) by the number of rows: a kernel has one body per height of its block.
#define EACH_HEIGHT(rows, call)          \
    switch (rows) {                      \
        case 1: call(1); break;          \
        case 2: call(2); break;          \
        case 3: call(3); break;          \
        case 4: call(4); break;          \
        case 5: call(5); break;          \
        default: call(6); break;         \
    }

// This thread's scratch memory, at least `bytes`, 64-byte aligned, valid until the next call with the same slot.
void* scratch(int slot, int64_t bytes);
