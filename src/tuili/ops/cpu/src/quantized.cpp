// Products with integer weights. Activations are rounded to int8, one factor per row; sums over inputs are exact int32.
// 8 bits: one factor per output. 4 bits: one per output and group of inputs, and groups are added in order in float32.
// Weights are the unsigned operand (8 bits: + 128, 4 bits: the code), activations the signed one; what the offset adds
// is the row's sum times it, and is taken off: sums begin with it.
#include "integers.h"

namespace {

#ifdef __AVX512F__
constexpr int COLUMNS4 = 2, ROWS4 = 6, SUMS = 4;
constexpr int64_t HEIGHT8 = 16, HEIGHT4 = 8;  // most rows of a strip
#else
constexpr int COLUMNS4 = 1, ROWS4 = 6, SUMS = 1;
constexpr int64_t HEIGHT8 = 6, HEIGHT4 = 6;
#endif
#if defined(__AVX512F__) || defined(__AVXVNNI__)
constexpr int OFFSET8 = -128;
#else
constexpr int OFFSET8 = 0;  // dot8 takes codes as they are meant
#endif
constexpr int64_t STEP = 64;          // bytes of a step of a tile
constexpr int64_t AHEAD = 32 * STEP;  // weights are asked for so long before a strip needs them

// Few rows wait for memory, which is read fastest tile by tile: they are multiplied in strips, as many rows at once as
// there are registers, and lie interleaved, [step][row], so that they are one stream, too. Tiles of many inputs are read
// as fast side by side, and many rows wait for products, which blocks of rows and columns load least for.
bool strips(const QuantizedArgs& a) {
    return a.rows < CUT_ROWS && (a.numbers == INT4 || a.rows <= 3 || padded(a) * TILE <= 16384);
}

// Blocks of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
struct Blocks {
    int64_t rows, count;
    Blocks(int64_t all, int64_t height) : rows(all), count((all + height - 1) / height) {}
    int64_t first(int64_t block) const { return rows * block / count; }
    int64_t of(int64_t row) const { return ((row + 1) * count - 1) / rows; }
};

// What is added to a sum for each unit of its row's total, because of the weights' offset; with zeros, times those.
int offset(const QuantizedArgs& a) { return a.numbers == INT8 ? OFFSET8 : a.zeros ? -1 : -8; }

// Where a row's codes and sums go: `step` words apart.
struct Place {
    int32_t *codes, *sums;
    int64_t step = 1;
    Place(const RoundedArgs& a, int64_t row) {
        int64_t words = padded(a) / 4, count = groups(a), first = row;
        if (strips(a)) {
            Blocks blocks(a.rows, a.numbers == INT8 ? HEIGHT8 : HEIGHT4);
            int64_t b = blocks.of(row);
            first = blocks.first(b), step = blocks.first(b + 1) - first;
        }
        codes = (int32_t*)a.values + first * words + row - first, sums = a.sums + first * count + row - first;
    }
};

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

template <class T> void quantize(const RoundedArgs& a, int64_t row, int64_t rows) {
    int64_t wide = padded(a), count = groups(a);
    int8_t* out = (int8_t*)scratch(1, wide + 4 * count);
    int32_t* sums = (int32_t*)(out + wide);
    for (int64_t r = row; r < row + rows; r++) {
        const T* x = (const T*)a.x + r * a.x_stride;
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
        sum_groups(out, wide, wide / count, sums);
        Place to(a, r);
        if (to.step == 1)
            memcpy(to.codes, out, wide);
        else
            for (int64_t k = 0; k < wide / 4; k++) to.codes[k * to.step] = ((const int32_t*)out)[k];
        for (int64_t g = 0; g < count; g++) to.sums[g * to.step] = offset(a) * sums[g];
    }
}

template <class T, int M, int N> void finish(const QuantizedArgs& a, F (&sum)[M][N], int64_t row, int64_t tile) {
    EACH(n, N) {
        int64_t column = (tile + n) * TILE, left = a.outputs - column;
        F bias = a.bias ? load((const T*)a.bias + column, left) : zero();
        EACH(m, M) store((T*)a.out + (row + m) * a.outputs + column, sum[m][n] + bias, left);
    }
}

// Where the words of M rows' codes lie: `row` bytes from one row to the next, `step` from one word to the next.
template <int M, bool STRIP> struct Codes {
    const int8_t* at;
    int64_t row, step = STRIP ? 4 * M : 4;
    Codes(const RoundedArgs& a, int64_t first) : at(a.values + first * padded(a)), row(STRIP ? 4 : padded(a)) {}
    int word(int64_t m, int64_t k) const { return ::word(at + m * (STRIP ? 4 : row) + k * step); }
};
template <int M, bool STRIP> inline void ask(const char* w) {
    if (STRIP && M > 4) _mm_prefetch(w + AHEAD, _MM_HINT_T0);  // fewer rows wait for nothing else
}

#ifdef __AVX512F__
// sum[M][N] += rows times tiles: S sums each, of every S-th step: exact, so they may be added in any order.
template <int M, int N, int S, bool STRIP> inline void sum8(I (&total)[M][N], const char* w, int64_t steps, const Codes<M, STRIP>& x) {
    int64_t k = 0;
    I sum[S * M][N];
    EACH(m, (S * M))
        EACH(n, N) sum[m][n] = m < M ? total[m][n] : nothing();
    for (; k + S <= steps; k += S) {
        EACH(s, S) {
            I b[N];
            EACH(n, N) b[n] = bytes(w + (n * steps + k + s) * STEP);
            ask<M, STRIP>(w + (k + s) * STEP);
            EACH(m, M) {
                I v = four(x.word(m, k + s));
                EACH(n, N) sum[s * M + m][n] = dot8(sum[s * M + m][n], b[n], v);
            }
        }
    }
    for (; k < steps; k++)
        EACH(m, M) EACH(n, N) sum[m][n] = dot8(sum[m][n], bytes(w + (n * steps + k) * STEP), four(x.word(m, k)));
    for (int s = 1; s < S; s++)
        EACH(m, M) EACH(n, N) sum[m][n] = plus(sum[m][n], sum[s * M + m][n]);
    EACH(m, M) EACH(n, N) total[m][n] = sum[m][n];
    EACH(m, M) EACH(n, N) settle(total[m][n]);
}

// out[M][N]: the sums of each group of inputs, which begin with what the offset adds, times its scale, added in order.
template <int M, int N, bool STRIP> inline void sum4(const RoundedArgs& a, F (&out)[M][N], int64_t row, int64_t tile) {
    int64_t count = groups(a), steps = padded(a) / 8;
    const char* w = (const char*)a.tiles + tile * steps * STEP;
    const int32_t* totals = a.sums + row * count;
    Codes<M, STRIP> x(a, row);
    for (int64_t g = 0; g < count; g++) {
        I zeros[N], sum[M][N];
        EACH(n, N) zeros[n] = a.zeros ? widen_bytes((const uint8_t*)a.zeros + ((tile + n) * count + g) * TILE) : nothing();
        EACH(m, M) {
            I total = four(totals[STRIP ? g * M + m : m * count + g]);
            EACH(n, N) sum[m][n] = a.zeros ? times_half(zeros[n], total) : total;
        }
        for (int64_t k = g * a.group / 8; k < (g + 1) * a.group / 8; k++) {
            I lo[N], hi[N];
            EACH(n, N) {
                I both = bytes(w + (n * steps + k) * STEP);
                lo[n] = low_codes(both), hi[n] = high_codes(both);
            }
            ask<M, STRIP>(w + k * STEP);
            EACH(m, M) {
                I p = four(x.word(m, 2 * k)), q = four(x.word(m, 2 * k + 1));
                EACH(n, N) sum[m][n] = dot4(dot4(sum[m][n], lo[n], p), hi[n], q);
            }
        }
        EACH(n, N) {
            F scale = load_half((const uint16_t*)a.scales + ((tile + n) * count + g) * TILE);
            EACH(m, M) out[m][n] = fma(floats(sum[m][n]), scale, out[m][n]);
        }
    }
}
#else
// The same with a tile of two registers.
template <int M, int N, int S, bool STRIP> inline void sum8(I (&total)[M][N], const char* w, int64_t steps, const Codes<M, STRIP>& x) {
    static_assert(N == 1 && S == 1);
    __m256i sum[M][2];
    EACH(m, M) sum[m][0] = total[m][0].a, sum[m][1] = total[m][0].b;
    for (int64_t k = 0; k < steps; k++) {
        ask<M, STRIP>(w + k * STEP);
        EACH(h, 2) {
            __m256i codes = _mm256_loadu_si256((const __m256i*)(w + k * STEP + h * STEP / 2));
#ifdef __AVXVNNI__
            EACH(m, M) sum[m][h] = dot4(sum[m][h], codes, _mm256_set1_epi32(x.word(m, k)));
#else  // the sign moves to x
            codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
            __m256i size = _mm256_abs_epi8(codes);
            EACH(m, M) sum[m][h] = dot4(sum[m][h], size, _mm256_sign_epi8(_mm256_set1_epi32(x.word(m, k)), codes));
#endif
        }
    }
    EACH(m, M) total[m][0] = {sum[m][0], sum[m][1]};
}

// Sums of SPAN steps, a part of every group: without VNNI of 16 bits, which hold eight times two products of at most
// 15 * 127.
constexpr int SPAN = 4;
#ifdef __AVXVNNI__
inline __m256i span4(__m256i sum, __m256i codes, int x) { return dot4(sum, codes, _mm256_set1_epi32(x)); }
inline __m256i close4(__m256i sum) { return sum; }
#else
inline __m256i span4(__m256i sum, __m256i codes, int x) {
    return held(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x))));
}
inline __m256i close4(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

// A tile's two registers in one pass, or, of more rows, one after the other, each over all steps, so that the rows' sums
// stay in registers.
template <int M, int N, bool STRIP> inline void sum4(const RoundedArgs& a, F (&out)[M][N], int64_t row, int64_t tile) {
    static_assert(N == 1);
    constexpr int PASSES = M <= 3 ? 1 : 2, HALVES = 2 / PASSES;
    const __m256i mask = _mm256_set1_epi8(15);
    int64_t count = groups(a), steps = padded(a) / 8, each = a.group / 8;
    const int32_t* totals = a.sums + row * count;
    Codes<M, STRIP> x(a, row);
    EACH(pass, PASSES) {
        const char* w = (const char*)a.tiles + tile * steps * STEP + pass * STEP / 2;
        const uint16_t* scales = (const uint16_t*)a.scales + tile * count * TILE + pass * TILE / 2;
        const uint8_t* zeros = a.zeros ? (const uint8_t*)a.zeros + tile * count * TILE + pass * TILE / 2 : nullptr;
        __m256 result[M][HALVES];
        EACH(m, M) EACH(h, HALVES) result[m][h] = _mm256_setzero_ps();
        for (int64_t g = 0; g < count; g++) {
            __m256i sum[M][HALVES];
            EACH(m, M) EACH(h, HALVES) sum[m][h] = _mm256_set1_epi32(totals[STRIP ? g * M + m : m * count + g]);
            if (zeros) EACH(h, HALVES) {
                __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(zeros + g * TILE + h * TILE / 2)));
                EACH(m, M) sum[m][h] = _mm256_madd_epi16(zero, sum[m][h]);
            }
            for (int64_t k = g * each; k < (g + 1) * each; k += SPAN) {
                __m256i span[M][HALVES];
                EACH(m, M) EACH(h, HALVES) span[m][h] = _mm256_setzero_si256();
                EACH(j, SPAN) {
                    const char* at = w + (k + j) * STEP;
                    if (!pass && STRIP) _mm_prefetch(at + AHEAD, _MM_HINT_T0);  // unpacking leaves no time to wait
                    EACH(h, HALVES) {
                        __m256i codes = _mm256_loadu_si256((const __m256i*)(at + h * STEP / 2));
                        __m256i lo = _mm256_and_si256(codes, mask), hi = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
                        EACH(m, M)
                            span[m][h] = span4(span4(span[m][h], lo, x.word(m, 2 * (k + j))), hi, x.word(m, 2 * (k + j) + 1));
                    }
                }
                EACH(m, M) EACH(h, HALVES) sum[m][h] = _mm256_add_epi32(sum[m][h], close4(span[m][h]));
            }
            EACH(h, HALVES) {
                __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scales + g * TILE + h * TILE / 2)));
                EACH(m, M) result[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][h]), scale, result[m][h]);
            }
        }
        EACH(m, M) EACH(h, HALVES)(pass + h ? out[m][0].b : out[m][0].a) = result[m][h];
    }
}
#endif

