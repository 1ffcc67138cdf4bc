// Sixteen 32-bit integer lanes, or 64 bytes of packed codes: what products with integer weights are written in.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

#ifdef __AVX512F__
struct I {
    __m512i v;
};
inline I nothing() { return {_mm512_setzero_si512()}; }
inline I bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I four(int x) { return {_mm512_set1_epi32(x)}; }
inline I low_codes(I w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
inline I high_codes(I w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }
inline I dot8(I sum, I w, I x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
inline I dot4(I sum, I w, I x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
inline I minus(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I plus(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I both(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I differ(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N> inline I up(I a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> inline I down(I a) { return {_mm512_srli_epi32(a.v, N)}; }
inline F as_floats(I x) { return {_mm512_castsi512_ps(x.v)}; }
// Sixteen of 32 float16.
template <int HALF> inline F halves(I x) { return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(x.v, HALF))}; }
inline void keep(void* p, I x) { _mm512_storeu_si512(p, x.v); }
inline I times(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
// a * b of lanes in which a is below 2^15 and b fits 16 bits, signed.
inline I times_half(I a, I b) { return {_mm512_madd_epi16(a.v, b.v)}; }
inline I widen_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline F floats(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
// What leaves a loop leaves it in one register: gcc 12 else keeps a second copy of every sum, on the stack.
inline void settle(I& x) { asm("" : "+v"(x.v)); }
inline F load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store_bytes(int8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v))); }
#else
struct I {
    __m256i a, b;
};
inline I nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I bytes(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)((const char*)p + 32))};
}
inline I four(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
// A sum that stays in its register: gcc else turns the order of sums, and needs memory for what it has put off.
inline __m256i held(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}
#ifdef __AVXVNNI__
inline __m256i dot4(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
// Pairs are added in 16 bits: with codes below 16, or signs moved to one side, they do not saturate.
inline __m256i dot4(__m256i sum, __m256i w, __m256i x) {
    return held(_mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))));
}
#endif
inline I dot4(I sum, I w, I x) { return {dot4(sum.a, w.a, x.a), dot4(sum.b, w.b, x.b)}; }
inline I minus(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I both(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I differ(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int N> inline I up(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> inline I down(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
inline F as_floats(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
template <int HALF> inline F halves(I x) {
    __m256i h = HALF ? x.b : x.a;
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
inline void keep(void* p, I x) {
    _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)((char*)p + 32), x.b);
}
inline I widen_bytes(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline F floats(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_bytes(int8_t* p, F x) {
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
#endif

inline int word(const int8_t* p) {
    int w;
    memcpy(&w, p, 4);
    return w;
}

inline int64_t padded(const QuantizedArgs& a) { return (a.inputs + a.group - 1) / a.group * a.group; }
inline int64_t groups(const QuantizedArgs& a) { return a.numbers == INT8 ? 1 : padded(a) / a.group; }

}  // namespace
