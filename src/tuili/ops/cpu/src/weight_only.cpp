// Products of float activations with integer weights of 8 or 4 bits. Codes become exact numbers (bfloat16 holds them
// all), are multiplied and summed in float32, and the sums are scaled: per output (8 bits), per group of inputs, groups
// in order (4 bits). Few rows unpack into registers, many unpack a panel that all rows share: the same chain.
#include "integers.h"
#include "linear.h"

namespace {

constexpr int64_t CHUNK = 512;  // inputs unpacked at once: a multiple of every group
constexpr int64_t BAND = 192;   // rows whose sums wait in memory between chunks

// How a step of 64 bytes of codes becomes numbers. `shift` is made once per group and tile.
struct Eight {
    static constexpr int64_t INPUTS = 4;
    static constexpr bool GROUPED = false;
    static constexpr float SCALE = 1.0f / (1 << 24);  // codes are made in the upper byte
    template <int J> static F number(I w) { return floats(both(up<24 - 8 * J>(w), four((int)0xff000000u))); }
    static I shift(const QuantizedArgs&, int64_t) { return four((int)0x80808080u); }
    template <class Kind> static void expand(I w, I shift, typename Kind::Word (&out)[4 / Kind::INPUTS]) {
        w = differ(w, shift);  // code + 128 to two's complement
        F f[4] = {number<0>(w), number<1>(w), number<2>(w), number<3>(w)};
        EACH(k, (4 / Kind::INPUTS)) out[k] = Kind::join(f[k * Kind::INPUTS], f[k * Kind::INPUTS + Kind::INPUTS - 1]);
    }
};

struct Four {
    static constexpr int64_t INPUTS = 8;
    static constexpr bool GROUPED = true;
    template <int J> static F number(I w, I zero) { return floats(minus(both(down<J>(w), four(15)), zero)); }
    static I zero(const QuantizedArgs& a, int64_t at) {
        return a.zeros ? widen_bytes((const uint8_t*)a.zeros + at * TILE) : four(8);
    }
    static I shift(const QuantizedArgs& a, int64_t at) { return zero(a, at); }
    template <class Kind> static void expand(I w, I zero, typename Kind::Word (&out)[8 / Kind::INPUTS]) {
        F f[8] = {number<0>(w, zero), number<8>(w, zero),  number<16>(w, zero), number<24>(w, zero),
                  number<4>(w, zero), number<12>(w, zero), number<20>(w, zero), number<28>(w, zero)};
        EACH(k, (8 / Kind::INPUTS)) out[k] = Kind::join(f[k * Kind::INPUTS], f[k * Kind::INPUTS + Kind::INPUTS - 1]);
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
    template <class Kind> static void expand(I w, I shift, __m512bh (&out)[4]) {
        static constexpr Table table = make_table<ZEROS>();
        const __m512i numbers = _mm512_loadu_si512(table.of), mask = _mm512_set1_epi16(15);
        const __m512i first = _mm512_set4_epi32(0x0d0d0c0c, 0x09090808, 0x05050404, 0x01010000);
        const __m512i second = _mm512_set4_epi32(0x0f0f0e0e, 0x0b0b0a0a, 0x07070606, 0x03030202);
        EACH(k, 4) {
            __m512i at = _mm512_shuffle_epi8(w.v, k % 2 ? second : first);
            if (k / 2) at = _mm512_srli_epi16(at, 4);
            if (ZEROS) at = _mm512_add_epi16(_mm512_and_si512(at, mask), shift.v);
            out[k] = (__m512bh)_mm512_permutexvar_epi16(at, numbers);
        }
    }
};
#else
template <bool ZEROS> struct FourPairs : Four {};
#endif

template <class Code> int64_t span(const QuantizedArgs& a) { return Code::GROUPED ? a.group : padded(a); }
template <class Code> const char* tile_at(const QuantizedArgs& a, int64_t tile, int64_t input) {
    return (const char*)a.tiles + (tile * padded(a) + input) * (TILE / (Code::INPUTS / 4));
}
inline F scale_at(const QuantizedArgs& a, int64_t at) { return load_half((const uint16_t*)a.scales + at * TILE); }

template <class Code, class Kind, int M, int N> void finish(const QuantizedArgs& a, F (&sum)[M][N], int64_t row, int64_t tile) {
    using T = typename Kind::Storage;
    EACH(n, N) {
        int64_t column = (tile + n) * TILE, left = a.outputs - column;
        F bias = a.bias ? load((const T*)a.bias + column, left) : zero();
        if constexpr (!Code::GROUPED) {
            F scale = load((const float*)a.scales + column, left) * all(Code::SCALE);
            EACH(m, M) sum[m][n] = sum[m][n] * scale;
        }
        EACH(m, M) store((T*)a.out + (row + m) * a.outputs + column, sum[m][n] + bias, left);
    }
}

template <class Code, class Kind, int M, int N> void few(const QuantizedArgs& a, Rows x, int64_t row, int64_t tile) {
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
            typename Kind::Word part[N][WORDS];
            EACH(n, N) Code::template expand<Kind>(bytes(w + n * stride), shift[n], part[n]);
            EACH(p, WORDS) {
                typename Kind::Word b[N];
                EACH(n, N) b[n] = part[n][p];
                multiply<Kind, M, N>(sum, at + p * Kind::X, x.stride, b);
            }
        }
        EACH(n, N) {
            F scale = Code::GROUPED ? scale_at(a, (tile + n) * (wide / reach) + from / reach) : zero();
            EACH(m, M) out[m][n] = Code::GROUPED ? fma(sum[m][n], scale, out[m][n]) : sum[m][n];
        }
    }
    finish<Code, Kind>(a, out, row, tile);
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
                typename Kind::Word part[WORDS];
                Code::template expand<Kind>(bytes(w), shift, part);
                EACH(p, WORDS) Kind::keep(out + p * STEP, part[p]);
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

template <class Code, class Kind, int M, int N> void close(const QuantizedArgs& a, int64_t row, int64_t tile, const float* sums) {
    F sum[M][N];
    EACH(m, M) EACH(n, N) sum[m][n] = load(sums + (m * N + n) * LANES);
    finish<Code, Kind>(a, sum, row, tile);
}

template <class Code, class Kind, int N> void many(const QuantizedArgs& a, Rows x, int64_t row, int64_t rows, int64_t tile) {
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
#define CLOSE(m) close<Code, Kind, m, N>(a, row + first(b), tile, sums + first(b) * N * LANES)
        EACH_HEIGHT(first(b + 1) - first(b), CLOSE)
    }
}