template <class T, int M, int N, int S, bool STRIP> void eight(const RoundedArgs& a, int64_t row, int64_t tile) {
    int64_t steps = padded(a) / 4;
    I sum[M][N];
    EACH(m, M)
        EACH(n, N) sum[m][n] = four(a.sums[row + m]);
    sum8<M, N, S, STRIP>(sum, (const char*)a.tiles + tile * steps * STEP, steps, Codes<M, STRIP>(a, row));
    F out[M][N];
    EACH(n, N) {
        int64_t column = (tile + n) * TILE;
        F scale = load((const float*)a.scales + column, a.outputs - column);
        EACH(m, M) out[m][n] = floats(sum[m][n]) * all(a.factors[row + m]) * scale;
    }
    finish<T>(a, out, row, tile);
}

template <class T, int M, int N, bool STRIP> void nibbles(const RoundedArgs& a, int64_t row, int64_t tile) {
    F out[M][N];
    EACH(m, M)
        EACH(n, N) out[m][n] = zero();
    sum4<M, N, STRIP>(a, out, row, tile);
    EACH(m, M)
        EACH(n, N) out[m][n] = out[m][n] * all(a.factors[row + m]);
    finish<T>(a, out, row, tile);
}

template <class T, int M> void strip(const RoundedArgs& a, int64_t row, int64_t tile, int64_t tiles) {
    for (int64_t n = 0; n < tiles; n++) {
        if (a.numbers == INT8)
            eight<T, M, 1, (M < SUMS ? SUMS / M : 1), true>(a, row, tile + n);
        else if constexpr (M <= HEIGHT4)
            nibbles<T, M, 1, true>(a, row, tile + n);
    }
}

