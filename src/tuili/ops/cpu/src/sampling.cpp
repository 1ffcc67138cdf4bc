// Choosing tokens: the best of a row of logits, draws, and log-probabilities; no copy of the row, no sorting of it. A row
// is one thread's work from end to end, so that its result depends on nothing else.
//
// One pass finds the best value and keeps the best of every sixteenth id of each span. The k-th best of those is a bound:
// at least k ids reach it. So what a cut looks at closely are the few spans that reach the bound.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t SPAN = 512;
constexpr float COLDEST = 1.17549435e-38f;  // colder ones have no inverse, and draw the best

#ifdef __AVX512F__
inline uint32_t at_most(F x, F y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_LE_OQ); }
struct Sum {  // of sixteen chains in float64
    __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
    void add(F x) {
        a = _mm512_add_pd(a, _mm512_cvtps_pd(half(x)));
        b = _mm512_add_pd(b, _mm512_cvtps_pd(fold(x, 1)));
    }
    double value() const { return _mm512_reduce_add_pd(_mm512_add_pd(a, b)); }
};
#else
inline uint32_t at_most(F x, F y) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ)) |
           _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ)) << 8;
}
struct Sum {
    __m256d v[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
    void add(F x) {
        v[0] = _mm256_add_pd(v[0], _mm256_cvtps_pd(_mm256_castps256_ps128(x.a)));
        v[1] = _mm256_add_pd(v[1], _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)));
        v[2] = _mm256_add_pd(v[2], _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)));
        v[3] = _mm256_add_pd(v[3], _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1)));
    }
    double value() const {
        alignas(32) double t[4];
        _mm256_store_pd(t, _mm256_add_pd(_mm256_add_pd(v[0], v[2]), _mm256_add_pd(v[1], v[3])));
        return (t[0] + t[2]) + (t[1] + t[3]);
    }
};
#endif

template <class T> inline F read(const T* x, int64_t n) {
    return n >= LANES ? load(x) : keep(load(x, n), 0, n, all(-INFINITY));
}

struct Peak {
    float value;
    int64_t id;   // the first that has it
    bool finite;  // no infinity above, no not-a-number, and not everything ruled out
};

// bests[16 per span]: the best of the span's ids in this lane.
template <class T> Peak peak(const T* x, int64_t vocab, float* bests) {
    F bad = zero(), best = all(-INFINITY);
    for (int64_t i = 0; i < vocab; i += SPAN) {
        F high = all(-INFINITY);
        for (int64_t j = i; j < least(vocab, i + SPAN); j += LANES) {
            F v = read(x + j, vocab - j);
            high = max(v, high);
            bad = where_less(v, all(INFINITY), bad, all(1.0f));  // also where v is not a number
        }
        store(bests + i / SPAN * LANES, high);
        best = max(high, best);
    }
    Peak p = {top(best) + 0.0f, 0, false};  // never minus zero: a distance from it would not be positive
    p.finite = sum(bad) == 0 && p.value > -INFINITY;
    if (!p.finite) return p;
    int64_t i = 0;
    while (!at_most(all(p.value), load(bests + i / SPAN * LANES))) i += SPAN;
    for (;; i += LANES) {
        uint32_t here = at_most(all(p.value), read(x + i, vocab - i));
        if (here) return p.id = i + __builtin_ctz(here), p;
    }
}

// Scores as distances from the best, in units of the temperature: 0 is the best, infinity is ruled out. Being positive,
// they are ordered as their bits are. The weight of an id is e^-distance.
template <class T> struct Distances {
    const T* x;
    int64_t vocab;
    F best, coldness;  // one over the temperature
    F at(int64_t i) const { return of(read(x + i, vocab - i)); }
    F of(F v) const { return (best - v) * coldness; }
};

inline F weight(F distance) { return exp(zero() - distance); }

constexpr uint32_t EVERYTHING = UINT32_MAX;

