// Products of float activations with weights of fewer bits: 16 of a float, 8 or 4 of an integer. They become exact
// numbers (bfloat16 holds all of the integers), are multiplied and summed in float32, and the sums of integers are scaled:
// per output (8 bits), per group of inputs, groups in order (4 bits). Few rows unpack into registers, many unpack a panel
// that all rows share: the same chain.
#include "integers.h"
#include "linear.h"

namespace {

constexpr int64_t CHUNK = PAIRS ? 512 : 256;  // inputs unpacked at once, half of the first cache: a multiple of every group
constexpr int64_t AHEAD = 32 * STEP;  // few rows wait for memory: weights are asked for so long before
constexpr int64_t BAND = 192;   // rows whose sums wait in memory between chunks

// How a step of 64 bytes becomes numbers: word P of them. `shift` is made once per group and tile.
struct Bfloat16 {
    static constexpr int64_t INPUTS = 2;
    static constexpr bool GROUPED = false, SCALED = false;
    static I shift(const QuantizedArgs&, int64_t) { return nothing(); }
    template <class Kind, int P> static F word(I w, I) { return P ? as_floats(both(w, four((int)0xffff0000u))) : as_floats(up<16>(w)); }
};

struct Float16 : Bfloat16 {
    template <class Kind, int P> static F word(I w, I) { return halves<P>(w); }
};

struct Eight {
    static constexpr int64_t INPUTS = 4;
    static constexpr bool GROUPED = false, SCALED = true;
    static constexpr float SCALE = 1.0f / (1 << 24);  // codes are made in the upper byte
    static I shift(const QuantizedArgs&, int64_t) { return four((int)0x80808080u); }
    template <int J> static F number(I w) { return floats(both(up<24 - 8 * J>(w), four((int)0xff000000u))); }
    template <class Kind, int P> static typename Kind::Word word(I w, I shift) {
        w = differ(w, shift);  // code + 128 to two's complement
        return Kind::join(number<P * Kind::INPUTS>(w), number<(P + 1) * Kind::INPUTS - 1>(w));
    }
};

struct Four {
    static constexpr int64_t INPUTS = 8;
    static constexpr bool GROUPED = true, SCALED = false;
    static I zero(const QuantizedArgs& a, int64_t at) {
        return a.zeros ? widen_bytes((const uint8_t*)a.zeros + at * TILE) : four(8);
    }
    static I shift(const QuantizedArgs& a, int64_t at) { return zero(a, at); }
    // Input J lies in the lower half of byte J, J + 4 in its upper half.
    template <int J> static F number(I w, I zero) { return floats(minus(both(down<J % 4 * 8 + J / 4 * 4>(w), four(15)), zero)); }
    template <class Kind, int P> static typename Kind::Word word(I w, I zero) {
        return Kind::join(number<P * Kind::INPUTS>(w, zero), number<(P + 1) * Kind::INPUTS - 1>(w, zero));
    }
};

#ifdef __AVX512F__
constexpr uint16_t half_of(int number) {
    int size = number < 0 ? -number : number, power = 0;
    while (size >> power > 1) power++;
    return size == 0 ? 0 : (number < 0 ? 0x8000 : 0) | (127 + power) << 7 | ((size << 7 >> power) & 127);
}

struct Table {
    uint16_t of[32];
};
template <bool ZEROS> constexpr Table make_table() {  // by code - zero + 16, or by code in the lower four bits
    Table t{};
    for (int c = 0; c < 32; c++) t.of[c] = half_of(ZEROS ? c - 16 : c % 16 - 8);
    return t;
}

// Pairs of 4-bit codes by table look-up, which takes the lower five bits of each half of a lane.
template <bool ZEROS> struct FourPairs : Four {
    static I shift(const QuantizedArgs& a, int64_t at) {
        if (!ZEROS) return nothing();
        return times(minus(four(16), zero(a, at)), four(0x00010001));
    }
    template <class Kind, int P> static __m512bh word(I w, I shift) {
        static constexpr Table table = make_table<ZEROS>();
        const __m512i numbers = _mm512_loadu_si512(table.of), mask = _mm512_set1_epi16(15);
        const __m512i first = _mm512_set4_epi32(0x0d0d0c0c, 0x09090808, 0x05050404, 0x01010000);
        const __m512i second = _mm512_set4_epi32(0x0f0f0e0e, 0x0b0b0a0a, 0x07070606, 0x03030202);
        __m512i at = _mm512_shuffle_epi8(w.v, P % 2 ? second : first);
        if (P / 2) at = _mm512_srli_epi16(at, 4);
        if (ZEROS) at = _mm512_add_epi16(_mm512_and_si512(at, mask), shift.v);
        return (__m512bh)_mm512_permutexvar_epi16(at, numbers);
    }
};
#endif

// body(At<0>{}) ... body(At<COUNT - 1>{}).
template <int I> struct At {
    static constexpr int value = I;
};
template <int COUNT, class Body> inline __attribute__((always_inline)) void each_at(Body body) {
    if constexpr (COUNT > 0) {
        each_at<COUNT - 1>(body);
        body(At<COUNT - 1>{});
    }
}

template <class Code> int64_t span(const QuantizedArgs& a) { return Code::GROUPED ? a.group : padded(a); }
template <class Code> const char* tile_at(const QuantizedArgs& a, int64_t tile, int64_t input) {
    return (const char*)a.tiles + (tile * padded(a) + input) * STEP / Code::INPUTS;
}
inline F scale_at(const QuantizedArgs& a, int64_t at) { return load_half((const uint16_t*)a.scales + at * TILE); }

template <class Code, class T, int M, int N> void finish(const QuantizedArgs& a, F (&sum)[M][N], int64_t row, int64_t tile) {
    EACH(n, N) {
        int64_t column = (tile + n) * TILE, left = a.outputs - column;
        F bias = a.bias ? load((const T*)a.bias + column, left) : zero();
        if constexpr (Code::SCALED) {
            F scale = load((const float*)a.scales + column, left) * all(Code::SCALE);
            EACH(m, M) sum[m][n] = sum[m][n] * scale;
        }
        EACH(m, M) store((T*)a.out + (row + m) * a.outputs + column, sum[m][n] + bias, left);
    }
}

template <class Code, class Kind, class T, int M, int N> void few(const QuantizedArgs& a, Rows x, int64_t row, int64_t tile) {
    constexpr int64_t WORDS = Code::INPUTS / Kind::INPUTS;
    int64_t wide = padded(a), reach = span<Code>(a), stride = tile_at<Code>(a, 1, 0) - tile_at<Code>(a, 0, 0);
    F out[M][N];
    EACH(m, M) EACH(n, N) out[m][n] = zero();
    for (int64_t from = 0; from < wide; from += reach) {
        F sum[M][N];
        I shift[N];
        EACH(m, M) EACH(n, N) sum[m][n] = zero();
        EACH(n, N) shift[n] = Code::shift(a, (tile + n) * (wide / reach) + from / reach);
        const char* w = tile_at<Code>(a, tile, from);
        const char* at = x.at + from / Kind::INPUTS * Kind::X;
        for (int64_t k = 0; k < reach; k += Code::INPUTS, w += STEP, at += WORDS * Kind::X) {
            I step[N];
            EACH(n, N) step[n] = bytes(w + n * stride), _mm_prefetch(w + n * stride + AHEAD, _MM_HINT_T0);
            each_at<WORDS>([&](auto p) {
                typename Kind::Word b[N];
                EACH(n, N) b[n] = Code::template word<Kind, p.value>(step[n], shift[n]);
                multiply<Kind, M, N>(sum, at + p.value * Kind::X, x.stride, b);
            });
        }
        EACH(n, N) {
            F scale = Code::GROUPED ? scale_at(a, (tile + n) * (wide / reach) + from / reach) : zero();
            EACH(m, M) out[m][n] = Code::GROUPED ? fma(sum[m][n], scale, out[m][n]) : sum[m][n];
        }
    }
    finish<Code, T>(a, out, row, tile);
}

// Inputs [from, to) of N tiles as numbers, in tile order: N panels of CHUNK inputs.
template <class Code, class Kind, int N> void unpack(const QuantizedArgs& a, int64_t tile, int64_t from, int64_t to, char* panel) {
    constexpr int64_t WORDS = Code::INPUTS / Kind::INPUTS, TALL = CHUNK / Kind::INPUTS * STEP;
    int64_t wide = padded(a), reach = span<Code>(a);
    EACH(n, N) {
        char* out = panel + n * TALL;
        const char* w = tile_at<Code>(a, tile + n, from);
        for (int64_t k = from; k < to;) {
            I shift = Code::shift(a, (tile + n) * (wide / reach) + k / reach);
            int64_t end = least(to, (k / reach + 1) * reach);
            for (; k < end; k += Code::INPUTS, w += STEP, out += WORDS * STEP) {
                I step = bytes(w);
                each_at<WORDS>([&](auto p) { Kind::keep(out + p.value * STEP, Code::template word<Kind, p.value>(step, shift)); });
            }
        }
    }
}

// Adds the panel's inputs [from, to) to M rows' sums, which lie at `sums`, M * N words.
template <class Code, class Kind, int M, int N>
void add(const QuantizedArgs& a, Rows x, int64_t tile, int64_t from, int64_t to, const char* panel, float* sums) {
    constexpr int64_t TALL = CHUNK / Kind::INPUTS * STEP;
    int64_t wide = padded(a), reach = Code::GROUPED ? a.group : CHUNK;
    for (int64_t k = from; k < to; k += reach, panel += reach / Kind::INPUTS * STEP) {
        F sum[M][N];
        EACH(m, M) EACH(n, N) sum[m][n] = Code::GROUPED || k == 0 ? zero() : load(sums + (m * N + n) * LANES);
        const char* at = x.at + k / Kind::INPUTS * Kind::X;
        block<Kind>(sum, at, x.stride, panel, TALL, least(reach, to - k) / Kind::INPUTS);
        EACH(n, N) {
            F scale = Code::GROUPED ? scale_at(a, (tile + n) * (wide / reach) + k / reach) : zero();
            EACH(m, M) {
                float* at_sum = sums + (m * N + n) * LANES;
                if constexpr (Code::GROUPED) sum[m][n] = fma(sum[m][n], scale, k == 0 ? zero() : load(at_sum));
                store(at_sum, sum[m][n]);
            }
        }
    }
}

template <class Code, class T, int M, int N> void close(const QuantizedArgs& a, int64_t row, int64_t tile, const float* sums) {
    F sum[M][N];
    EACH(m, M) EACH(n, N) sum[m][n] = load(sums + (m * N + n) * LANES);
    finish<Code, T>(a, sum, row, tile);
}

template <class Code, class Kind, class T, int N> void many(const QuantizedArgs& a, Rows x, int64_t row, int64_t rows, int64_t tile) {
    char* panel = (char*)scratch(1, N * CHUNK / Kind::INPUTS * STEP + rows * N * STEP);
    float* sums = (float*)(panel + N * CHUNK / Kind::INPUTS * STEP);
    int64_t blocks = (rows + ROWS - 1) / ROWS, wide = padded(a);
    auto first = [&](int64_t b) { return rows * b / blocks; };
    for (int64_t from = 0; from < wide; from += CHUNK) {
        int64_t to = least(from + CHUNK, wide);
        unpack<Code, Kind, N>(a, tile, from, to, panel);
        for (int64_t b = 0; b < blocks; b++) {
            Rows some = {x.at + first(b) * x.stride, x.stride};
#define ADD(m) add<Code, Kind, m, N>(a, some, tile, from, to, panel, sums + first(b) * N * LANES)
            EACH_HEIGHT(first(b + 1) - first(b), ADD)
        }
    }
    for (int64_t b = 0; b < blocks; b++) {
#define CLOSE(m) close<Code, T, m, N>(a, row + first(b), tile, sums + first(b) * N * LANES)
        EACH_HEIGHT(first(b + 1) - first(b), CLOSE)
    }
}

template <class Code, class Kind, class T, int M> void few_tiles(const QuantizedArgs& a, Rows x, int64_t row, int64_t tile, int64_t tiles) {
    constexpr int N = !PAIRS ? (M == 1 ? 4 : M == 2 ? 2 : 1) : M == 1 ? 4 : M <= 3 ? 2 : 1;
    int64_t n = 0;
    for (; n + N <= tiles; n += N) few<Code, Kind, T, M, N>(a, x, row, tile + n);
    for (; n < tiles; n++) few<Code, Kind, T, M, 1>(a, x, row, tile + n);
}

template <class Code, class Kind, class T> void widened(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    for (int64_t end = row + rows; row < end; row += BAND) {
        rows = least(BAND, end - row);
        Rows x = prepare<Kind>((const T*)a.x + row * a.x_stride, a.x_stride, a.inputs, padded(a), rows);
        if (rows <= (PAIRS ? 1 : 3) * ROWS) {
            int64_t blocks = (rows + ROWS - 1) / ROWS;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t from = rows * b / blocks, height = rows * (b + 1) / blocks - from;
                Rows some = {x.at + from * x.stride, x.stride};
#define FEW(m) few_tiles<Code, Kind, T, m>(a, some, row + from, tile, tiles)
                EACH_HEIGHT(height, FEW)
            }
            continue;
        }
        int64_t n = 0;
        for (; n + COLUMNS <= tiles; n += COLUMNS) many<Code, Kind, T, COLUMNS>(a, x, row, rows, tile + n);
        for (; n < tiles; n++) many<Code, Kind, T, 1>(a, x, row, rows, tile + n);
    }
}

template <class T> void of_floats(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    switch (a.numbers) {
        case BFLOAT16: return widened<Bfloat16, Float, T>(a, row, rows, tile, tiles);
        case FLOAT16: return widened<Float16, Float, T>(a, row, rows, tile, tiles);
        case INT8: return widened<Eight, Float, T>(a, row, rows, tile, tiles);
        default: widened<Four, Float, T>(a, row, rows, tile, tiles);
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(widened, TUILI_ISA)(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    if (a.dtype == FLOAT32) return of_floats<float>(a, row, rows, tile, tiles);
#ifdef __AVX512F__
    if (a.numbers == INT8) return widened<Eight, Half, uint16_t>(a, row, rows, tile, tiles);
    a.zeros ? widened<FourPairs<true>, Half, uint16_t>(a, row, rows, tile, tiles)
            : widened<FourPairs<false>, Half, uint16_t>(a, row, rows, tile, tiles);
#else
    of_floats<uint16_t>(a, row, rows, tile, tiles);
#endif
}
