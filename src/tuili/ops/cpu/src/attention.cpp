// Attention over the paged KV cache. A query head's result is a chain of steps over key tiles at absolute positions,
// fresh every PARTITION keys, and the partitions are merged in order: chunking, batching and splitting over threads
// choose who does a step, never what it computes (law 5).
#include "cache.h"

namespace {

// What a pass over keys keeps per row: [rows][wide] sums, [rows][16] totals, [rows] maxima (see state_floats).
struct State {
    float *sums, *total, *maximum;
    int64_t wide;
    State(float* at, int64_t rows, int64_t dim) : wide((dim + 15) / 16 * 16) {
        sums = at, total = at + rows * wide, maximum = total + rows * LANES;
    }
    void clear(int64_t rows) {
        memset(sums, 0, rows * (wide + LANES) * sizeof(float));
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

template <class Kind> int64_t words(int64_t values) { return (values + Kind::PAIR - 1) / Kind::PAIR; }

// Where the tile at `base` of one KV head lies: chunks of 16 keys, in the caches, or copied to `room` what can not be
// read there (blocks or heads that are not whole chunks, values of keys that none of the rows sees).
template <class Kind> struct Tile {
    using Value = typename Kind::Value;
    const char *keys[CHUNKS], *values[CHUNKS];
    const float *key_scales[CHUNKS], *value_scales[CHUNKS];
    int64_t base, from, to;           // the item's rows see keys [from, to) of the tile
    int64_t key_stride, value_stride;  // bytes between words of a key, between words of values
    char* room;
    bool gathered;

    static int64_t room_bytes(int64_t dim) {
        int64_t wide = (dim + 15) / 16 * 16;
        return KEY_TILE * (2 * wide * (int64_t)sizeof(Value) + 2 * (int64_t)sizeof(float));
    }

    void find(const View& v, int64_t at) {
        base = at, from = most(v.begin(0) - base, 0), to = least(v.last(v.rows - 1) + 1 - base, KEY_TILE);
        gathered = v.a.block_size % CHUNK || v.a.dim % LANES;
        if (gathered) return gather(v);
        key_stride = v.a.block_size * Kind::WORD, value_stride = v.a.dim * Kind::WORD;
        int64_t first = from / CHUNK, end = (to + CHUNK - 1) / CHUNK;
        for (int64_t c = first; c < end; c++) find_chunk(v, c);
        for (int64_t c = 0; c < CHUNKS; c++)
            if (c < first || c >= end) {  // not seen: any key does
                keys[c] = keys[first];
                if (v.a.k_scales) key_scales[c] = key_scales[first], value_scales[c] = value_scales[first];
            }
    }

    void find_chunk(const View& v, int64_t c) {
        const AttentionArgs& a = v.a;
        int64_t at = base + c * CHUNK, size = a.block_size;
        int64_t block = a.block_table[v.item.request * a.block_table_stride + at / size] * a.kv_heads + v.kv_head;
        keys[c] = (const char*)a.k_cache + (block * words<Kind>(a.dim) * size + at % size) * Kind::WORD;
        values[c] = (const char*)a.v_cache + (block * size + at % size) / Kind::PAIR * value_stride;
        if (a.k_scales) key_scales[c] = a.k_scales + block * size + at % size, value_scales[c] = a.v_scales + block * size + at % size;
    }

    // To be called before the tile is used, by when its values were asked for.
    void hide_unseen() {
        if (gathered) return;
        for (int64_t c = from / CHUNK; c * CHUNK < to; c++) {
            int64_t low = most(from - c * CHUNK, 0), high = least(to - c * CHUNK, CHUNK);
            if (low > 0 || high < CHUNK) values[c] = seen_values(c, low, high);
        }
    }

    // A copy of a chunk's values with zeros for keys outside [low, high): what lies there may be anything.
    const char* seen_values(int64_t c, int64_t low, int64_t high) {
        char* out = room + c * CHUNK / Kind::PAIR * value_stride;
        for (int64_t p = 0; p < CHUNK / Kind::PAIR; p++) {
            int64_t first = p * Kind::PAIR, last = first + Kind::PAIR - 1;
            char* to = out + p * value_stride;
            const char* from = values[c] + p * value_stride;
            if (first >= low && last < high) {
                memcpy(to, from, value_stride);
            } else {
                memset(to, 0, value_stride);
                for (int64_t k = most(first, low); k <= last && k < high; k++)
                    for (int64_t i = k - first; i < value_stride / (int64_t)sizeof(Value); i += Kind::PAIR)
                        ((Value*)to)[i] = ((const Value*)from)[i];
            }
        }
        return out;
    }

    // Any block size, any dimension: value by value into a tile of its own.
    void gather(const View& v) {
        const AttentionArgs& a = v.a;
        int64_t wide = (a.dim + 15) / 16 * 16, size = a.block_size, high = words<Kind>(size), pair = Kind::PAIR;
        key_stride = KEY_TILE * Kind::WORD, value_stride = wide * Kind::WORD;
        memset(room, 0, room_bytes(a.dim));
        Value *k = (Value*)room, *w = k + KEY_TILE * wide;
        float *ks = (float*)(w + KEY_TILE * wide), *vs = ks + KEY_TILE;
        for (int64_t i = from; i < to; i++) {
            int64_t block = a.block_table[v.item.request * a.block_table_stride + (base + i) / size] * a.kv_heads + v.kv_head;
            int64_t at = (base + i) % size;
            const Value* key = (const Value*)a.k_cache + (block * words<Kind>(a.dim) * size + at) * pair;
            const Value* value = (const Value*)a.v_cache + (block * high + at / pair) * a.dim * pair + at % pair;
            for (int64_t d = 0; d < a.dim; d++) {
                k[d / pair * KEY_TILE * pair + i * pair + d % pair] = key[d / pair * size * pair + d % pair];
                w[i / pair * wide * pair + d * pair + i % pair] = value[d * pair];
            }
            if (a.k_scales) ks[i] = a.k_scales[block * size + at], vs[i] = a.v_scales[block * size + at];
        }
        for (int64_t c = 0; c < CHUNKS; c++) {
            keys[c] = (const char*)k + c * CHUNK * Kind::WORD, values[c] = (const char*)w + c * CHUNK / pair * value_stride;
            key_scales[c] = ks + c * CHUNK, value_scales[c] = vs + c * CHUNK;
        }
    }
};

// The queries of a head as rows of words, and what their scores are multiplied by.
template <class T> void gather_row(Floats, const T* q, int64_t dim, char* out, float&) { memcpy(out, q, dim * sizeof(T)); }
#ifdef __AVX512F__
void gather_row(Halves, const uint16_t* q, int64_t dim, char* out, float&) {
    memcpy(out, q, dim * sizeof(uint16_t));
    if (dim % 2) ((uint16_t*)out)[dim] = 0;
}
#endif
template <class T> void gather_row(Widened, const T* q, int64_t dim, char* out, float&) {
    for (int64_t d = 0; d < dim; d += LANES) store((float*)out + d, load(q + d, dim - d));
}
template <class T> void gather_row(Bytes, const T* q, int64_t dim, char* out, float& factor) {
    const float limit = (float)least(32767, 2147483647 / (127 * dim));  // so that no sum overflows
    F highest = zero(), poison = zero();
    for (int64_t d = 0; d < dim; d += LANES) {
        F x = load(q + d, dim - d);
        highest = max(highest, max(x, zero() - x)), poison = fma(x, zero(), poison);
    }
    float biggest = top(highest);
    float into = biggest > 0 ? limit / biggest : 0.0f;
    for (int64_t d = 0; d < dim; d += LANES) store_int16((int16_t*)out + d, load(q + d, dim - d) * all(into));
    factor *= biggest / limit + sum(poison);  // not-a-number stays
}

template <class Kind, class T> void gather_queries(const View& v, char* out, int64_t stride, float* factors) {
    for (int64_t r = 0; r < v.rows; r++) {
        factors[r] = v.a.scale;
        gather_row(Kind{}, (const T*)v.a.q + v.row(r) * v.a.q_stride + v.head(r) * v.a.dim, v.a.dim, out + r * stride, factors[r]);
    }
}

// scores[M][64]: rows of queries times a tile's keys.
template <class Kind, bool AHEAD, int M>
void score(const View& v, const char* q, int64_t q_stride, const Tile<Kind>& t, const int64_t* ahead, const float* factors, float* scores) {
    for (int64_t c = 0; c < CHUNKS; c += COLUMNS) {
        typename Kind::Sums s[M][COLUMNS];
        EACH(m, M)
            EACH(n, COLUMNS) s[m][n].clear();
        product<Kind, AHEAD>(s, q, q_stride, t.keys + c, ahead + c, t.key_stride, words<Kind>(v.a.dim));
        EACH(n, COLUMNS) {
            F steps = all(1.0f);
            if constexpr (sizeof(typename Kind::Value) == 1) steps = load(t.key_scales[c + n]);
            EACH(m, M) {
                F x = floats(s[m][n]);
                if constexpr (sizeof(typename Kind::Value) == 1) x = x * steps;
                store(scores + m * KEY_TILE + (c + n) * LANES, x * all(factors[m]));
            }
        }
    }
}

// Weights to rows of words, in place of the scores; `unit` is what a word's one is worth.
void put_weights(Floats, const Tile<Floats>&, F (&w)[CHUNKS], int64_t, int64_t, float* out, float&) {
    EACH(i, (int)CHUNKS) store(out + i * LANES, w[i]);
}
void put_weights(Widened, const Tile<Widened>&, F (&w)[CHUNKS], int64_t, int64_t, float* out, float&) {
    EACH(i, (int)CHUNKS) store(out + i * LANES, w[i]);
}
#ifdef __AVX512F__
void put_weights(Halves, const Tile<Halves>&, F (&w)[CHUNKS], int64_t, int64_t, float* out, float&) {
    EACH(i, (int)CHUNKS) store((uint16_t*)out + i * LANES, w[i]);
}
#endif
void put_weights(Bytes, const Tile<Bytes>& t, F (&w)[CHUNKS], int64_t from, int64_t to, float* out, float& unit) {
    F highest = zero();
    EACH(i, (int)CHUNKS) {
        w[i] = keep(w[i] * load(t.value_scales[i]), from - i * LANES, to - i * LANES, zero());
        highest = max(highest, w[i]);
    }
    float biggest = top(highest);
    F into = all(biggest > 0 ? 32767.0f / biggest : 0.0f);
    EACH(i, (int)CHUNKS) store_int16((int16_t*)out + i * LANES, w[i] * into);
    unit = biggest / 32767.0f;
}

// Scores of row r to weights, in place; the row's maximum and total move on, `decay` is what its old sums are multiplied
// by. False if the row sees none of these keys: then nothing changes.
template <class Kind> bool soften(const View& v, const Tile<Kind>& t, int64_t r, float* scores, State state, float& decay, float& unit) {
    int64_t from = v.begin(r) - t.base, to = v.last(r) + 1 - t.base;
    decay = 1.0f, unit = 0.0f;
    if (to <= 0 || from >= KEY_TILE) {
        memset(scores, 0, KEY_TILE * sizeof(float));
        return false;
    }
    const F none = all(-INFINITY);
    F s[CHUNKS], highest = none;
    EACH(i, (int)CHUNKS) {
        s[i] = load(scores + i * LANES);
        if (v.a.softcap != 0) s[i] = all(v.a.softcap) * tanh(s[i] / all(v.a.softcap));
    }
    if (from > 0 || to < KEY_TILE)
        EACH(i, (int)CHUNKS) s[i] = keep(s[i], from - i * LANES, to - i * LANES, none);
    EACH(i, (int)CHUNKS) highest = max(highest, s[i]);
    float now = top(highest), before = state.maximum[r];
    now = now > before ? now : before;
    if (now != before) decay = before == -INFINITY ? 0.0f : low(exp_of(before - now));
    F added = zero();
    EACH(i, (int)CHUNKS) {
        s[i] = exp(s[i] - all(now));
        added = added + s[i];
    }
    put_weights(Kind{}, t, s, from, to, scores, unit);
    state.maximum[r] = now;
    float* total = state.total + r * LANES;
    store(total, fma(load(total), all(decay), added));
    return true;
}

// sums[M][wide] = sums * decay + weights times a tile's values.
template <class Kind, bool AHEAD, int M, int N>
void add(const float* weights, const Tile<Kind>& t, const int64_t* ahead, const float* decay, const float* unit, float* sums, int64_t wide) {
    typename Kind::Sums s[M][N];
    constexpr bool whole = sizeof(typename Kind::Value) == 1;
    EACH(m, M)
        EACH(n, N) {
            if constexpr (whole)
                s[m][n].clear();
            else
                s[m][n].f = load(sums + m * wide + n * LANES) * all(decay[m]);
        }
    for (int64_t c = t.from / CHUNK; c * CHUNK < t.to; c++) {
        const char* at[N];
        int64_t further[N];
        EACH(n, N) at[n] = t.values[c] + n * LANES * Kind::WORD, further[n] = ahead[c];
        product<Kind, AHEAD>(s, (const char*)weights + c * CHUNK / Kind::PAIR * Kind::X, KEY_TILE * sizeof(float), at, further, t.value_stride, CHUNK / Kind::PAIR);
    }
    EACH(m, M)
        EACH(n, N) {
            float* to = sums + m * wide + n * LANES;
            if constexpr (whole)
                store(to, fma(floats(s[m][n]), all(unit[m]), load(to) * all(decay[m])));
            else
                store(to, s[m][n].f);
        }
}

// What the next tile's chunks are ahead of this one's.
template <class Kind> struct Ahead {
    int64_t keys[CHUNKS], values[CHUNKS];
    Ahead(const Tile<Kind>& t, const Tile<Kind>& next) {
        for (int64_t c = 0; c < CHUNKS; c++) keys[c] = next.keys[c] - t.keys[c], values[c] = 0;
        for (int64_t c = t.from / CHUNK; c * CHUNK < t.to; c++)
            if (c >= next.from / CHUNK && c * CHUNK < next.to) values[c] = next.values[c] - t.values[c];
    }
};

// M rows from r on over one tile.
template <class Kind, bool AHEAD, int M>
void rows_over(const View& v, int64_t r, const char* q, int64_t q_stride, const float* factors, const Tile<Kind>& t, const Ahead<Kind>& ahead, State state) {
    alignas(64) float scores[M * KEY_TILE];
    score<Kind, AHEAD, M>(v, q + r * q_stride, q_stride, t, ahead.keys, factors + r, scores);
    float decay[M], unit[M];
    bool any = false;
    for (int64_t i = 0; i < M; i++) any |= soften(v, t, r + i, scores + i * KEY_TILE, state, decay[i], unit[i]);
    if (!any) return;
    float* sums = state.sums + r * state.wide;
    Tile<Kind> part = t;
    Ahead<Kind> on = ahead;
    int64_t d = 0;
    auto move = [&](int64_t by) {
        for (int64_t c = t.from / CHUNK; c * CHUNK < t.to; c++) part.values[c] += by * Kind::WORD;  // the others point nowhere
        d += by;
    };
    for (; d + COLUMNS * LANES <= state.wide; move(COLUMNS * LANES))
        add<Kind, AHEAD, M, COLUMNS>(scores, part, on.values, decay, unit, sums + d, state.wide);
    for (; d < state.wide; move(LANES)) add<Kind, AHEAD, M, 1>(scores, part, on.values, decay, unit, sums + d, state.wide);
}

template <class Kind>
void one_tile(const View& v, const char* q, int64_t q_stride, const float* factors, const Tile<Kind>& t, const Tile<Kind>& next, State state) {
    Ahead<Kind> ahead(t, next);
    if (v.a.k_scales)
        for (int64_t c = 0; c < CHUNKS; c++) {
            _mm_prefetch((const char*)next.key_scales[c], _MM_HINT_T0);
            _mm_prefetch((const char*)next.value_scales[c], _MM_HINT_T0);
        }
    for (int64_t r = 0; r < v.rows; r += ROWS) {
#define WITH(m) r ? rows_over<Kind, false, m>(v, r, q, q_stride, factors, t, ahead, state) : rows_over<Kind, true, m>(v, r, q, q_stride, factors, t, ahead, state)
        EACH_HEIGHT(least(v.rows - r, ROWS), WITH)
#undef WITH
    }
}

// The second state joins the first. An empty one changes nothing.
void join(State a, State b, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        if (b.maximum[r] == -INFINITY) continue;
        float now = a.maximum[r] > b.maximum[r] ? a.maximum[r] : b.maximum[r];
        F old = all(a.maximum[r] == -INFINITY ? 0.0f : low(exp_of(a.maximum[r] - now)));
        F fresh = all(low(exp_of(b.maximum[r] - now)));
        for (int64_t d = 0; d < a.wide; d += LANES) {
            float *x = a.sums + r * a.wide + d, *y = b.sums + r * a.wide + d;
            store(x, fma(load(y), fresh, load(x) * old));
        }
        float *x = a.total + r * LANES, *y = b.total + r * LANES;
        store(x, fma(load(y), fresh, load(x) * old));
        a.maximum[r] = now;
    }
}

template <class T> void finish(const View& v, State state) {
    for (int64_t r = 0; r < v.rows; r++) {
        T* out = (T*)v.a.out + (v.row(r) * v.a.heads + v.head(r)) * v.a.dim;
        F total = all(sum(load(state.total + r * LANES)));
        for (int64_t d = 0; d < v.a.dim; d += LANES)
            store(out + d, load(state.sums + r * state.wide + d) / total, v.a.dim - d);
    }
}

template <class Kind, class T> void attention(const AttentionArgs& a, const AttentionItem& item) {
    View v(a, item, 0);
    int64_t rows = v.rows, floats = state_floats(rows, a.dim), room = Tile<Kind>::room_bytes(a.dim);
    int64_t q_stride = (words<Kind>(a.dim) * Kind::X + 63) / 64 * 64;
    char* memory = (char*)scratch(1, 2 * room + rows * q_stride + rows * 4);
    char* q = memory + 2 * room;
    float* factors = (float*)(q + rows * q_stride);
    float* states = (float*)scratch(2, 2 * floats * 4);
    State whole(states, rows, a.dim);
    int64_t begin = most(item.part * PARTITION, v.begin(0) / KEY_TILE * KEY_TILE);
    int64_t end = least(item.parts * PARTITION, v.last(rows - 1) + 1);
    bool alone = item.parts - item.part == 1;  // joining it to nothing would copy it
    Tile<Kind> tiles[2];
    tiles[0].room = memory, tiles[1].room = memory + room;
    tiles[0].find(v, begin);
    int which = 0;
    for (int64_t s = 0; s < item.spans; s++) {
        View head(a, item, s);
        gather_queries<Kind, T>(head, q, q_stride, factors);
        whole.clear(rows);
        for (int64_t base = begin; base < end; base += KEY_TILE, which ^= 1) {
            Tile<Kind>&t = tiles[which], &next = tiles[which ^ 1];
            bool more = base + KEY_TILE < end || s + 1 < item.spans;
            if (more) next.find(base + KEY_TILE < end ? head : View(a, item, s + 1), base + KEY_TILE < end ? base + KEY_TILE : begin);
            int64_t part = base / PARTITION - item.part;
            t.hide_unseen();
            State state(item.state ? item.state + (part * item.spans + s) * floats : alone ? states : states + floats, rows, a.dim);
            if (base == begin || base % PARTITION == 0) state.clear(rows);
            one_tile<Kind>(head, q, q_stride, factors, t, more ? next : t, state);
            bool ends = (base + KEY_TILE) % PARTITION == 0 || base + KEY_TILE >= end;
            if (ends && !item.state && !alone) join(whole, state, rows);
        }
        if (!item.state) finish<T>(head, whole);
    }
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
    if (a.k_scales)
        a.dtype == 0 ? attention<Bytes, float>(a, item) : attention<Bytes, uint16_t>(a, item);
    else if (a.dtype == BFLOAT16)
        attention<Halves, uint16_t>(a, item);
    else
        a.numbers == FLOAT32 ? attention<Floats, float>(a, item) : attention<Widened, float>(a, item);
}
void JOIN(merge, TUILI_ISA)(const AttentionArgs& a, const AttentionItem& item) {
    a.dtype == 0 ? merge<float>(a, item) : merge<uint16_t>(a, item);
}
