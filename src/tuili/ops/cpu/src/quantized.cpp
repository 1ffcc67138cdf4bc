// Products with integer weights. Activations are rounded to int8, one factor per row; sums over inputs are exact int32.
// 8 bits: one factor per output. 4 bits: one per output and group of inputs, and groups are added in order in float32.
// Weights are the unsigned operand (8 bits: + 128, 4 bits: the code), activations the signed one; what the offset adds
// is the row's sum times it, and is taken off.
#include "kernels.h"
#include "simd.h"

namespace {

#ifdef __AVX512F__
constexpr int COLUMNS4 = 2, ROWS4 = 6;
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
inline I times(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I widen_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline F floats(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
// What leaves a loop leaves it in one register: gcc 12 else keeps a second copy of every sum, on the stack.
inline void settle(I& x) { asm("" : "+v"(x.v)); }
inline F load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store_bytes(int8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v))); }
#else
constexpr int COLUMNS4 = 1, ROWS4 = 3;
struct I {
    __m256i a, b;
};
inline I nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I bytes(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)((const char*)p + 32))};
}
inline I four(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I low_codes(I w) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
}
inline I high_codes(I w) { return low_codes({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
// Pairs are added in 16 bits: with codes below 16, or signs moved to one side, they do not saturate.
inline __m256i dot4(__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
inline __m256i dot8(__m256i sum, __m256i w, __m256i x) {
    __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    return dot4(sum, _mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
}
inline I dot8(I sum, I w, I x) { return {dot8(sum.a, w.a, x.a), dot8(sum.b, w.b, x.b)}; }
inline I dot4(I sum, I w, I x) { return {dot4(sum.a, w.a, x.a), dot4(sum.b, w.b, x.b)}; }
inline I minus(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I times(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline I widen_bytes(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline F floats(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void settle(I& x) { asm("" : "+x"(x.a), "+x"(x.b)); }
inline F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_bytes(int8_t* p, F x) {
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
#endif

int64_t padded(const QuantizedArgs& a) { return (a.inputs + a.group - 1) / a.group * a.group; }
int64_t groups(const QuantizedArgs& a) { return a.bits == 8 ? 1 : padded(a) / a.group; }

template <class T> void quantize(const QuantizedArgs& a, int64_t row, int64_t rows) {
    int64_t wide = padded(a), count = groups(a), group = wide / count;
    for (int64_t r = row; r < row + rows; r++) {
        const T* x = (const T*)a.x + r * a.x_stride;
        int8_t* out = a.values + r * wide;
        F largest = zero();
        for (int64_t i = 0; i < a.inputs; i += LANES) {
            F v = load(x + i, a.inputs - i);
            largest = max(largest, max(v, zero() - v));
        }
        float most_ = top(largest);
        F inverse = all(most_ > 0 ? 127.0f / most_ : 0.0f);
        a.factors[r] = most_ / 127.0f;
        for (int64_t i = 0; i < wide; i += LANES) {
            alignas(16) int8_t t[LANES];
            store_bytes(t, i < a.inputs ? load(x + i, a.inputs - i) * inverse : zero());
            memcpy(out + i, t, least(LANES, wide - i));
        }
        for (int64_t g = 0; g < count; g++) {
            int32_t s = 0;
            for (int64_t i = 0; i < group; i++) s += out[g * group + i];
            a.sums[r * count + g] = s;
        }
    }
}

template <class T, int M, int N> void finish(const QuantizedArgs& a, F (&sum)[M][N], int64_t row, int64_t tile) {
    EACH(n, N) {
        int64_t column = (tile + n) * TILE, left = a.outputs - column;
        F bias = a.bias ? load((const T*)a.bias + column, left) : zero();
        EACH(m, M) store((T*)a.out + (row + m) * a.outputs + column, sum[m][n] + bias, left);
    }
}

inline int word(const int8_t* p) {
    int w;
    memcpy(&w, p, 4);
    return w;
}

template <class T, int M, int N> void eight(const QuantizedArgs& a, int64_t row, int64_t tile) {
    int64_t wide = padded(a), tile_bytes = wide * TILE;
    const uint8_t* w = (const uint8_t*)a.weight + tile * tile_bytes;
    const int8_t* x = a.values + row * wide;
    I sum[M][N];
    EACH(m, M)
        EACH(n, N) sum[m][n] = nothing();
    for (int64_t k = 0; k < wide; k += 4) {
        I b[N];
        EACH(n, N) b[n] = bytes(w + n * tile_bytes + k * TILE);
        EACH(m, M) {
            I v = four(word(x + m * wide + k));
            EACH(n, N) sum[m][n] = dot8(sum[m][n], b[n], v);
        }
    }
    EACH(m, M) EACH(n, N) settle(sum[m][n]);
    F out[M][N];
    EACH(n, N) {
        int64_t column = (tile + n) * TILE;
        F scale = load((const float*)a.scales + column, a.outputs - column);
        EACH(m, M) {
            I exact = PAIRS ? minus(sum[m][n], four(128 * a.sums[row + m])) : sum[m][n];
            out[m][n] = floats(exact) * all(a.factors[row + m]) * scale;
        }
    }
    finish<T>(a, out, row, tile);
}

template <class T, int M, int N> void nibbles(const QuantizedArgs& a, int64_t row, int64_t tile) {
    int64_t wide = padded(a), count = groups(a), tile_bytes = wide * TILE / 2;
    const uint8_t* w = (const uint8_t*)a.weight + tile * tile_bytes;
    const int8_t* x = a.values + row * wide;
    F out[M][N];
    EACH(m, M)
        EACH(n, N) out[m][n] = zero();
    for (int64_t g = 0; g < count; g++) {
        I sum[M][N];
        EACH(m, M)
            EACH(n, N) sum[m][n] = nothing();
        for (int64_t k = g * a.group; k < (g + 1) * a.group; k += 8) {
            I lo[N], hi[N];
            EACH(n, N) {
                I both = bytes(w + n * tile_bytes + k * (TILE / 2));
                lo[n] = low_codes(both), hi[n] = high_codes(both);
            }
            EACH(m, M) {
                I p = four(word(x + m * wide + k)), q = four(word(x + m * wide + k + 4));
                EACH(n, N) sum[m][n] = dot4(dot4(sum[m][n], lo[n], p), hi[n], q);
            }
        }
        EACH(n, N) {
            int64_t at = ((tile + n) * count + g) * TILE;
            F scale = load_half((const uint16_t*)a.scales + at);
            I offset = a.zeros ? widen_bytes((const uint8_t*)a.zeros + at) : four(8);
            EACH(m, M) {
                I exact = minus(sum[m][n], times(offset, four(a.sums[(row + m) * count + g])));
                out[m][n] = fma(floats(exact), scale, out[m][n]);
            }
        }
    }
    EACH(m, M)
        EACH(n, N) out[m][n] = out[m][n] * all(a.factors[row + m]);
    finish<T>(a, out, row, tile);
}

template <class T, int M> void columns(const QuantizedArgs& a, int64_t row, int64_t tile, int64_t tiles) {
    int64_t n = 0;
    if (a.bits == 8) {
        for (; n + COLUMNS <= tiles; n += COLUMNS) eight<T, M, COLUMNS>(a, row, tile + n);
        for (; n < tiles; n++) eight<T, M, 1>(a, row, tile + n);
    } else if constexpr (M <= ROWS4) {
        for (; n + COLUMNS4 <= tiles; n += COLUMNS4) nibbles<T, M, COLUMNS4>(a, row, tile + n);
        for (; n < tiles; n++) nibbles<T, M, 1>(a, row, tile + n);
    }
}

template <class T> void quantized(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    int64_t height = a.bits == 8 ? ROWS : ROWS4, blocks = (rows + height - 1) / height;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t from = row + rows * b / blocks, to = row + rows * (b + 1) / blocks;
#define COLUMNS_OF(m) columns<T, m>(a, from, tile, tiles)
        EACH_HEIGHT(to - from, COLUMNS_OF)
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(quantize, TUILI_ISA)(const QuantizedArgs& a, int64_t row, int64_t rows) {
    a.dtype == 0 ? quantize<float>(a, row, rows) : quantize<uint16_t>(a, row, rows);
}
void JOIN(quantized, TUILI_ISA)(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    a.dtype == 0 ? quantized<float>(a, row, rows, tile, tiles) : quantized<uint16_t>(a, row, rows, tile, tiles);
}
