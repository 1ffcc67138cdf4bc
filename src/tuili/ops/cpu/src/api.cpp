// The C boundary: picks the instruction set, holds values to their ranges, cuts each op into pieces and gives them to
// the team. Shapes and dtypes were checked by the Python side, which is the only caller.
#include <cpuid.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace {

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

// AVX-VNNI, the 256-bit form of VNNI: leaf 7.1, eax bit 4 (gcc 12 has no name for it).
bool has_avxvnni() {
    unsigned a = 0, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

const Kernels* find(const char* name) {
    __builtin_cpu_init();
    if (has_avx512() && (!name || !strcmp(name, "avx512"))) return avx512_kernels();
    if (has_avxvnni() && (!name || !strcmp(name, "avxvnni"))) return avxvnni_kernels();
    if (has_avx2() && (!name || !strcmp(name, "avx2"))) return avx2_kernels();
    return nullptr;
}

const Kernels* kernels = find(nullptr);

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a cheap op are cut so that a piece is worth the claim (about 10 microseconds of work).
template <class Body> void row_pieces(int64_t rows, int64_t elements_per_row, Body body) {
    int64_t by = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_row));
    parallel(up(rows, by), [=](int64_t p) { body(p * by, std::min(by, rows - p * by)); });
}

// A product's outputs in pieces of at least four tiles (one block of registers) and up to 128 KB of weights; where that
// makes few pieces of many rows, the rows are cut as well.
template <class Body> void matmul_pieces(int64_t rows, int64_t tiles, int64_t tile_bytes, Body body) {
    if (rows == 0 || tiles == 0) return;
    int64_t team = pool_threads();
    int64_t wide = std::min<int64_t>(131072 / std::max<int64_t>(tile_bytes, 1), up(tiles, 4 * team)) / 4 * 4;
    wide = std::max<int64_t>(4, wide);
    int64_t columns = up(tiles, wide), high = rows;
    if (columns < 4 * team && rows >= CUT_ROWS) high = up(up(rows, up(4 * team, columns)), 24) * 24;
    int64_t bands = up(rows, high);
    parallel(columns * bands, [=](int64_t p) {
        int64_t tile = p / bands * wide, row = p % bands * high;
        body(row, std::min(high, rows - row), tile, std::min(wide, tiles - tile));
    });
}

// Requests' queries lie end to end, each one's context holds them and ends within its blocks, and those that are read
// are blocks of the cache.
const Fault* check(const AttentionArgs& a) {
    const char* name = "attention";
    int64_t begin = 0, room = a.columns * a.block_size;
    for (int64_t r = 0; r < a.requests; r++, begin = a.query_start[r]) {
        int64_t end = a.query_start[r + 1], queries = end - begin, context = a.context_len[r];
        if (r == 0 && a.query_start[0] != 0) return fault(name, "query_start", 0, (double)a.query_start[0], 0, 0);
        if (end < begin || end > a.rows) return fault(name, "query_start", r + 1, (double)end, (double)begin, (double)a.rows);
        if (queries == 0) continue;
        if (context < queries || context > room) return fault(name, "context_len", r, (double)context, (double)queries, (double)room);
        int64_t first = a.window ? std::max<int64_t>(0, context - queries - a.window + 1) / a.block_size : 0;
        const int64_t* blocks = a.block_table + r * a.block_table_stride;
        for (int64_t i = first; i * a.block_size < context; i++)
            if (blocks[i] < 0 || blocks[i] >= a.blocks)
                return fault(name, "block_table", r * a.columns + i, (double)blocks[i], 0, (double)(a.blocks - 1));
    }
    return begin == a.rows ? nullptr : fault(name, "query_start", a.requests, (double)begin, (double)a.rows, (double)a.rows);
}

