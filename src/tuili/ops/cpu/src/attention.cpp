// Attention over the paged KV cache. A query head's result is a chain of steps over key tiles at absolute positions,
// fresh every PARTITION keys, and the partitions are merged in order: chunking, batching and splitting over threads
// choose who does a step, never what it computes (law 5).
#include "linear.h"

namespace {

// What a pass over keys keeps per row: [rows][wide] sums, then [rows] maxima, [rows] totals (16 floats apart: see
// state_floats).
struct State {
    float *sums, *maximum, *total;
    int64_t wide;
    State(float* at, int64_t rows, int64_t dim) : wide((dim + 15) / 16 * 16) {
        sums = at, maximum = at + rows * wide, total = maximum + rows;
    }
    void clear(int64_t rows) {
        memset(sums, 0, rows * wide * sizeof(float));
        memset(total, 0, rows * sizeof(float));
        for (int64_t r = 0; r < rows; r++) maximum[r] = -INFINITY;
    }
};

F exp_of(float x) { return exp(all(x)); }

// One KV head of an item: which rows, which keys.
struct View {
    const AttentionArgs& a;
    const AttentionItem& item;
    int64_t kv_head, group, rows, position;  // position of the item's first query
    View(const AttentionArgs& args, const AttentionItem& i, int64_t span) : a(args), item(i) {
        kv_head = item.kv_head + span;
        group = a.heads / a.kv_heads, rows = item.queries * group;
        int64_t queries = a.query_start[item.request + 1] - a.query_start[item.request];
        position = a.context_len[item.request] - queries + item.first;
    }
    int64_t head(int64_t r) const { return kv_head * group + r % group; }
    int64_t row(int64_t r) const { return a.query_start[item.request] + item.first + r / group; }
    int64_t last(int64_t r) const { return position + r / group; }  // the last key that row r sees
    int64_t begin(int64_t r) const { return a.window ? most(0, last(r) - a.window + 1) : 0; }
};

// Where the keys [from, to) of the tile at `base` lie in the caches, in elements: the item's first KV head of each.
struct Places {
    int64_t from, to, at[KEY_TILE];
    void find(const View& v, int64_t base) {
        const AttentionArgs& a = v.a;
        from = most(v.begin(0) - base, 0), to = least(v.last(v.rows - 1) + 1 - base, KEY_TILE);
        const int64_t* table = a.table + v.item.request * a.table_stride;
        int64_t column = (base + from) / a.block_size, offset = (base + from) % a.block_size;
        for (int64_t i = from; i < to; i++) {
            at[i] = ((table[column] * a.block_size + offset) * a.kv_heads + v.item.kv_head) * a.dim;
            if (++offset == a.block_size) offset = 0, column++;
        }
    }
    // Heads are read one after the other, each with gaps: the processor does not foresee the next tile.
    // Reading is what makes it run ahead in memory order; prefetch instructions do not (measured: 12 and 8.5 GB/s at 32 rows).
    template <class T> void prefetch(const View& v) const {
        int64_t bytes = v.item.spans * v.a.dim * sizeof(T);
        int touched = 0;
        const void* caches[] = {v.a.k, v.a.v};
        for (const void* cache : caches)
            for (int64_t i = from; i < to; i++)
                for (int64_t b = 0; b < bytes; b += 64) touched += ((const char*)((const T*)cache + at[i]))[b];
        asm volatile("" ::"r"(touched));
    }
};

// 16 rows of 16 lanes turned: out[i * stride + j] = row j's lane i.
#ifdef __AVX512F__
inline void turn(const F (&in)[16], float* out, int64_t stride) {
    __m512 t[16], s[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(in[i].v, in[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(in[i].v, in[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        s[i] = (__m512)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
        s[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
        s[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
        s[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // lane i of every quarter: rows 4q.. of columns i, 4 + i, 8 + i, 12 + i
        __m512 a = _mm512_shuffle_f32x4(s[i], s[4 + i], 0x88), b = _mm512_shuffle_f32x4(s[i], s[4 + i], 0xdd);
        __m512 c = _mm512_shuffle_f32x4(s[8 + i], s[12 + i], 0x88), d = _mm512_shuffle_f32x4(s[8 + i], s[12 + i], 0xdd);
        _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(a, c, 0x88));
        _mm512_storeu_ps(out + (4 + i) * stride, _mm512_shuffle_f32x4(b, d, 0x88));
        _mm512_storeu_ps(out + (8 + i) * stride, _mm512_shuffle_f32x4(a, c, 0xdd));
        _mm512_storeu_ps(out + (12 + i) * stride, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
}
#else
inline void turn(const F (&in)[16], float* out, int64_t stride) {
    for (int j = 0; j < 16; j++) {
        alignas(32) float t[16];
        store(t, in[j]);
        for (int i = 0; i < 16; i++) out[i * stride + j] = t[i];
    }
}
#endif

// Words of 4 bytes per key: floats, or pairs of bfloat16 where there are pair instructions.
template <class T> struct Keys;
template <> struct Keys<float> {
    using Kind = Float;
    static int64_t words(int64_t dim) { return dim; }
    static F get(const float* key, int64_t word, int64_t dim) { return load(key + word, dim - word); }
};
template <> struct Keys<uint16_t> {
    using Kind = Pairs;
    static int64_t words(int64_t dim) { return PAIRS ? (dim + 1) / 2 : dim; }
    static F get(const uint16_t* key, int64_t word, int64_t dim) {
        if (!PAIRS) return load(key + word, dim - word);
        if (dim - 2 * word >= 2 * LANES) return load((const float*)(key + 2 * word));
        alignas(64) uint16_t t[2 * LANES] = {};
        memcpy(t, key + 2 * word, (dim - 2 * word) * 2);
        return load((const float*)t);
    }
};

// The queries of an item as rows of words: floats times the scale, or pairs (the scale then goes on the scores).
template <class T> void gather_queries(const View& v, float* out, int64_t words) {
    const AttentionArgs& a = v.a;
    for (int64_t r = 0; r < v.rows; r++) {
        const T* q = (const T*)a.q + v.row(r) * a.q_stride + v.head(r) * a.dim;
        for (int64_t w = 0; w < words; w += LANES) {
            F x = Keys<T>::get(q, w, a.dim);
            store(out + r * words + w, sizeof(typename Keys<T>::Kind::Storage) == 4 ? x * all(a.scale) : x, words - w);
        }
    }
}

// The keys of a tile, turned to [words][64]; zero where there is none.
template <class T> void gather_keys(const View& v, const Places& places, float* out, int64_t words) {
    const T* keys = (const T*)v.a.k + (v.kv_head - v.item.kv_head) * v.a.dim;
    for (int64_t k = 0; k < KEY_TILE; k += 16) {
        if (k >= places.to || k + 16 <= places.from) {
            for (int64_t w = 0; w < words; w++) store(out + w * KEY_TILE + k, zero());
            continue;
        }
        for (int64_t w = 0; w < words; w += 16) {
            F block[16];
            for (int64_t i = 0; i < 16; i++) {
                bool there = k + i >= places.from && k + i < places.to;
                block[i] = there ? Keys<T>::get(keys + places.at[k + i], w, v.a.dim) : zero();
            }
            if (words - w >= 16) {
                turn(block, out + w * KEY_TILE + k, KEY_TILE);
            } else {
                alignas(64) float t[16 * 16];
                turn(block, t, 16);
                for (int64_t i = 0; i < words - w; i++) store(out + (w + i) * KEY_TILE + k, load(t + i * 16));
            }
        }
    }
}

// The values of a tile as whole lanes of floats.
template <class T> void widen_values(const View& v, const Places& places, float* out, int64_t wide, const float** at) {
    const T* values = (const T*)v.a.v + (v.kv_head - v.item.kv_head) * v.a.dim;
    for (int64_t i = places.from; i < places.to; i++) {
        const T* value = values + places.at[i];
        for (int64_t d = 0; d < wide; d += LANES) store(out + i * wide + d, load(value + d, v.a.dim - d));
        at[i] = out + i * wide;
    }
}

// scores[rows][64] = queries[rows][words] times keys[words][64].
template <class Kind, int M> void score(const float* q, const float* k, int64_t words, float* out) {
    for (int64_t n = 0; n < KEY_TILE; n += LANES * COLUMNS) {
        F sum[M][COLUMNS];
        EACH(m, M)
            EACH(c, COLUMNS) sum[m][c] = zero();
        for (int64_t w = 0; w < words; w++)
            step(Kind{}, sum, (const char*)(q + w), words * 4, (const char*)(k + w * KEY_TILE + n), LANES * 4);
        EACH(m, M)
            EACH(c, COLUMNS) store(out + m * KEY_TILE + n + c * LANES, sum[m][c]);
    }
}

// sums[rows][wide] = sums * keep + weights[rows][from..to) times values.
template <class T, int M, int N>
void add(const float* weights, const T* const* values, int64_t from, int64_t to, const float* keep, float* sums, int64_t wide, int64_t d) {
    F s[M][N];
    EACH(m, M)
        EACH(n, N) s[m][n] = load(sums + m * wide + d + n * LANES) * all(keep[m]);
    for (int64_t k = from; k < to; k++) {
        F v[N];
        EACH(n, N) v[n] = load(values[k] + d + n * LANES);
        EACH(m, M) {
            F w = all(weights[m * KEY_TILE + k]);
            EACH(n, N) s[m][n] = fma(w, v[n], s[m][n]);
        }
    }
    EACH(m, M)
        EACH(n, N) store(sums + m * wide + d + n * LANES, s[m][n]);
}

template <class T, int M>
void add_all(const float* weights, const T* const* values, int64_t from, int64_t to, const float* keep, float* sums, int64_t wide) {
    int64_t d = 0;
    for (; d + COLUMNS * LANES <= wide; d += COLUMNS * LANES)
        add<T, M, COLUMNS>(weights, values, from, to, keep, sums, wide, d);
    for (; d < wide; d += LANES) add<T, M, 1>(weights, values, from, to, keep, sums, wide, d);
}

// Scores of the tile at `base` to weights, in place; the row's maximum and total move on, `decay` is what its old
// sums are multiplied by. False if the row sees none of these keys: then nothing changes.
bool soften(const View& v, int64_t r, int64_t base, float* scores, float& maximum, float& total, float& decay, float scale) {
    int64_t from = v.begin(r) - base, to = v.last(r) + 1 - base;
    decay = 1.0f;
    if (to <= 0 || from >= KEY_TILE) {
        for (int64_t k = 0; k < KEY_TILE; k += LANES) store(scores + k, zero());
        return false;
    }
    const F none = all(-INFINITY);
    F s[KEY_TILE / LANES], highest = none;
    EACH(i, KEY_TILE / LANES) {
        s[i] = load(scores + i * LANES) * all(scale);
        if (v.a.softcap != 0) s[i] = all(v.a.softcap) * tanh(s[i] / all(v.a.softcap));
        s[i] = keep(s[i], from - i * LANES, to - i * LANES, none);
        highest = max(highest, s[i]);
    }
    float now = top(highest);
    now = now > maximum ? now : maximum;
    decay = maximum == -INFINITY ? 0.0f : low(exp_of(maximum - now));
    F added = zero();
    EACH(i, KEY_TILE / LANES) {
        F w = exp(s[i] - all(now));
        store(scores + i * LANES, w);
        added = added + w;
    }
    maximum = now;
    total = total * decay + sum(added);
    return true;
}

template <class T> struct Room {
    float *queries, *keys, *values, *scores;
    Room(int64_t spans, int64_t rows, int64_t dim) {
        int64_t wide = (dim + 15) / 16 * 16;
        queries = (float*)scratch(1, (spans * rows * wide + KEY_TILE * wide * 2 + rows * KEY_TILE) * 4);
        keys = queries + spans * rows * wide, values = keys + KEY_TILE * wide, scores = values + KEY_TILE * wide;
    }
};

// What a tile's values are read as: in place where they are whole lanes and read once or as floats, else widened.
template <class T> struct Values {
    const T* in_place[KEY_TILE];
    const float* widened[KEY_TILE];
    bool direct;
    Values(const View& v, const Places& places, float* room, int64_t wide) {
        direct = v.a.dim % LANES == 0 && (sizeof(T) == 4 || v.rows <= ROWS);
        const T* values = (const T*)v.a.v + (v.kv_head - v.item.kv_head) * v.a.dim;
        if (direct)
            for (int64_t i = places.from; i < places.to; i++) in_place[i] = values + places.at[i];
        else
            widen_values<T>(v, places, room, wide, widened);
    }
    template <int M> void add(const float* weights, const Places& p, const float* keep, float* sums, int64_t wide) const {
        if (direct)
            add_all<T, M>(weights, in_place, p.from, p.to, keep, sums, wide);
        else
            add_all<float, M>(weights, widened, p.from, p.to, keep, sums, wide);
    }
};

// All rows of the item over one tile of keys.
template <class T> void one_tile(const View& v, int64_t base, const Places& places, const Room<T>& room, const float* queries, State state) {
    using Kind = typename Keys<T>::Kind;
    int64_t words = Keys<T>::words(v.a.dim);
    gather_keys<T>(v, places, room.keys, words);
    Values<T> values(v, places, room.values, state.wide);
    float scale = sizeof(typename Kind::Storage) == 4 ? 1.0f : v.a.scale;
    for (int64_t r = 0; r < v.rows; r += ROWS) {
        int64_t rows = least(v.rows - r, ROWS);
        float* scores = room.scores + r * KEY_TILE;
        const float* q = queries + r * words;
#define SCORE(m) score<Kind, m>(q, room.keys, words, scores)
        EACH_HEIGHT(rows, SCORE)
#undef SCORE
        float keep[ROWS];
        bool any = false;
        for (int64_t i = 0; i < rows; i++)
            any |= soften(v, r + i, base, scores + i * KEY_TILE, state.maximum[r + i], state.total[r + i], keep[i], scale);
        if (!any) continue;
        float* sums = state.sums + r * state.wide;
#define ADD(m) values.template add<m>(scores, places, keep, sums, state.wide)
        EACH_HEIGHT(rows, ADD)
#undef ADD
    }
}

// The second state joins the first. An empty one changes nothing.
void join(State a, State b, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        if (b.maximum[r] == -INFINITY) continue;
        float now = a.maximum[r] > b.maximum[r] ? a.maximum[r] : b.maximum[r];
        float old = a.maximum[r] == -INFINITY ? 0.0f : low(exp_of(a.maximum[r] - now));
        float fresh = low(exp_of(b.maximum[r] - now));
        for (int64_t d = 0; d < a.wide; d += LANES) {
            float *x = a.sums + r * a.wide + d, *y = b.sums + r * a.wide + d;
            store(x, fma(load(y), all(fresh), load(x) * all(old)));
        }
        a.total[r] = a.total[r] * old + b.total[r] * fresh;
        a.maximum[r] = now;
    }
}

template <class T> void finish(const View& v, State state) {
    for (int64_t r = 0; r < v.rows; r++) {
        T* out = (T*)v.a.out + (v.row(r) * v.a.heads + v.head(r)) * v.a.dim;
        F total = all(state.total[r]);
        for (int64_t d = 0; d < v.a.dim; d += LANES)
            store(out + d, load(state.sums + r * state.wide + d) / total, v.a.dim - d);
    }
}

template <class T> void attention(const AttentionArgs& a, const AttentionItem& item) {
    View v(a, item, 0);
    int64_t floats = state_floats(v.rows, a.dim), words = Keys<T>::words(a.dim), spans = item.spans;
    Room<T> room(spans, v.rows, a.dim);
    float* memory = (float*)scratch(2, 2 * spans * floats * 4);
    for (int64_t s = 0; s < spans; s++) {
        gather_queries<T>(View(a, item, s), room.queries + s * v.rows * words, words);
        State(memory + s * floats, v.rows, a.dim).clear(v.rows);
    }
    bool alone = !item.state && item.parts - item.part == 1;  // joining it to nothing would copy it
    int64_t begin = v.begin(0), end = v.last(v.rows - 1) + 1;
    for (int64_t p = item.part; p < item.parts; p++) {
        float* at = item.state ? item.state + (p - item.part) * spans * floats : alone ? memory : memory + spans * floats;
        for (int64_t s = 0; s < spans; s++) State(at + s * floats, v.rows, a.dim).clear(v.rows);
        int64_t first = most(p * PARTITION, begin / KEY_TILE * KEY_TILE), last = least((p + 1) * PARTITION, end);
        Places places[2];
        places[0].find(v, first);
        for (int64_t base = first, i = 0; base < last; base += KEY_TILE, i ^= 1) {
            if (base + KEY_TILE < last) {
                places[i ^ 1].find(v, base + KEY_TILE);
                places[i ^ 1].template prefetch<T>(v);
            }
            for (int64_t s = 0; s < spans; s++)
                one_tile<T>(View(a, item, s), base, places[i], room, room.queries + s * v.rows * words, State(at + s * floats, v.rows, a.dim));
        }
        for (int64_t s = 0; s < spans && !item.state && !alone; s++)
            join(State(memory + s * floats, v.rows, a.dim), State(at + s * floats, v.rows, a.dim), v.rows);
    }
    for (int64_t s = 0; s < spans && !item.state; s++)
        finish<T>(View(a, item, s), State(memory + s * floats, v.rows, a.dim));
}

// The partitions of a split item, which lie one after the other, to its output.
template <class T> void merge(const AttentionArgs& a, const AttentionItem& item) {
    for (int64_t s = 0; s < item.spans; s++) {
        View v(a, item, s);
        int64_t floats = state_floats(v.rows, a.dim);
        State whole((float*)scratch(2, floats * 4), v.rows, a.dim);
        whole.clear(v.rows);
        for (int64_t p = 0; p < item.parts - item.part; p++)
            join(whole, State(item.state + (p * item.spans + s) * floats, v.rows, a.dim), v.rows);
        finish<T>(v, whole);
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(attention, TUILI_ISA)(const AttentionArgs& a, const AttentionItem& item) {
    a.dtype == 0 ? attention<float>(a, item) : attention<uint16_t>(a, item);
}
void JOIN(merge, TUILI_ISA)(const AttentionArgs& a, const AttentionItem& item) {
    a.dtype == 0 ? merge<float>(a, item) : merge<uint16_t>(a, item);
}