// The lowest key such that the weights (or numbers, where weight is null) of the keys up to it sum to `target` or more;
// EVERYTHING if all of them do not. Four rounds, each in 256 buckets of the range that the one before has left.
uint32_t cut(const uint32_t* key, const float* weight, int64_t n, double target) {
    constexpr uint32_t BUCKETS = 256;
    double before = 0;
    uint32_t low = 0;
    for (uint32_t shift = 24;; shift -= 8) {
        double mass[BUCKETS] = {};
        for (int64_t i = 0; i < n; i++) {
            uint32_t bucket = (key[i] - low) >> shift;
            if (bucket < BUCKETS) mass[bucket] += weight ? weight[i] : 1.0;
        }
        uint32_t bucket = 0, last = 0;
        for (; bucket < BUCKETS && before + mass[bucket] < target; bucket++) {
            if (mass[bucket] > 0) last = bucket;
            before += mass[bucket];
        }
        if (bucket == BUCKETS && shift == 24) return EVERYTHING;
        low += (bucket == BUCKETS ? last : bucket) << shift;  // by rounding, the parts can be less than their whole was
        if (shift == 0) return low;
    }
}

struct Candidates {  // by rising id
    uint32_t* key;
    float* weight;
    int32_t* id;
    int64_t count;
    explicit Candidates(int64_t vocab) : key((uint32_t*)scratch(2, vocab * 12)), count(0) {
        weight = (float*)(key + vocab);
        id = (int32_t*)(weight + vocab);
    }
    void add(F keys, uint32_t which, int64_t first) {
        alignas(64) float t[LANES];
        store(t, keys);
        for (; which; which &= which - 1, count++) {
            int lane = __builtin_ctz(which);
            memcpy(key + count, t + lane, 4);
            id[count] = static_cast<int32_t>(first + lane);
        }
    }
    void weigh() {
        for (int64_t i = 0; i < count; i += LANES)
            store(weight + i, exp(zero() - load((const float*)key + i, count - i)), count - i);
    }
    void drop_above(uint32_t limit) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            key[kept] = key[i], weight[kept] = weight[i], id[kept] = id[i];
            kept += key[i] <= limit;
        }
        count = kept;
    }
    double total() const {
        double sum = 0;
        for (int64_t i = 0; i < count; i++) sum += weight[i];
        return sum;
    }
};

inline uint32_t lanes(int64_t n) { return n >= LANES ? 0xffff : (1u << n) - 1; }

// The ids at most `limit` away; `nearest` are the distances of each span's bests.
template <class T> void gather(Candidates& c, const Distances<T>& d, const float* nearest, float limit) {
    for (int64_t i = 0; i < d.vocab; i += SPAN) {
        if (!at_most(load(nearest + i / SPAN * LANES), all(limit))) continue;
        for (int64_t j = i; j < least(d.vocab, i + SPAN); j += LANES) {
            F distance = d.at(j);
            c.add(distance, at_most(distance, all(limit)) & lanes(d.vocab - j), j);
        }
    }
}

// Weights of whole spans, and their sum in order.
template <class T> double weigh_spans(const Distances<T>& d, double* mass) {
    double total = 0;
    for (int64_t i = 0; i < d.vocab; i += SPAN) {
        Sum sum;
        for (int64_t j = i; j < least(d.vocab, i + SPAN); j += LANES) sum.add(weight(d.at(j)));
        total += mass[i / SPAN] = sum.value();
    }
    return total;
}

// The first id whose cumulative weight exceeds `target`: the span first, then the id in it. Ids without weight are never
// chosen, whatever the rounding.
template <class T> int64_t find(const Distances<T>& d, const double* mass, double target) {
    int64_t span = 0, id = 0;
    double before = 0;
    for (int64_t i = 0; i < d.vocab; i += SPAN) {
        double m = mass[i / SPAN];
        if (m > 0) span = i;
        if (before + m > target) break;
        before += m;
    }
    alignas(64) float w[LANES];
    for (int64_t i = span; i < least(d.vocab, span + SPAN); i += LANES) {
        store(w, weight(d.at(i)));
        for (int64_t lane = 0; lane < LANES; lane++) {
            if (w[lane] > 0) id = i + lane;
            before += w[lane];
            if (before > target) return id;
        }
    }
    return id;
}

