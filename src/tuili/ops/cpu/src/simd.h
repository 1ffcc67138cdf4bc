// Sixteen float lanes and their words, for the instruction set that this file is compiled for. All in an anonymous
// namespace: each set has its own copy, and the linker can not mix them. No header of the C++ library is included by
// kernels, because its inline functions would be shared.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// A loop over a block of registers: left rolled, the compiler would keep the block in memory.
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < n; i++)

namespace {

constexpr int64_t LANES = 16;
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#ifdef __AVX512F__

constexpr int ROWS = 6, COLUMNS = 4;  // accumulators of the matmul: 24 of the 32 registers
constexpr bool PAIRS = true;          // multiplies pairs of bfloat16

struct F {
    __m512 v;
};
inline F zero() { return {_mm512_setzero_ps()}; }
inline F all(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
inline F load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
// a where x < limit, else b.
inline F where_less(F x, F limit, F a, F b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), b.v, a.v)};
}
// x in lanes [from, to), other elsewhere.
inline F keep(F x, int64_t from, int64_t to, F other) {
    __mmask16 m = static_cast<__mmask16>(first(most(to, 0)) & ~first(most(from, 0)));
    return {_mm512_mask_blend_ps(m, other.v, x.v)};
}
inline F round(F x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F times_power(F x, F n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline F widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline F load(const uint16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline F load(const uint16_t* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline __m256i narrow(F x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }
inline void store(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline void store(uint16_t* p, F x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
inline float low(F x) { return _mm512_cvtss_f32(x.v); }
inline __m256 fold(F x, int) { return _mm512_extractf32x8_ps(x.v, 1); }
inline __m256 half(F x) { return _mm512_castps512_ps256(x.v); }

#else

constexpr int ROWS = 6, COLUMNS = 1;
constexpr bool PAIRS = false;

struct F {
    __m256 a, b;
};
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F load(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    alignas(32) float t[16] = {};
    memcpy(t, p, n * 4);
    return load(t);
}
inline void store(float* p, F x, int64_t n) {
    if (n >= 16) return store(p, x);
    alignas(32) float t[16];
    store(t, x);
    memcpy(p, t, n * 4);
}
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F where_less(F x, F limit, F y, F z) {
    return {_mm256_blendv_ps(z.a, y.a, _mm256_cmp_ps(x.a, limit.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(z.b, y.b, _mm256_cmp_ps(x.b, limit.b, _CMP_LT_OQ))};
}
inline F keep(F x, int64_t from, int64_t to, F other) {
    const __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), up = _mm256_set1_epi32(8);
    __m256i f = _mm256_set1_epi32((int)most(least(from, 16), -1) - 1), t = _mm256_set1_epi32((int)most(least(to, 16), 0));
    auto mask = [&](__m256i i) {
        return _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(i, f), _mm256_cmpgt_epi32(t, i)));
    };
    return {_mm256_blendv_ps(other.a, x.a, mask(at)), _mm256_blendv_ps(other.b, x.b, mask(_mm256_add_epi32(at, up)))};
}
inline F round(F x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline __m256 times_power(__m256 x, __m256 n) {  // in two steps: a power of two below the normal range has no exponent
    __m256i i = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
    auto power = [&](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)); };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(h)), power(_mm256_sub_epi32(i, h)));
}
inline F times_power(F x, F n) { return {times_power(x.a, n.a), times_power(x.b, n.b)}; }
inline __m256 widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline F load(const uint16_t* p) {
    return {widen(_mm_loadu_si128((const __m128i*)p)), widen(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline F load(const uint16_t* p, int64_t n) {
    if (n >= 16) return load(p);
    alignas(32) uint16_t t[16] = {};
    memcpy(t, p, n * 2);
    return load(t);
}
inline __m128i narrow(__m256 x) {  // to nearest, ties to even; not a number stays one
    __m256i i = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));
}
inline void store(uint16_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, narrow(x.a)), _mm_storeu_si128((__m128i*)(p + 8), narrow(x.b));
}
inline void store(uint16_t* p, F x, int64_t n) {
    if (n >= 16) return store(p, x);
    alignas(32) uint16_t t[16];
    store(t, x);
    memcpy(p, t, n * 2);
}
inline float low(F x) { return _mm256_cvtss_f32(x.a); }
inline __m256 fold(F x, int) { return x.b; }
inline __m256 half(F x) { return x.a; }

#endif

// Horizontal sums and maxima: one fixed tree.
inline float sum(F x) {
    __m256 h = _mm256_add_ps(half(x), fold(x, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float top(F x) {
    __m256 h = _mm256_max_ps(half(x), fold(x, 1));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline float single(const float* p) { return *p; }
inline float single(const uint16_t* p) {
    uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// e^x to about one unit in the last place; exactly 1 at 0, exactly 0 below -87.3 (also at minus infinity).
inline F exp(F x) {
    const F floor = all(-87.3f);
    F c = min(all(88.3f), max(floor, x));  // in this order of operands, not-a-number stays
    F n = round(c * all(1.44269504f));
    F r = fma(n, all(-0.693359375f), c);
    r = fma(n, all(2.12194440e-4f), r);
    F p = all(1.0f / 5040);  // the Taylor series: |r| <= ln(2) / 2, so that the next term is below 3e-9
    p = fma(p, r, all(1.0f / 720));
    p = fma(p, r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    return where_less(x, floor, zero(), times_power(p, n));
}

// tanh: its Taylor series near zero, else from e^(-2|x|).
inline F tanh(F x) {
    F s = x * x;
    F p = all(62.0f / 2835);
    p = fma(p, s, all(-17.0f / 315));
    p = fma(p, s, all(2.0f / 15));
    p = fma(p, s, all(-1.0f / 3));
    F near = fma(p * s, x, x);
    F magnitude = max(x, zero() - x);
    F e = exp(magnitude * all(-2.0f));
    F far = (all(1.0f) - e) / (all(1.0f) + e);
    far = where_less(x, zero(), zero() - far, far);
    return where_less(magnitude, all(0.3f), near, far);
}

}  // namespace
