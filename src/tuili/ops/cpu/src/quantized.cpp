// Products with integer weights. Activations are rounded to int8, one factor per row; sums over inputs are exact int32.
// 8 bits: one factor per output. 4 bits: one per output and group of inputs, and groups are added in order in float32.
// Weights are the unsigned operand (8 bits: + 128, 4 bits: the code), activations the signed one; what the offset adds
// is the row's sum times it, and is taken off.
#include "integers.h"

namespace {

#ifdef __AVX512F__
constexpr int COLUMNS4 = 2, ROWS4 = 6, SUMS = 12;
#else
constexpr int COLUMNS4 = 1, ROWS4 = 3, SUMS = 3;
#endif

// Sums of `codes` by group of `group` of them, a multiple of 4.
void sum_groups(const int8_t* codes, int64_t wide, int64_t group, int32_t* sums) {
    const I ones = four(0x01010101);
    alignas(64) int32_t fours[LANES];
    memset(sums, 0, wide / group * 4);
    for (int64_t i = 0; i < wide; i += 4 * LANES) {
        int64_t n = least(LANES, (wide - i) / 4);
        alignas(64) int8_t rest[4 * LANES];
        if (n < LANES) memcpy(rest, codes + i, 4 * n);
        keep(fours, dot4(nothing(), ones, bytes(n < LANES ? rest : codes + i)));
        for (int64_t f = 0; f < n;) {
            int64_t g = (i + 4 * f) / group, end = least(n, ((g + 1) * group - i) / 4);
            for (; f < end; f++) sums[g] += fours[f];
        }
    }
}

template <class T> void quantize(const QuantizedArgs& a, int64_t row, int64_t rows) {
    int64_t wide = padded(a), count = groups(a);
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
        int64_t i = 0;
        for (; i + LANES <= a.inputs; i += LANES) store_bytes(out + i, load(x + i) * inverse);
        for (; i < wide; i += LANES) {
            alignas(16) int8_t t[LANES];
            store_bytes(t, i < a.inputs ? load(x + i, a.inputs - i) * inverse : zero());
            memcpy(out + i, t, least(LANES, wide - i));
        }
        sum_groups(out, wide, wide / count, a.sums + r * count);
    }
}

template <class T, int M, int N> void finish(const QuantizedArgs& a, F (&sum)[M][N], int64_t row, int64_t tile) {
    EACH(n, N) {
        int64_t column = (tile + n) * TILE, left = a.outputs - column;
        F bias = a.bias ? load((const T*)a.bias + column, left) : zero();
        EACH(m, M) store((T*)a.out + (row + m) * a.outputs + column, sum[m][n] + bias, left);
    }
}

// S sums per (row, output), of every S-th step: exact, so they may be added in any order.
template <class T, int M, int N, int S = 1> void eight(const QuantizedArgs& a, int64_t row, int64_t tile) {
    int64_t wide = padded(a), tile_bytes = wide * TILE;
    const uint8_t* w = (const uint8_t*)a.weight + tile * tile_bytes;
    const int8_t* x = a.values + row * wide;
    I sum[S * M][N];
    EACH(m, (S * M))
        EACH(n, N) sum[m][n] = nothing();
    for (int64_t k = 0; k < wide; k += 4 * S) {
        EACH(s, S) {
            int64_t at = S == 1 ? k : least(k + 4 * s, wide - 4);
            I b[N];
            EACH(n, N) b[n] = bytes(w + n * tile_bytes + at * TILE);
            EACH(m, M) {
                I v = four(S == 1 || k + 4 * s < wide ? word(x + m * wide + at) : 0);
                EACH(n, N) sum[s * M + m][n] = dot8(sum[s * M + m][n], b[n], v);
            }
        }
    }
    for (int s = 1; s < S; s++)
        EACH(m, M) EACH(n, N) sum[m][n] = plus(sum[m][n], sum[s * M + m][n]);
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
        I sum[M][N];  // begin with what the offset adds, negated
        const int32_t* total = a.sums + row * count + g;
        if (a.zeros) {
            EACH(n, N) {
                I offset = widen_bytes((const uint8_t*)a.zeros + ((tile + n) * count + g) * TILE);
                EACH(m, M) sum[m][n] = times_half(offset, four(-total[m * count]));
            }
        } else {
            EACH(m, M) EACH(n, N) sum[m][n] = four(-8 * total[m * count]);
        }
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
            F scale = load_half((const uint16_t*)a.scales + ((tile + n) * count + g) * TILE);
            EACH(m, M) out[m][n] = fma(floats(sum[m][n]), scale, out[m][n]);
        }
    }
    EACH(m, M)
        EACH(n, N) out[m][n] = out[m][n] * all(a.factors[row + m]);
    finish<T>(a, out, row, tile);
}

// Few rows wait for memory, which is read fastest tile by tile.
template <class T, int M> void columns(const QuantizedArgs& a, int64_t row, int64_t tile, int64_t tiles) {
    constexpr bool FEW = M <= 3;
    int64_t n = 0;
    if (a.bits == 8) {
        constexpr int N = FEW ? 1 : COLUMNS, S = FEW ? SUMS / M : 1;
        for (; n + N <= tiles; n += N) eight<T, M, N, S>(a, row, tile + n);
        for (; n < tiles; n++) eight<T, M, 1>(a, row, tile + n);
    } else if constexpr (M <= ROWS4) {
        constexpr int N = FEW ? 1 : COLUMNS4;
        for (; n + N <= tiles; n += N) nibbles<T, M, N>(a, row, tile + n);
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
