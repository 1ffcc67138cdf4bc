// Keys and values into the paged cache, in the layouts of ops/kvcache.py, as they are or as int8 with a step per head.
#include "kernels.h"
#include "simd.h"

namespace {

// One token of one head, given as `dim` plain values of type E, at `slot`; W is a word of as many of them as lie together.
template <class W, class E> struct Slot {
    static constexpr int64_t PAIR = sizeof(W) / sizeof(E);
    const WriteArgs& a;
    int64_t block, at;
    Slot(const WriteArgs& args, int64_t token, int64_t head) : a(args) {
        block = a.slots[token] / a.block_size * a.kv_heads + head, at = a.slots[token] % a.block_size;
    }
    void key(const E* x) const {
        int64_t words = (a.dim + PAIR - 1) / PAIR;
        W* out = (W*)a.k_cache + block * words * a.block_size + at;
        for (int64_t w = 0; w < a.dim / PAIR; w++) memcpy(out + w * a.block_size, x + w * PAIR, sizeof(W));
        if (a.dim % PAIR) out[a.dim / PAIR * a.block_size] = (W)x[a.dim - 1];
    }
    void value(const E* x) const {
        W* out = (W*)a.v_cache + (block * ((a.block_size + PAIR - 1) / PAIR) + at / PAIR) * a.dim;
        const int shift = (int)(at % PAIR * sizeof(E) * 8);
        const W others = (W) ~((W)(E)~(E)0 << shift);
        for (int64_t d = 0; d < a.dim; d++) out[d] = (W)((out[d] & others) | ((W)x[d] << shift));
    }
    int64_t scale() const { return block * a.block_size + at; }
};

template <class W, class E> void write(const WriteArgs& a, int64_t head) {
    for (int64_t i = 0; i < a.count; i++) {
        Slot<W, E> slot(a, i, head);
        slot.key((const E*)a.k + i * a.k_stride + head * a.dim);
        slot.value((const E*)a.v + i * a.v_stride + head * a.dim);
    }
}

// Floats into a cache of bfloat16.
void write_narrowed(const WriteArgs& a, int64_t head) {
    uint16_t* halves = (uint16_t*)scratch(1, a.dim * sizeof(uint16_t));
    auto narrowed = [&](const void* from, int64_t stride, int64_t token) {
        const float* x = (const float*)from + token * stride + head * a.dim;
        for (int64_t d = 0; d < a.dim; d += LANES) store(halves + d, load(x + d, a.dim - d), a.dim - d);
        return halves;
    };
    for (int64_t i = 0; i < a.count; i++) {
        Slot<uint32_t, uint16_t> slot(a, i, head);
        slot.key(narrowed(a.k, a.k_stride, i));
        slot.value(narrowed(a.v, a.v_stride, i));
    }
}

// 16 numbers within +-127, to nearest, ties to even.
void store_int8(int8_t* p, F x) {
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
#else
    __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    both = _mm256_permute4x64_epi64(both, 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#endif
}

// x in steps of its largest value's 127th: codes to nearest; returns the step.
template <class T> float round_to_int8(const T* x, int64_t dim, int8_t* codes) {
    F highest = zero(), poison = zero();
    for (int64_t d = 0; d < dim; d += LANES) {
        F v = load(x + d, dim - d);
        highest = max(highest, max(v, zero() - v)), poison = fma(v, zero(), poison);
    }
    float step = top(highest) / 127.0f;
    F by = all(step > 1.17549435e-38f ? step : 1.17549435e-38f);
    for (int64_t d = 0; d < dim; d += LANES) {
        store_int8(codes + d, max(all(-127.0f), min(all(127.0f), load(x + d, dim - d) / by)));
    }
    return step + sum(poison);  // not-a-number stays
}

template <class T> void write_int8(const WriteArgs& a, int64_t head) {
    int8_t* codes = (int8_t*)scratch(1, a.dim + LANES);
    for (int64_t i = 0; i < a.count; i++) {
        Slot<uint16_t, uint8_t> slot(a, i, head);
        a.k_scales[slot.scale()] = round_to_int8((const T*)a.k + i * a.k_stride + head * a.dim, a.dim, codes);
        slot.key((const uint8_t*)codes);
        a.v_scales[slot.scale()] = round_to_int8((const T*)a.v + i * a.v_stride + head * a.dim, a.dim, codes);
        slot.value((const uint8_t*)codes);
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(write_kv, TUILI_ISA)(const WriteArgs& a, int64_t head, int64_t heads) {
    for (int64_t h = head; h < head + heads; h++)
        if (a.k_scales)
            a.dtype == 0 ? write_int8<float>(a, h) : write_int8<uint16_t>(a, h);
        else if (a.dtype == BFLOAT16)
            write<uint32_t, uint16_t>(a, h);
        else
            a.numbers == FLOAT32 ? write<uint32_t, uint32_t>(a, h) : write_narrowed(a, h);
}
