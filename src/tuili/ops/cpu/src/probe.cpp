// What the machine can do: loops that only read memory, and loops that only multiply, in registers. The shares that
// benchmarks report are of these.
#include "kernels.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

namespace {

constexpr int CHAINS = 12;  // products in flight: more than latency times issue width

#ifdef __AVX512F__
using Word = __m512i;
inline Word word(const char* p) { return _mm512_loadu_si512(p); }
inline Word join(Word a, Word b) { return _mm512_xor_si512(a, b); }
inline Word empty() { return _mm512_setzero_si512(); }
#else
using Word = __m256i;
inline Word word(const char* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Word join(Word a, Word b) { return _mm256_xor_si256(a, b); }
inline Word empty() { return _mm256_setzero_si256(); }
#endif
inline void use(Word& w) { asm volatile("" : "+v"(w)); }

struct FloatProduct {
    static constexpr int64_t OPS = 2 * sizeof(Word) / 4;
    static Word add(Word sum, Word a, Word b) {
#ifdef __AVX512F__
        return (Word)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
        return (Word)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#endif
    }
};

// Without pair instructions, bfloat16 is multiplied as float32.
struct HalfProduct {
#ifdef __AVX512F__
    static constexpr int64_t OPS = 2 * sizeof(Word) / 2;
    static Word add(Word sum, Word a, Word b) { return (Word)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
    static constexpr int64_t OPS = FloatProduct::OPS;
    static Word add(Word sum, Word a, Word b) { return FloatProduct::add(sum, a, b); }
#endif
};

struct ByteProduct {
    static constexpr int64_t OPS = 2 * sizeof(Word);
    static Word add(Word sum, Word a, Word b) {
#ifdef __AVX512F__
        return _mm512_dpbusd_epi32(sum, a, b);
#elif defined __AVXVNNI__
        return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
    }
};

// Bytes times numbers of 4 bits: pairs of products, and eight sums of these, stay within 16 bits. What widens those is
// not counted.
struct NibbleProduct {
    static constexpr int64_t OPS = ByteProduct::OPS;
    static Word add(Word sum, Word a, Word b) {
#if defined __AVX512F__ || defined __AVXVNNI__
        return ByteProduct::add(sum, a, b);
#else
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
#endif
    }
};

template <class Product> int64_t multiply(int64_t rounds) {
    Word sum[CHAINS], a = empty(), b = empty();
    use(a), use(b);
    EACH(c, CHAINS) sum[c] = empty();
    for (int64_t r = 0; r < rounds; r++) {
        EACH(c, CHAINS) {
            use(a);
            sum[c] = Product::add(sum[c], a, b);
            use(sum[c]);
        }
    }
    return rounds * CHAINS * Product::OPS;
}

}  // namespace

// In order of addresses, each line once: the hardware then fetches ahead (measured: loads that the compiler mixes, or
// prefetches beside them, read a third less).
void JOIN(probe_read, TUILI_ISA)(const char* at, int64_t bytes) {
    Word sum[4] = {empty(), empty(), empty(), empty()};
    constexpr int SIZE = sizeof(Word);
    for (int64_t i = 0; i + 4 * SIZE <= bytes; i += 4 * SIZE) {
        EACH(c, 4) {
            sum[c] = join(sum[c], word(at + i + c * SIZE));
            use(sum[c]);
        }
    }
}

int64_t JOIN(probe_multiply, TUILI_ISA)(int64_t kind, int64_t rounds) {
    switch (kind) {
        case 0: return multiply<FloatProduct>(rounds);
        case 1: return multiply<HalfProduct>(rounds);
        case 2: return multiply<ByteProduct>(rounds);
        default: return multiply<NibbleProduct>(rounds);
    }
}