// Blocks of a request's queries, for as many KV heads (side by side in memory) as are not more than a quarter of a
// thread's share of the work; what is more even for one head is split where partitions end.
void cut_attention(const AttentionArgs& a, std::vector<AttentionItem>& items) {
    int64_t block = std::max<int64_t>(1, BLOCK_ROWS * a.kv_heads / a.heads), total = 0;
    auto each = [&](auto body) {
        for (int64_t r = 0; r < a.requests; r++) {
            int64_t queries = a.query_start[r + 1] - a.query_start[r], before = a.context_len[r] - queries;
            for (int64_t first = 0; first < queries; first += block) {
                int64_t count = std::min(block, queries - first), end = before + first + count;
                int64_t begin = a.window ? std::max<int64_t>(0, before + first - a.window + 1) : 0;
                body(r, first, count, begin, end, count * (end - begin));
            }
        }
    };
    each([&](int64_t, int64_t, int64_t, int64_t, int64_t, int64_t work) { total += work; });
    int64_t share = std::max<int64_t>(1, total * a.kv_heads / (4 * pool_threads()));
    each([&](int64_t r, int64_t first, int64_t count, int64_t begin, int64_t end, int64_t work) {
        int64_t spans = a.kv_heads, part = begin / PARTITION, parts = up(end, PARTITION);
        while (spans > 1 && spans * work > share) spans = up(spans, 2);
        bool split = work > share && parts - part > 1;
        for (int64_t h = 0; h < a.kv_heads; h += spans)
            items.push_back({r, h, std::min(spans, a.kv_heads - h), first, count, part, parts, split, nullptr});
    });
}

}  // namespace

const Fault* fault(const char* kernel, const char* argument, int64_t at, double value, double low, double high) {
    static thread_local Fault last;
    last = {kernel, argument, at, value, low, high};
    return &last;
}