int64_t find(const Candidates& c, double target) {
    double before = 0;
    int64_t id = c.id[0];
    for (int64_t i = 0; i < c.count && before <= target; i++) {
        if (c.weight[i] > 0) id = c.id[i];
        before += c.weight[i];
    }
    return id;
}

float distance_of(uint32_t key) {
    if (key == EVERYTHING) return INFINITY;
    float f;
    memcpy(&f, &key, 4);
    return f;
}

template <class T> int64_t draw_row(const DrawArgs& a, int64_t r, const T* x, float best, float* nearest) {
    const Distances<T> d = {x, a.vocab, all(best), all(1.0f / a.temperature[r])};
    int64_t spans = (a.vocab + SPAN - 1) / SPAN, groups = spans * LANES, k = a.top_k[r];
    for (int64_t i = 0; i < groups; i += LANES) store(nearest + i, d.of(load(nearest + i)));
    const bool few = k > 0 && k < a.vocab, part = a.top_p[r] < 1, likely = a.min_p[r] > 0;
    float limit = likely ? -logf(a.min_p[r]) : INFINITY;
    if (few) limit = fminf(limit, distance_of(cut((const uint32_t*)nearest, nullptr, groups, (double)k)));
    double total = 0;
    if (!few && !likely) {  // every id counts
        double* mass = (double*)scratch(1, spans * sizeof(double));
        total = weigh_spans(d, mass);
        if (!part) return find(d, mass, a.uniform[r] * total);
        // Ids farther away than this weigh less than e^-limit each, together less than what may be cut off.
        limit = static_cast<float>(log(a.vocab / ((1.0 - a.top_p[r]) * total))) + 0.001f;
    }
    Candidates c(a.vocab);
    gather(c, d, nearest, limit);
    c.weigh();
    if (few) c.drop_above(cut(c.key, nullptr, c.count, (double)k));
    if (part) {
        if (few || likely) total = c.total();
        c.drop_above(cut(c.key, c.weight, c.count, a.top_p[r] * total));
    }
    return find(c, a.uniform[r] * c.total());
}

float* room(int64_t vocab) { return (float*)scratch(0, (vocab + SPAN - 1) / SPAN * LANES * 2 * sizeof(float)); }

template <class T> void argmax(const ArgmaxArgs& a, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; r++) {
        Peak p = peak((const T*)a.logits + r * a.logits_stride, a.vocab, room(a.vocab));
        a.ids[r] = p.id, a.finite[r] = p.finite;
    }
}

template <class T> void draw(const DrawArgs& a, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; r++) {
        const T* x = (const T*)a.logits + r * a.logits_stride;
        float* bests = room(a.vocab);
        Peak p = peak(x, a.vocab, bests);
        a.finite[r] = p.finite;
        a.ids[r] = p.finite && a.temperature[r] >= COLDEST ? draw_row(a, r, x, p.value, bests) : p.id;
    }
}

// Bits such that a higher float has a lower key.
inline uint32_t falling(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (bits == 0x80000000u) bits = 0;  // minus zero equals zero
    return bits & 0x80000000u ? bits : bits ^ 0x7fffffffu;
}
inline float risen(uint32_t key) {
    uint32_t bits = key & 0x80000000u ? key : key ^ 0x7fffffffu;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

void sift(uint64_t* heap, int64_t n, int64_t i) {
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[i] <= heap[child]) return;
        uint64_t t = heap[i];
        heap[i] = heap[child], heap[child] = t;
    }
}

