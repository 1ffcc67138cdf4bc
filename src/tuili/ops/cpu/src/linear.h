// The matmul: a few rows times a few tiles of packed weights, all sums in registers, inputs in order. A (row, output)
// is the same chain of multiply-adds in every shape of the block, so one row or two thousand give the same bits.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

// Float weights: a tile is [inputs][16]. Bfloat16: [inputs / 2][16][2], pairs of inputs side by side.
struct Float {
    using Storage = float;
    static int64_t steps(int64_t inputs) { return inputs; }
    static constexpr int64_t X = 4;  // bytes of x per step
};
struct Half {
    using Storage = uint16_t;
    static int64_t steps(int64_t inputs) { return (inputs + 1) / 2; }
    static constexpr int64_t X = PAIRS ? 4 : 8;  // without pair instructions x is widened to float first
};
#ifdef __AVX512F__
using Pairs = Half;  // what bfloat16 keys are scored with
#else
using Pairs = Float;
#endif
constexpr int64_t STEP = 64;  // bytes of a tile per step, both kinds

template <int M, int N> inline void step(Float, F (&sum)[M][N], const char* x, int64_t stride, const char* w, int64_t tile) {
    F b[N];
    EACH(n, N) b[n] = load((const float*)(w + n * tile));
    EACH(m, M) {
        F a = all(*(const float*)(x + m * stride));
        EACH(n, N) sum[m][n] = fma(a, b[n], sum[m][n]);
    }
}

#ifdef __AVX512F__
template <int M, int N> inline void step(Half, F (&sum)[M][N], const char* x, int64_t stride, const char* w, int64_t tile) {
    __m512bh b[N];
    EACH(n, N) b[n] = (__m512bh)_mm512_loadu_si512(w + n * tile);
    EACH(m, M) {
        int pair;
        memcpy(&pair, x + m * stride, 4);
        __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        EACH(n, N) sum[m][n].v = _mm512_dpbf16_ps(sum[m][n].v, a, b[n]);
    }
}
#else
template <int M, int N> inline void step(Half, F (&sum)[M][N], const char* x, int64_t stride, const char* w, int64_t tile) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
    F even[N], odd[N];
    EACH(n, N) {
        __m256i l = _mm256_loadu_si256((const __m256i*)(w + n * tile));
        __m256i h = _mm256_loadu_si256((const __m256i*)(w + n * tile + 32));
        even[n] = {_mm256_castsi256_ps(_mm256_slli_epi32(l, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(h, 16))};
        odd[n] = {_mm256_castsi256_ps(_mm256_and_si256(l, upper)), _mm256_castsi256_ps(_mm256_and_si256(h, upper))};
    }
    EACH(m, M) {
        F a = all(((const float*)(x + m * stride))[0]);
        EACH(n, N) sum[m][n] = fma(a, even[n], sum[m][n]);
    }
    EACH(m, M) {
        F a = all(((const float*)(x + m * stride))[1]);
        EACH(n, N) sum[m][n] = fma(a, odd[n], sum[m][n]);
    }
}
#endif

template <class Kind, int M, int N> inline void block(F (&sum)[M][N], const char* x, int64_t stride, const char* w, int64_t tile, int64_t steps) {
    for (int64_t k = 0; k < steps; k++) {
        step(Kind{}, sum, x + k * Kind::X, stride, w + k * STEP, tile);
    }
}

}  // namespace
