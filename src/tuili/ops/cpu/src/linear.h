// The matmul: a few rows times a few tiles of packed weights, all sums in registers, inputs in order. A (row, output)
// is the same chain of multiply-adds in every shape of the block, so one row or two thousand give the same bits.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

// How products are made: of floats, or of pairs of bfloat16 where there is an instruction for them. A tile is then
// [inputs][16], or [inputs / 2][16][2], pairs of inputs side by side.
// Word: a step of a tile in registers. Spread: the step's part of a row of x, in every lane.
struct Float {
    using Word = F;
    using Spread = F;
    static constexpr int64_t INPUTS = 1;  // per step
    static constexpr int64_t X = 4;       // bytes of x per step
    static int64_t steps(int64_t inputs) { return inputs; }
    static Word word(const char* w) { return load((const float*)w); }
    static Word join(F x, F) { return x; }
    static void keep(char* w, Word x) { store((float*)w, x); }
    static Spread spread(const char* x) { return all(*(const float*)x); }
    static F add(F sum, Spread x, Word w) { return fma(x, w, sum); }
};

#ifdef __AVX512F__
struct Half {
    using Word = __m512bh;
    using Spread = __m512bh;
    static constexpr int64_t INPUTS = 2, X = 4;
    static int64_t steps(int64_t inputs) { return (inputs + 1) / 2; }
    static Word word(const char* w) { return (__m512bh)_mm512_loadu_si512(w); }
    // Pairs of numbers that bfloat16 holds exactly: their lower halves are zero.
    static Word join(F even, F odd) {
        return (__m512bh)_mm512_or_si512(_mm512_castps_si512(odd.v), _mm512_srli_epi32(_mm512_castps_si512(even.v), 16));
    }
    static void keep(char* w, Word x) { _mm512_storeu_si512(w, (__m512i)x); }
    static Spread spread(const char* x) {
        int pair;
        memcpy(&pair, x, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static F add(F sum, Spread x, Word w) { return {_mm512_dpbf16_ps(sum.v, x, w)}; }
};
#endif
constexpr int64_t STEP = 64;  // bytes of a tile per step

template <class Kind, int M, int N>
inline void multiply(F (&sum)[M][N], const char* x, int64_t stride, const typename Kind::Word (&w)[N]) {
    EACH(m, M) {
        typename Kind::Spread a = Kind::spread(x + m * stride);
        EACH(n, N) sum[m][n] = Kind::add(sum[m][n], a, w[n]);
    }
}

template <class Kind, int M, int N>
inline void step(Kind, F (&sum)[M][N], const char* x, int64_t stride, const char* w, int64_t tile) {
    typename Kind::Word b[N];
    EACH(n, N) b[n] = Kind::word(w + n * tile);
    multiply<Kind, M, N>(sum, x, stride, b);
}

template <class Kind, int M, int N> inline void block(F (&sum)[M][N], const char* x, int64_t stride, const char* w, int64_t tile, int64_t steps) {
    for (int64_t k = 0; k < steps; k++) {
        step(Kind{}, sum, x + k * Kind::X, stride, w + k * STEP, tile);
    }
}

// A view of rows of x that can be read a step at a time: padded with zeros to `wide` inputs, and widened where they are
// multiplied as floats and are none. Valid until the next in this thread.
struct Rows {
    const char* at;
    int64_t stride;  // bytes
};

template <class Kind, class T> Rows prepare(const T* x, int64_t stride, int64_t inputs, int64_t wide, int64_t rows) {
    constexpr int64_t size = Kind::X / Kind::INPUTS;  // bytes of an input as it is read
    if (wide == inputs && size == sizeof(T)) return {(const char*)x, stride * size};
    int64_t line = (wide * size + 63) / 64 * 64;
    char* out = (char*)scratch(0, rows * line);
    for (int64_t r = 0; r < rows; r++) {
        memset(out + r * line + inputs * size, 0, line - inputs * size);
        if (size == sizeof(T)) {
            memcpy(out + r * line, x + r * stride, inputs * size);
        } else {
            for (int64_t i = 0; i < inputs; i += LANES)
                store((float*)(out + r * line) + i, load(x + r * stride + i, inputs - i));
        }
    }
    return {out, line};
}

}  // namespace