template <class Code, class Kind, int M> void few_tiles(const QuantizedArgs& a, Rows x, int64_t row, int64_t tile, int64_t tiles) {
    constexpr int N = !PAIRS ? 1 : M == 1 ? 4 : M <= 3 ? 2 : 1;
    int64_t n = 0;
    for (; n + N <= tiles; n += N) few<Code, Kind, M, N>(a, x, row, tile + n);
    for (; n < tiles; n++) few<Code, Kind, M, 1>(a, x, row, tile + n);
}

template <class Code, class Kind> void weight_only(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    using T = typename Kind::Storage;
    for (int64_t end = row + rows; row < end; row += BAND) {
        rows = least(BAND, end - row);
        Rows x = prepare<Kind>((const T*)a.x + row * a.x_stride, a.x_stride, a.inputs, padded(a), rows);
        if (rows <= ROWS) {
#define FEW(m) few_tiles<Code, Kind, m>(a, x, row, tile, tiles)
            EACH_HEIGHT(rows, FEW)
            continue;
        }
        int64_t n = 0;
        for (; n + COLUMNS <= tiles; n += COLUMNS) many<Code, Kind, COLUMNS>(a, x, row, rows, tile + n);
        for (; n < tiles; n++) many<Code, Kind, 1>(a, x, row, rows, tile + n);
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(weight_only, TUILI_ISA)(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    if (a.bits == 8)
        a.dtype == 0 ? weight_only<Eight, Float>(a, row, rows, tile, tiles) : weight_only<Eight, Half>(a, row, rows, tile, tiles);
    else if (a.dtype == 0)
        weight_only<Four, Float>(a, row, rows, tile, tiles);
    else
        a.zeros ? weight_only<FourPairs<true>, Half>(a, row, rows, tile, tiles)
                : weight_only<FourPairs<false>, Half>(a, row, rows, tile, tiles);
}
