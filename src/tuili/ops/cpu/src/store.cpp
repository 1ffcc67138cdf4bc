// From rows of floats to weight tiles, rounded to nearest on the way for integers: one pass at load. The arithmetic is
// that of ops/rounding.py, operation by operation, so that the codes are the same to the bit.
#include "kernels.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

namespace {

constexpr int64_t STEPS = 64;  // steps of a tile that are written together: 4 KB

#ifdef __AVX512F__
inline uint16_t half_of(float x) { return (uint16_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(_mm512_cvtps_ph(_mm512_set1_ps(x), 0))); }
inline float float_of(uint16_t h) { return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16((short)h))); }
// Whole numbers 0 to 255 as bytes.
inline void store_codes(uint8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x.v))); }
#else
inline uint16_t half_of(float x) { return (uint16_t)_mm_cvtsi128_si32(_mm256_cvtps_ph(_mm256_set1_ps(x), 0)); }
inline float float_of(uint16_t h) { return _mm256_cvtss_f32(_mm256_cvtph_ps(_mm_set1_epi16((short)h))); }
inline void store_codes(uint8_t* p, F x) {
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
#endif

// Word by word: a float, or a pair of bfloat16.
template <int64_t PER_WORD> void floats(const StoreArgs& a, int64_t tile) {
    constexpr int64_t size = 4 / PER_WORD;
    int64_t steps = (a.inputs + PER_WORD - 1) / PER_WORD, whole = a.inputs / PER_WORD;
    uint32_t* out = (uint32_t*)a.tiles + tile * steps * TILE;
    for (int64_t begin = 0; begin < steps; begin += STEPS) {
        int64_t end = least(steps, begin + STEPS);
        for (int64_t lane = 0; lane < TILE; lane++) {
            int64_t row = tile * TILE + lane;
            const char* x = (const char*)a.matrix + row * a.matrix_stride * size;
            for (int64_t s = begin; s < end; s++) {
                uint32_t word = 0;
                if (row < a.rows) memcpy(&word, x + s * 4, s < whole ? 4 : size);
                out[s * TILE + lane] = word;
            }
        }
    }
}

// Codes -127..127, + 128; one scale per row.
template <class T> void eight(const StoreArgs& a, int64_t tile) {
    int64_t steps = (a.inputs + 3) / 4;
    uint32_t* out = (uint32_t*)a.tiles + tile * steps * TILE;
    for (int64_t lane = 0; lane < TILE; lane++) {
        int64_t row = tile * TILE + lane;
        if (row >= a.rows) {
            for (int64_t s = 0; s < steps; s++) out[s * TILE + lane] = 0x80808080u;
            continue;
        }
        const T* x = (const T*)a.matrix + row * a.matrix_stride;
        F largest = zero();
        for (int64_t k = 0; k < a.inputs; k += LANES) {
            F v = load(x + k, least(LANES, a.inputs - k));
            largest = max(largest, max(v, zero() - v));
        }
        float scale = top(largest) / 127;
        if (scale == 0) scale = 1;
        ((float*)a.scales)[row] = scale;
        for (int64_t k = 0; k < a.inputs; k += LANES) {
            uint32_t words[4];
            store_codes((uint8_t*)words, round(load(x + k, least(LANES, a.inputs - k)) / all(scale)) + all(128));
            for (int64_t j = 0; j < least(4, steps - k / 4); j++) out[(k / 4 + j) * TILE + lane] = words[j];
        }
    }
}

constexpr float CLIPS[] = {1.0f, 0.95f, 0.9f, 0.85f};  // as in ops/rounding.py

inline uint16_t scale_of(float x) {
    uint16_t half = half_of(x);
    return half & 0x7fff ? half : 0x3c00;  // 0 becomes 1
}

// Squared error of a group in symmetric steps of `step`.
template <class T> float error_of(const T* x, int64_t inputs, float step) {
    F inverse = all(1 / step), total = zero();
    for (int64_t k = 0; k < inputs; k += LANES) {
        F v = load(x + k, least(LANES, inputs - k));
        F off = v - max(all(-8), min(all(7), round(v * inverse))) * all(step);
        total = total + off * off;
    }
    return sum(total);
}

template <class T> uint16_t symmetric_scale(const T* x, int64_t inputs, float extreme) {
    float least_error = INFINITY;
    uint16_t best = 0;
    for (float clip : CLIPS) {
        uint16_t scale = scale_of(extreme / -8 * clip);
        float error = error_of(x, inputs, float_of(scale));
        if (error < least_error) {
            least_error = error;
            best = scale;
        }
    }
    return best;
}

// Codes 0..15 of one group of a row, and its scale and zero point.
template <class T> void group_of_four(const StoreArgs& a, const T* x, int64_t inputs, uint32_t* out, uint16_t* scale, uint8_t* zero_point) {
    F high = zero(), below = zero();  // below: the magnitude of the low end
    for (int64_t k = 0; k < inputs; k += LANES) {
        F v = load(x + k, least(LANES, inputs - k));
        high = max(high, v);
        below = max(below, zero() - v);
    }
    float up = top(high), down = top(below);
    *scale = a.zeros ? scale_of((up + down) / 15) : symmetric_scale(x, inputs, up < down ? -down : up);
    F divisor = all(float_of(*scale)), offset = all(8);
    F inverse = all(1 / low(divisor));
    if (a.zeros) {
        offset = min(all(15), round(all(down) / divisor));
        *zero_point = (uint8_t)low(offset);
    }
    for (int64_t k = 0; k < a.group; k += LANES) {
        uint8_t codes[16] = {};
        int64_t n = least(LANES, inputs - k);
        if (n > 0) {
            F exact = load(x + k, n);
            store_codes(codes, max(zero(), min(all(15), round(a.zeros ? exact / divisor : exact * inverse) + offset)));
            for (int64_t i = n; i < 16; i++) codes[i] = 0;
        }
        uint32_t w[4];
        memcpy(w, codes, 16);
        out[k / 8 * TILE] = w[0] | w[1] << 4;
        out[(k / 8 + 1) * TILE] = w[2] | w[3] << 4;
    }
}

template <class T> void four(const StoreArgs& a, int64_t tile) {
    int64_t groups = (a.inputs + a.group - 1) / a.group, steps = groups * a.group / 8;
    uint32_t* out = (uint32_t*)a.tiles + tile * steps * TILE;
    uint16_t* scales = (uint16_t*)a.scales + tile * groups * TILE;
    uint8_t* zeros = a.zeros ? (uint8_t*)a.zeros + tile * groups * TILE : nullptr;
    for (int64_t lane = 0; lane < TILE; lane++) {
        int64_t row = tile * TILE + lane;
        for (int64_t g = 0; g < groups && row < a.rows; g++) {
            const T* x = (const T*)a.matrix + row * a.matrix_stride + g * a.group;
            int64_t at = g * TILE + lane;
            group_of_four(a, x, least(a.group, a.inputs - g * a.group), out + g * (a.group / 8) * TILE + lane,
                          scales + at, zeros ? zeros + at : nullptr);
        }
        if (row < a.rows) continue;
        for (int64_t s = 0; s < steps; s++) out[s * TILE + lane] = 0;
        for (int64_t g = 0; g < groups; g++) {
            scales[g * TILE + lane] = 0;
            if (zeros) zeros[g * TILE + lane] = 0;
        }
    }
}

// Halves, not side by side: inputs are padded to pairs.
void float16s(const StoreArgs& a, int64_t tile) {
    int64_t steps = (a.inputs + 1) / 2 * 2;
    uint16_t* out = (uint16_t*)a.tiles + tile * steps * TILE;
    for (int64_t lane = 0; lane < TILE; lane++) {
        int64_t row = tile * TILE + lane;
        const uint16_t* x = (const uint16_t*)a.matrix + row * a.matrix_stride;
        for (int64_t s = 0; s < steps; s++) out[s * TILE + lane] = row < a.rows && s < a.inputs ? x[s] : 0;
    }
}

// Row `id` of a weight, as floats.
void float_row(const LookupArgs& a, int64_t id, float* out) {
    int64_t even = (a.inputs + 1) / 2 * 2, lane = id % TILE;
    const uint16_t* halves = (const uint16_t*)a.tiles + id / TILE * even * TILE;
    const float* floats = (const float*)a.tiles + id / TILE * a.inputs * TILE + lane;
    for (int64_t k = 0; k < a.inputs; k++)
        out[k] = a.numbers == FLOAT32    ? floats[k * TILE]
                 : a.numbers == BFLOAT16 ? single(halves + k / 2 * 2 * TILE + lane * 2 + k % 2)
                                         : float_of(halves[k * TILE + lane]);
}

void eight_row(const LookupArgs& a, int64_t id, float* out) {
    const uint8_t* codes = (const uint8_t*)a.tiles + (id / TILE * ((a.inputs + 3) / 4) * TILE + id % TILE) * 4;
    float scale = ((const float*)a.scales)[id];
    for (int64_t k = 0; k < a.inputs; k++) out[k] = (float)(codes[k / 4 * TILE * 4 + k % 4] - 128) * scale;
}

void four_row(const LookupArgs& a, int64_t id, float* out) {
    int64_t groups = (a.inputs + a.group - 1) / a.group, steps = groups * a.group / 8, at = id / TILE * groups * TILE + id % TILE;
    const uint8_t* codes = (const uint8_t*)a.tiles + (id / TILE * steps * TILE + id % TILE) * 4;
    for (int64_t g = 0; g < groups; g++, at += TILE) {
        float scale = float_of(((const uint16_t*)a.scales)[at]);
        int zero_point = a.zeros ? ((const uint8_t*)a.zeros)[at] : 8;
        for (int64_t k = g * a.group; k < least(a.inputs, (g + 1) * a.group); k++) {
            int code = codes[k / 8 * TILE * 4 + k % 4] >> (k % 8 < 4 ? 0 : 4) & 15;
            out[k] = (float)(code - zero_point) * scale;
        }
    }
}

}  // namespace

void JOIN(lookup, TUILI_ISA)(const LookupArgs& a, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i++) {
        float* wide = a.dtype == 0 ? (float*)a.out + i * a.inputs : (float*)scratch(5, a.inputs * 4);
        a.numbers == INT8 ? eight_row(a, a.ids[i], wide) : a.numbers == INT4 ? four_row(a, a.ids[i], wide) : float_row(a, a.ids[i], wide);
        if (a.dtype == 0) continue;
        uint16_t* out = (uint16_t*)a.out + i * a.inputs;
        for (int64_t k = 0; k < a.inputs; k += LANES) store(out + k, load(wide + k, least(LANES, a.inputs - k)), least(LANES, a.inputs - k));
    }
}

void JOIN(store, TUILI_ISA)(const StoreArgs& a, int64_t tile) {
    if (a.numbers == FLOAT16) return float16s(a, tile);
    if (a.numbers < INT4) return a.numbers == FLOAT32 ? floats<1>(a, tile) : floats<2>(a, tile);
    if (a.numbers == INT8) return a.dtype == 0 ? eight<float>(a, tile) : eight<uint16_t>(a, tile);
    a.dtype == 0 ? four<float>(a, tile) : four<uint16_t>(a, tile);
}