template <class T, int M> void block(const RoundedArgs& a, int64_t row, int64_t tile, int64_t tiles) {
    int64_t n = 0;
    if (a.numbers == INT8) {
        for (; n + COLUMNS <= tiles; n += COLUMNS) eight<T, M, COLUMNS, 1, false>(a, row, tile + n);
        for (; n < tiles; n++) eight<T, M, 1, 1, false>(a, row, tile + n);
    } else if constexpr (M <= ROWS4) {
        for (; n + COLUMNS4 <= tiles; n += COLUMNS4) nibbles<T, M, COLUMNS4, false>(a, row, tile + n);
        for (; n < tiles; n++) nibbles<T, M, 1, false>(a, row, tile + n);
    }
}

// strip<M> of a strip's height M, at most H.
template <class T, int H> void strip_of(int64_t height, const RoundedArgs& a, int64_t row, int64_t tile, int64_t tiles) {
    if constexpr (H > 1)
        if (height < H) return strip_of<T, H - 1>(height, a, row, tile, tiles);
    strip<T, H>(a, row, tile, tiles);
}

template <class T> void quantized(const RoundedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    bool narrow = strips(a), whole = a.numbers == INT8;  // strips are all of the rows
    Blocks blocks(rows, narrow ? (whole ? HEIGHT8 : HEIGHT4) : whole ? ROWS : ROWS4);
    for (int64_t b = 0; b < blocks.count; b++) {
        int64_t from = row + blocks.first(b), height = blocks.first(b + 1) - blocks.first(b);
#define BLOCK(m) block<T, m>(a, from, tile, tiles)
        if (narrow)
            strip_of<T, HEIGHT8>(height, a, from, tile, tiles);
        else
            EACH_HEIGHT(height, BLOCK)
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(quantize, TUILI_ISA)(const RoundedArgs& a, int64_t row, int64_t rows) {
    a.dtype == 0 ? quantize<float>(a, row, rows) : quantize<uint16_t>(a, row, rows);
}
void JOIN(quantized, TUILI_ISA)(const RoundedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    a.dtype == 0 ? quantized<float>(a, row, rows, tile, tiles) : quantized<uint16_t>(a, row, rows, tile, tiles);
}