#pragma GCC visibility push(default)
extern "C" {

const char* tuili_abi() { return TUILI_ABI; }
const char* tuili_isa() { return kernels ? kernels->name : ""; }

// Chooses another instruction set that this machine has ("" for the best); 0 if it has not.
int tuili_use_isa(const char* name) {
    const Kernels* found = find(*name ? name : nullptr);
    if (found) kernels = found;
    return found != nullptr;
}

void tuili_set_threads(int threads) { pool_resize(threads); }
int tuili_threads() { return pool_threads(); }
void tuili_wake() { pool_wake(); }

// Reads `bytes` by the team: once in pieces, or `rounds` times, each thread its own share, which stays in its cache.
void tuili_probe_read(const void* at, int64_t bytes, int64_t rounds) {
    int64_t piece = rounds == 1 ? 2 << 20 : up(up(bytes, pool_threads()), 512) * 512;
    parallel(up(bytes, piece), [&](int64_t p) {
        for (int64_t r = 0; r < rounds; r++) {
            kernels->probe_read((const char*)at + p * piece, std::min(piece, bytes - p * piece));
        }
    });
}

// `rounds` of products in registers by every thread; how many operations (a multiplication and an addition are two).
int64_t tuili_probe_multiply(int64_t kind, int64_t rounds) {
    std::atomic<int64_t> total{0};
    parallel(16 * pool_threads(), [&](int64_t) { total += kernels->probe_multiply(kind, rounds / 16); });
    return total;
}

const Fault* tuili_linear(const LinearArgs* a) {
    int64_t bytes = up(a->inputs, 2) * 2 * TILE * (a->numbers == FLOAT32 ? 4 : 2);
    matmul_pieces(a->rows, up(a->outputs, TILE), bytes, [=](int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
        kernels->linear(*a, row, rows, tile, tiles);
    });
    return nullptr;
}

const Fault* tuili_quantized(const QuantizedArgs* args) {
    RoundedArgs a{*args, nullptr, nullptr, nullptr};
    int64_t inputs = up(a.inputs, a.group) * a.group, groups = a.numbers == INT8 ? 1 : inputs / a.group;
    char* room = (char*)scratch(4, a.rows * (inputs + 4 * groups + 4) + 128);
    a.factors = (float*)room;
    a.sums = (int32_t*)(a.factors + a.rows);
    a.values = (int8_t*)(a.sums + a.rows * groups);
    row_pieces(a.rows, a.inputs, [&](int64_t row, int64_t rows) { kernels->quantize(a, row, rows); });
    matmul_pieces(a.rows, up(a.outputs, TILE), inputs * TILE * a.numbers / 8, [&](int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
        kernels->quantized(a, row, rows, tile, tiles);
    });
    return nullptr;
}

const Fault* tuili_widened(const QuantizedArgs* a) {
    int64_t bytes = up(a->inputs, a->group) * a->group * TILE * a->numbers / 8;
    matmul_pieces(a->rows, up(a->outputs, TILE), bytes, [&](int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
        kernels->widened(*a, row, rows, tile, tiles);
    });
    return nullptr;
}

const Fault* tuili_attention(const AttentionArgs* a) {
    if (const Fault* found = check(*a)) return found;
    static thread_local std::vector<AttentionItem> items, pieces;
    items.clear(), pieces.clear();
    cut_attention(*a, items);
    int64_t floats = 0, group = a->heads / a->kv_heads;
    auto size = [&](const AttentionItem& i) { return i.spans * state_floats(i.queries * group, a->dim); };
    for (auto& i : items)
        if (i.split) floats += (i.parts - i.part) * size(i);
    float* state = floats ? (float*)scratch(3, floats * 4) : nullptr;
    for (auto& i : items) {
        if (!i.split) {
            pieces.push_back(i);
            continue;
        }
        i.state = state;
        for (int64_t p = i.part; p < i.parts; p++, state += size(i))
            pieces.push_back({i.request, i.kv_head, i.spans, i.first, i.queries, p, p + 1, true, state});
    }
    AttentionItem* piece = pieces.data();
    parallel(pieces.size(), [&](int64_t p) { kernels->attention(*a, piece[p]); });
    for (auto& i : items)
        if (i.split) kernels->merge(*a, i);
    return nullptr;
}

const Fault* tuili_rms_norm(const NormArgs* a) {
    row_pieces(a->rows * a->heads, a->dim, [=](int64_t row, int64_t rows) { kernels->rms_norm(*a, row, rows); });
    return nullptr;
}

const Fault* tuili_rotate(const RotateArgs* a) {
    row_pieces(a->rows, a->heads * a->dim, [=](int64_t row, int64_t rows) { kernels->rotate(*a, row, rows); });
    return nullptr;
}

const Fault* tuili_gated(const GatedArgs* a) {
    row_pieces(a->rows, a->dim * 2, [=](int64_t row, int64_t rows) { kernels->gated(*a, row, rows); });
    return nullptr;
}

const Fault* tuili_add(const AddArgs* a) {
    row_pieces(a->count, 1, [=](int64_t first, int64_t count) { kernels->add(*a, first, count); });
    return nullptr;
}

const Fault* tuili_scale(const ScaleArgs* a) {
    row_pieces(a->count, 1, [=](int64_t first, int64_t count) { kernels->scale(*a, first, count); });
    return nullptr;
}

const Fault* tuili_softcap(const SoftcapArgs* a) {
    row_pieces(a->count, 1, [=](int64_t first, int64_t count) { kernels->softcap(*a, first, count); });
    return nullptr;
}

const Fault* tuili_embedding(const EmbeddingArgs* a) {
    if (const Fault* found = check(*a)) return found;
    int64_t bytes = a->dim * (a->dtype == 0 ? 4 : 2);
    for (int64_t i = 0; i < a->count; i++)
        memcpy((char*)a->out + i * bytes, (const char*)a->weight + a->ids[i] * bytes, bytes);
    return nullptr;
}

const Fault* tuili_store(const StoreArgs* a) {
    parallel(up(a->rows, TILE), [&](int64_t tile) { kernels->store(*a, tile); });
    return nullptr;
}

const Fault* tuili_lookup(const LookupArgs* a) {
    if (const Fault* found = check(*a)) return found;
    row_pieces(a->count, a->inputs * 8, [&](int64_t first, int64_t count) { kernels->lookup(*a, first, count); });
    return nullptr;
}

const Fault* tuili_argmax(const ArgmaxArgs* a) {
    row_pieces(a->rows, a->vocab, [&](int64_t row, int64_t rows) { kernels->argmax(*a, row, rows); });
    return nullptr;
}

const Fault* tuili_draw(const DrawArgs* a) {
    if (const Fault* found = check(*a)) return found;
    row_pieces(a->rows, a->vocab * 4, [&](int64_t row, int64_t rows) { kernels->draw(*a, row, rows); });
    return nullptr;
}

const Fault* tuili_logprobs(const LogprobsArgs* a) {
    if (const Fault* found = check(*a)) return found;
    row_pieces(a->rows, a->vocab * 4, [&](int64_t row, int64_t rows) { kernels->logprobs(*a, row, rows); });
    return nullptr;
}

const Fault* tuili_write_kv(const WriteArgs* a) {
    if (const Fault* found = check(*a)) return found;
    row_pieces(a->kv_heads, a->count * a->dim * 8, [&](int64_t head, int64_t heads) { kernels->write_kv(*a, head, heads); });
    return nullptr;
}
}
#pragma GCC visibility pop
