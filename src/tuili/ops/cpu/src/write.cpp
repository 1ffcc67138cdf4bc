// Keys and values into the paged cache, in the layouts of ops/kvcache.py, as they are or as int8 with a step per head.
#include "kernels.h"
#include "simd.h"

namespace {

// One token of one head, given as `dim` plain values of type E, at `slot`; W is a word of as many of them as lie together.
template <class W, class E> struct Slot {
    static constexpr int64_t PAIR = sizeof(W) / sizeof(E);
    const WriteArgs& a;
    int64_t block, at;
    Slot(const WriteArgs& args, int64_t token, int64_t head) : a(args) {
        block = a.slots[token] / a.block_size * a.heads + head, at = a.slots[token] % a.block_size;
    }
    void key(const E* x) const {
        int64_t words = (a.dim + PAIR - 1) / PAIR;
        W* out = (W*)a.k_cache + block * words * a.block_size + at;
        for (int64_t w = 0; w < words; w++) {
            W word = 0;
            memcpy(&word, x + w * PAIR, least(PAIR, a.dim - w * PAIR) * sizeof(E));
            out[w * a.block_size] = word;
        }
    }
    void value(const E* x) const {
        W* out = (W*)a.v_cache + (block * ((a.block_size + PAIR - 1) / PAIR) + at / PAIR) * a.dim;
        const int shift = (int)(at % PAIR * sizeof(E) * 8);
        const W others = (W) ~((W)(E)~(E)0 << shift);
        for (int64_t d = 0; d < a.dim; d++) out[d] = (W)((out[d] & others) | ((W)x[d] << shift));
    }
    int64_t scale() const { return block * a.block_size + at; }
};

template <class W, class E> void write(const WriteArgs& a, int64_t head) {
    for (int64_t i = 0; i < a.count; i++) {
        Slot<W, E> slot(a, i, head);
        slot.key((const E*)a.k + i * a.k_stride + head * a.dim);
        slot.value((const E*)a.v + i * a.v_stride + head * a.dim);
    }
}

// x in steps of its largest value's 127th: codes to nearest; returns the step.
template <class T> float round_to_int8(const T* x, int64_t dim, int8_t* codes) {
    F highest = zero(), poison = zero();
    for (int64_t d = 0; d < dim; d += LANES) {
        F v = load(x + d, dim - d);
        highest = max(highest, max(v, zero() - v)), poison = fma(v, zero(), poison);
    }
    float step = top(highest) / 127.0f;
    F by = all(step > 1.17549435e-38f ? step : 1.17549435e-38f);
    for (int64_t d = 0; d < dim; d += LANES) {
        alignas(64) float t[LANES];
        store(t, max(all(-127.0f), min(all(127.0f), round(load(x + d, dim - d) / by))));
        for (int64_t i = 0; i < least(LANES, dim - d); i++) codes[d + i] = (int8_t)t[i];
    }
    return step + sum(poison);  // not-a-number stays
}

template <class T> void write_int8(const WriteArgs& a, int64_t head) {
    int8_t* codes = (int8_t*)scratch(1, a.dim);
    for (int64_t i = 0; i < a.count; i++) {
        Slot<uint16_t, uint8_t> slot(a, i, head);
        a.k_scales[slot.scale()] = round_to_int8((const T*)a.k + i * a.k_stride + head * a.dim, a.dim, codes);
        slot.key((const uint8_t*)codes);
        a.v_scales[slot.scale()] = round_to_int8((const T*)a.v + i * a.v_stride + head * a.dim, a.dim, codes);
        slot.value((const uint8_t*)codes);
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(write_kv, TUILI_ISA)(const WriteArgs& a, int64_t head, int64_t heads) {
    for (int64_t h = head; h < head + heads; h++)
        if (a.k_scales)
            a.dtype == 0 ? write_int8<float>(a, h) : write_int8<uint16_t>(a, h);
        else
            a.dtype == 0 ? write<uint32_t, uint32_t>(a, h) : write<uint32_t, uint16_t>(a, h);
}
