// What a KV cache holds, and the products with it (layouts: ops/kvcache.py). Rows of words times columns of 16 lanes of
// words: lanes are keys for the scores, dimensions for the values. Words are summed in order.
#pragma once
#include "integers.h"

namespace {

constexpr int64_t CHUNK = 16;                 // keys that lie side by side
constexpr int64_t CHUNKS = KEY_TILE / CHUNK;  // of a tile

struct FloatSums {
    F f;
    void clear() { f = zero(); }
};

// One float a word.
struct Floats {
    using Value = float;
    static constexpr int64_t PAIR = 1;                       // values in a word of the cache
    static constexpr int64_t WORD = 4, X = 4;                // bytes of a word of the cache, of a row
    using Sums = FloatSums;
    struct Column {
        F f;
        void get(const char* w) { f = load((const float*)w); }
    };
    static void add(Sums& s, const char* x, const Column& c) { s.f = fma(all(*(const float*)x), c.f, s.f); }
};

// Two bfloat16 a word, times rows of floats, two a word.
struct Widened {
    using Value = uint16_t;
    static constexpr int64_t PAIR = 2, WORD = 4, X = 8;
    using Sums = FloatSums;
    struct Column {
        F even, odd;
        void get(const char* w) {
            I word = bytes(w);
            even = as_floats(up<16>(word)), odd = as_floats(both(word, four((int)0xffff0000u)));
        }
    };
    static void add(Sums& s, const char* x, const Column& c) {
        s.f = fma(all(((const float*)x)[0]), c.even, s.f);
        s.f = fma(all(((const float*)x)[1]), c.odd, s.f);
    }
};

// Two bfloat16 a word, and rows too, where there is an instruction for pairs.
#ifdef __AVX512F__
struct Halves {
    using Value = uint16_t;
    static constexpr int64_t PAIR = 2, WORD = 4, X = 4;
    using Sums = FloatSums;
    struct Column {
        __m512bh v;
        void get(const char* w) { v = (__m512bh)_mm512_loadu_si512(w); }
    };
    static void add(Sums& s, const char* x, const Column& c) {
        s.f.v = _mm512_dpbf16_ps(s.f.v, (__m512bh)_mm512_set1_epi32(*(const int*)x), c.v);
    }
};
#else
using Halves = Widened;
#endif

// Two int8 a word, times rows of int16 pairs: whole numbers, exact in any order.
struct Bytes {
    using Value = int8_t;
    static constexpr int64_t PAIR = 2, WORD = 2, X = 4;
#ifdef __AVX512F__
    struct Sums {
        typedef int Lanes __attribute__((vector_size(64)));  // as __m512i (64-bit lanes) the compiler keeps it in memory
        Lanes i;
        void clear() { i = Lanes{}; }
        F floats() const { return {_mm512_cvtepi32_ps((__m512i)i)}; }
    };
    struct Column {
        __m512i v;
        void get(const char* w) { v = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)); }
    };
    static void add(Sums& s, const char* x, const Column& c) {
        s.i = (Sums::Lanes)_mm512_dpwssd_epi32((__m512i)s.i, _mm512_set1_epi32(*(const int*)x), c.v);
    }
#else
    struct Sums {
        typedef int Lanes __attribute__((vector_size(32)));
        Lanes a, b;
        void clear() { a = b = Lanes{}; }
        F floats() const { return {_mm256_cvtepi32_ps((__m256i)a), _mm256_cvtepi32_ps((__m256i)b)}; }
    };
    struct Column {
        __m256i a, b;
        void get(const char* w) {
            a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
            b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)));
        }
    };
    static void add(Sums& s, const char* x, const Column& c) {
        __m256i pair = _mm256_set1_epi32(*(const int*)x);
        s.a = s.a + (Sums::Lanes)_mm256_madd_epi16(pair, c.a);
        s.b = s.b + (Sums::Lanes)_mm256_madd_epi16(pair, c.b);
    }
#endif
};

// 16 numbers within +-32767, to nearest.
inline void store_int16(int16_t* p, F x) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
#else
    __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
#endif
}

// sums[m][n] += rows x[m] times columns at[n], `steps` words from `stride` to `stride` apart. With AHEAD the words that
// lie ahead[n] bytes further are asked for meanwhile.
template <class Kind, bool AHEAD, int M, int N>
inline void product(typename Kind::Sums (&sums)[M][N], const char* x, int64_t x_stride, const char* const* at, const int64_t* ahead, int64_t stride, int64_t steps) {
    for (int64_t k = 0; k < steps; k++) {
        typename Kind::Column c[N];
        EACH(n, N) {
            c[n].get(at[n] + k * stride);
            if (AHEAD) _mm_prefetch(at[n] + ahead[n] + k * stride, _MM_HINT_T1);
        }
        EACH(m, M)
            EACH(n, N) Kind::add(sums[m][n], x + m * x_stride + k * Kind::X, c[n]);
    }
}

inline F floats(const FloatSums& s) { return s.f; }
inline F floats(const Bytes::Sums& s) { return s.floats(); }

}  // namespace
