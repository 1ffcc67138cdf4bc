// Norms, rotary embedding, gated activations and what else is elementwise: one row at a time, in float32, rounded once.
#include "kernels.h"
#include "simd.h"

namespace {

template <class T> void rms_norm(const NormArgs& a, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; r++) {
        const T* x = (const T*)a.x + r / a.heads * a.x_stride + r % a.heads * a.dim;
        const T* weight = (const T*)a.weight;
        T* out = (T*)a.out + r * a.dim;
        F squares = zero();
        for (int64_t i = 0; i < a.dim; i += LANES) {
            F v = load(x + i, a.dim - i);
            squares = fma(v, v, squares);
        }
        F factor = all(1.0f / sqrtf(sum(squares) / (float)a.dim + a.eps));
        for (int64_t i = 0; i < a.dim; i += LANES)
            store(out + i, load(x + i, a.dim - i) * factor * (load(weight + i, a.dim - i) + all(a.offset)), a.dim - i);
    }
}

template <class T> void rotate(const RotateArgs& a, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; r++) {
        const float *cos = a.cos + r * a.half, *sin = a.sin + r * a.half;
        for (int64_t h = 0; h < a.heads; h++) {
            const T* x = (const T*)a.x + r * a.x_stride + h * a.dim;
            T* out = (T*)a.out + (r * a.heads + h) * a.dim;
            for (int64_t i = 0; i < a.half; i += LANES) {
                int64_t n = a.half - i;
                F c = load(cos + i, n), s = load(sin + i, n), p = load(x + i, n), q = load(x + a.half + i, n);
                store(out + i, p * c - q * s, n);
                store(out + a.half + i, q * c + p * s, n);
            }
            memcpy(out + 2 * a.half, x + 2 * a.half, (a.dim - 2 * a.half) * sizeof(T));
        }
    }
}

F silu(F x) { return x / (all(1.0f) + exp(zero() - x)); }

F gelu_tanh(F x) {
    F inner = all(0.7978845608f) * (x + all(0.044715f) * x * x * x);
    return all(0.5f) * x * (all(1.0f) + tanh(inner));
}

template <class T> F rounded(F x) {  // as the composition of two ops would see it
    if constexpr (sizeof(T) == 4) return x;
    alignas(64) T t[LANES];
    store(t, x);
    return load(t);
}

template <class T, F (*activation)(F)> void gated(const GatedArgs& a, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; r++) {
        const T* gate = (const T*)a.gate_up + r * 2 * a.dim;
        const T* up = gate + a.dim;
        T* out = (T*)a.out + r * a.dim;
        for (int64_t i = 0; i < a.dim; i += LANES) {
            int64_t n = a.dim - i;
            store(out + i, rounded<T>(activation(load(gate + i, n))) * load(up + i, n), n);
        }
    }
}

template <class T> void add(const AddArgs& a, int64_t first, int64_t count) {
    const T *x = (const T*)a.x, *y = (const T*)a.y;
    T* out = (T*)a.out;
    int64_t end = first + count;
    for (int64_t i = first; i < end; i += LANES) store(out + i, load(x + i, end - i) + load(y + i, end - i), end - i);
}

template <class T> void scale(const ScaleArgs& a, int64_t first, int64_t count) {
    const T* x = (const T*)a.x;
    T* out = (T*)a.out;
    int64_t end = first + count;
    F factor = rounded<T>(all(a.factor));
    for (int64_t i = first; i < end; i += LANES) store(out + i, load(x + i, end - i) * factor, end - i);
}

template <class T> void softcap(const SoftcapArgs& a, int64_t first, int64_t count) {
    const T* x = (const T*)a.x;
    T* out = (T*)a.out;
    int64_t end = first + count;
    for (int64_t i = first; i < end; i += LANES)
        store(out + i, all(a.cap) * tanh(load(x + i, end - i) / all(a.cap)), end - i);
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(rms_norm, TUILI_ISA)(const NormArgs& a, int64_t row, int64_t rows) {
    a.dtype == 0 ? rms_norm<float>(a, row, rows) : rms_norm<uint16_t>(a, row, rows);
}
void JOIN(rotate, TUILI_ISA)(const RotateArgs& a, int64_t row, int64_t rows) {
    a.dtype == 0 ? rotate<float>(a, row, rows) : rotate<uint16_t>(a, row, rows);
}
void JOIN(gated, TUILI_ISA)(const GatedArgs& a, int64_t row, int64_t rows) {
    if (a.dtype == 0)
        a.activation == 0 ? gated<float, silu>(a, row, rows) : gated<float, gelu_tanh>(a, row, rows);
    else
        a.activation == 0 ? gated<uint16_t, silu>(a, row, rows) : gated<uint16_t, gelu_tanh>(a, row, rows);
}
void JOIN(add, TUILI_ISA)(const AddArgs& a, int64_t first, int64_t count) {
    a.dtype == 0 ? add<float>(a, first, count) : add<uint16_t>(a, first, count);
}
void JOIN(scale, TUILI_ISA)(const ScaleArgs& a, int64_t first, int64_t count) {
    a.dtype == 0 ? scale<float>(a, first, count) : scale<uint16_t>(a, first, count);
}
void JOIN(softcap, TUILI_ISA)(const SoftcapArgs& a, int64_t first, int64_t count) {
    a.dtype == 0 ? softcap<float>(a, first, count) : softcap<uint16_t>(a, first, count);
}