// The a.count best of a row, the first ids of equals first.
template <class T> void best_of(const LogprobsArgs& a, int64_t r, const T* x, float* bests, double norm) {
    int64_t groups = (a.vocab + SPAN - 1) / SPAN * LANES;
    uint32_t* keys = (uint32_t*)(bests + groups);
    for (int64_t i = 0; i < groups; i++) keys[i] = falling(bests[i]);
    uint32_t bound = cut(keys, nullptr, groups, (double)a.count);
    float floor = bound == EVERYTHING ? -INFINITY : risen(bound);
    uint64_t* heap = (uint64_t*)scratch(2, a.vocab * sizeof(uint64_t));
    int64_t n = 0;
    for (int64_t i = 0; i < a.vocab; i += SPAN) {
        if (!at_most(all(floor), load(bests + i / SPAN * LANES))) continue;
        for (int64_t j = i; j < least(a.vocab, i + SPAN); j += LANES) {
            uint32_t which = at_most(all(floor), read(x + j, a.vocab - j)) & lanes(a.vocab - j);
            for (; which; which &= which - 1) {
                int64_t id = j + __builtin_ctz(which);
                heap[n++] = static_cast<uint64_t>(falling(single(x + id))) << 32 | static_cast<uint64_t>(id);
            }
        }
    }
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift(heap, n, i);
    for (int64_t i = 0; i < a.count; i++) {
        int64_t id = static_cast<uint32_t>(heap[0]);
        a.top_ids[r * a.count + i] = id;
        a.top_values[r * a.count + i] = static_cast<float>(single(x + id) - norm);
        heap[0] = heap[--n];
        sift(heap, n, 0);
    }
}

template <class T> int64_t rank_of(float value, const T* x, int64_t vocab, const float* bests) {
    int64_t above = 1;
    for (int64_t i = 0; i < vocab; i += SPAN) {
        if (at_most(load(bests + i / SPAN * LANES), all(value)) == 0xffff) continue;
        for (int64_t j = i; j < least(vocab, i + SPAN); j += LANES)
            above += __builtin_popcount(~at_most(read(x + j, vocab - j), all(value)) & 0xffff);
    }
    return above;
}

template <class T> void logprobs(const LogprobsArgs& a, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; r++) {
        const T* x = (const T*)a.logits + r * a.logits_stride;
        float* bests = room(a.vocab);
        Peak p = peak(x, a.vocab, bests);
        a.rank[r] = 1, a.chosen[r] = NAN;
        for (int64_t i = 0; !p.finite && i < a.count; i++) a.top_ids[r * a.count + i] = i, a.top_values[r * a.count + i] = NAN;
        if (!p.finite) continue;
        const Distances<T> d = {x, a.vocab, all(p.value), all(1.0f)};
        double* mass = (double*)scratch(1, (a.vocab + SPAN - 1) / SPAN * sizeof(double));
        double norm = p.value + log(weigh_spans(d, mass));
        float value = single(x + a.tokens[r]);
        a.chosen[r] = static_cast<float>(value - norm);
        a.rank[r] = rank_of(value, x, a.vocab, bests);
        if (a.count) best_of(a, r, x, bests, norm);
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(argmax, TUILI_ISA)(const ArgmaxArgs& a, int64_t row, int64_t rows) {
    a.dtype == 0 ? argmax<float>(a, row, rows) : argmax<uint16_t>(a, row, rows);
}
void JOIN(draw, TUILI_ISA)(const DrawArgs& a, int64_t row, int64_t rows) {
    a.dtype == 0 ? draw<float>(a, row, rows) : draw<uint16_t>(a, row, rows);
}
void JOIN(logprobs, TUILI_ISA)(const LogprobsArgs& a, int64_t row, int64_t rows) {
    a.dtype == 0 ? logprobs<float>(a, row, rows) : logprobs<uint16_t>(a, row, rows);
}
