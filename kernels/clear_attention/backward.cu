// Gradients; probabilities are computed again from the log-sum-exp (FlashAttention-2, algorithm 2), with no atomics:
// `query` goes by query tiles over the forward's lists, `key` by key tiles over the reversed ones. Both take 32 columns
// at a time, so that two products and their sums fit the registers. Parts of long lists are summed by `sum`.
struct Backward {
    const u16 *query, *key, *value, *out, *grad; // (batch, queries or keys, heads, D)
    const float* lse;                            // (batch, heads, queries), natural
    float* delta;                                // as lse
    u16 *query_grad, *key_grad, *value_grad;
    float *parts, *value_parts; // (batch, heads, slots, 64, D)
    Lists lists;
    int batch, heads, queries, keys, slots;
    float scale; // 1 / sqrt(D)
};

// delta = Σ out · grad of each query: D / 8 lanes to a row.
template <class T, int D>
INLINE void delta(const Backward& p) {
    constexpr int LANES = D / 8;
    i64 index = (i64)blockIdx.x * THREADS + threadIdx.x, rows = (i64)p.batch * p.queries * p.heads;
    i64 row = index / LANES, from = (row < rows ? row : 0) * D + index % LANES * 8;
    float out[8], grad[8], sum = 0;
    load(out, p.out + from, T());
    load(grad, p.grad + from, T());
#pragma unroll
    for (int i = 0; i < 8; i++) sum += out[i] * grad[i];
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) sum += shuffle_xor(sum, lanes);
    if (row >= rows || index % LANES != 0) return;
    i64 token = row / p.heads, batch = token / p.queries;
    p.delta[(batch * p.heads + row % p.heads) * p.queries + token % p.queries] = sum;
}

// Two tiles of rows, side by side, in two stages.
template <int D, int ROWS>
struct Stages {
    static constexpr int BYTES = ROWS * D * 2;
    u8* memory;
    INLINE u8* first(int stage) const { return memory + stage * BYTES; }
    INLINE u8* second(int stage) const { return memory + (2 + stage) * BYTES; }

    INLINE void load(int stage, const u16* first_from, const u16* second_from, i64 stride, int count) const {
        load_tile<D, ROWS>(first(stage), first_from, stride, count);
        load_tile<D, ROWS>(second(stage), second_from, stride, count);
    }
};

// scores -> probabilities, and slopes (grad · value) -> gradients of the scores: p (slope - delta). Statistics are those
// of the query of each number.
template <class Statistics>
INLINE void differentiate(float (&scores)[HALF / 8][4], float (&slopes)[HALF / 8][4], float scale, u32 seen,
                          const Statistics& of) {
#pragma unroll
    for (int i = 0; i < HALF / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float share = exp2_of(scores[i][j] * scale - of.lse(i, j));
            scores[i][j] = seen >> (4 * i + j) & 1 ? share : 0;
            slopes[i][j] = scores[i][j] * (slopes[i][j] - of.delta(i, j));
        }
}

// A row of a tile is a query: this lane has two of them.
struct ByRow {
    float log[2], sum[2];
    INLINE float lse(int, int j) const { return log[j / 2]; }
    INLINE float delta(int, int j) const { return sum[j / 2]; }

    INLINE ByRow(const Backward& p, Work work) {
        int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            i64 from = head() * p.queries + work.first + row + half * 8;
            bool inside = row + half * 8 < work.count;
            log[half] = inside ? p.lse[from] * LOG2_E : 0;
            sum[half] = inside ? p.delta[from] : 0;
        }
    }
};

// A column is a query: its numbers lie in shared memory.
struct ByColumn {
    const float *logs, *sums;
    INLINE float lse(int i, int j) const { return logs[i * 8 + threadIdx.x % 4 * 2 + j % 2] * LOG2_E; }
    INLINE float delta(int i, int j) const { return sums[i * 8 + threadIdx.x % 4 * 2 + j % 2]; }
};

template <class T, int D>
INLINE void visit_keys(const Stages<D, TILE>& tiles, int stage, int half, const u32 (&query)[D / 16][4],
                       const u32 (&grad)[D / 16][4], float scale, u32 seen, const ByRow& statistics,
                       float (&sums)[D / 8][4]) {
    float scores[HALF / 8][4], slopes[HALF / 8][4];
    clear(scores);
    clear(slopes);
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        add_scores<T, D>(scores, query[step], tiles.first(stage), half * HALF, step, T());
        add_scores<T, D>(slopes, grad[step], tiles.second(stage), half * HALF, step, T());
    }
    differentiate(scores, slopes, scale, seen, statistics);
    add_product<T, D>(sums, slopes, tiles.first(stage), half * HALF, T());
}

// Gradient of 64 queries.
template <class T, int D>
INLINE void query(const Backward& p) {
    Stages<D, TILE> tiles = {shared_memory()};
    Work work = p.lists.work[blockIdx.x];
    i64 stride = (i64)gridDim.y * D, own = place<D>(p.queries, work.first);
    tiles.load(1, p.query + own, p.grad + own, stride, work.count); // free until the second entry
    commit_copies();
    ByRow statistics(p, work);
    Entry next = p.lists.entries[work.begin];
    i64 from = place<D>(p.keys, next.first);
    tiles.load(0, p.key + from, p.value + from, stride, next.count);
    commit_copies();
    u32 next_seen = seen(p.lists, next.mask);
    wait_copies<1>();
    __syncthreads();
    u32 query[D / 16][4], grad[D / 16][4];
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        left<D>(query[step], tiles.first(1), step);
        left<D>(grad[step], tiles.second(1), step);
    }
    float sums[D / 8][4];
    clear(sums);
    for (int i = work.begin; i < work.end; i++) {
        int stage = (i - work.begin) & 1;
        u32 bits = next_seen;
        wait_copies<0>();
        __syncthreads(); // what the other stage held has been used by all
        if (i + 1 < work.end) {
            next = p.lists.entries[i + 1];
            from = place<D>(p.keys, next.first);
            tiles.load(stage ^ 1, p.key + from, p.value + from, stride, next.count);
            commit_copies();
            next_seen = seen(p.lists, next.mask);
        }
#pragma unroll 1
        for (int half = 0; half < 2; half++)
            visit_keys<T, D>(tiles, stage, half, query, grad, p.scale * LOG2_E, bits >> (half * 16), statistics, sums);
    }
    float scale[2] = {p.scale, p.scale};
    if (work.slot >= 0)
        store_part<D>(p.parts + (head() * p.slots + work.slot) * TILE * D, sums, scale);
    else
        store<T, D>(p.query_grad + own, stride, work.count, sums, scale, T());
}

// 32 queries of a list at a time: step s is half s % 2 of an entry.
template <int D>
struct Queries {
    static constexpr int BYTES = 4 * HALF * D * 2;
    Stages<D, HALF> tiles;
    float* statistics; // (stage, lse or delta, 32)

    INLINE void load(const Backward& p, Entry entry, int half, int stage) const {
        int first = entry.first + half * HALF, count = entry.count - half * HALF;
        i64 from = place<D>(p.queries, count > 0 ? first : 0);
        tiles.load(stage, p.query + from, p.grad + from, (i64)gridDim.y * D, count);
        int row = threadIdx.x % HALF;
        if (threadIdx.x < 2 * HALF) {
            const float* numbers = threadIdx.x < HALF ? p.lse : p.delta;
            i64 at = head() * p.queries + (row < count ? first + row : 0);
            copy_word_async(statistics + stage * 2 * HALF + threadIdx.x, numbers + at, row < count);
        }
        commit_copies();
    }
    INLINE ByColumn columns(int stage) const {
        return {statistics + stage * 2 * HALF, statistics + stage * 2 * HALF + HALF};
    }
};

template <class T, int D>
INLINE void visit_queries(const u8* keys, const u8* values, const Queries<D>& queries, int stage, float scale, u32 seen,
                          float (&key_sums)[D / 8][4], float (&value_sums)[D / 8][4]) {
    float scores[HALF / 8][4], slopes[HALF / 8][4];
    clear(scores);
    clear(slopes);
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u32 a[4];
        left<D>(a, keys, step);
        add_scores<T, D>(scores, a, queries.tiles.first(stage), 0, step, T());
        left<D>(a, values, step);
        add_scores<T, D>(slopes, a, queries.tiles.second(stage), 0, step, T());
    }
    differentiate(scores, slopes, scale, seen, queries.columns(stage));
    add_product<T, D>(value_sums, scores, queries.tiles.second(stage), 0, T());
    add_product<T, D>(key_sums, slopes, queries.tiles.first(stage), 0, T());
}

// Gradients of 64 keys and values; lists name queries.
template <class T, int D>
INLINE void key(const Backward& p) {
    constexpr int BYTES = TILE * D * 2;
    u8 *keys = shared_memory(), *values = keys + BYTES, *rest = values + BYTES;
    Queries<D> queries = {{rest}, (float*)(rest + Queries<D>::BYTES)};
    Work work = p.lists.work[blockIdx.x];
    i64 stride = (i64)gridDim.y * D, own = place<D>(p.keys, work.first);
    load_tile<D, TILE>(keys, p.key + own, stride, work.count);
    load_tile<D, TILE>(values, p.value + own, stride, work.count);
    Entry entry = p.lists.entries[work.begin];
    queries.load(p, entry, 0, 0);
    u32 bits = seen(p.lists, entry.mask);
    float key_sums[D / 8][4], value_sums[D / 8][4];
    clear(key_sums);
    clear(value_sums);
    int steps = 2 * (work.end - work.begin);
    for (int step = 0; step < steps; step++) {
        int stage = step & 1;
        u32 now = bits;
        wait_copies<0>();
        __syncthreads(); // what the other stage held has been used by all
        if (step + 1 < steps) {
            if (stage == 1) entry = p.lists.entries[work.begin + (step + 1) / 2];
            queries.load(p, entry, stage ^ 1, stage ^ 1);
            bits = stage == 1 ? seen(p.lists, entry.mask) : bits >> 16;
        }
        visit_queries<T, D>(keys, values, queries, stage, p.scale * LOG2_E, now, key_sums, value_sums);
    }
    float scale[2] = {p.scale, p.scale}, one[2] = {1, 1};
    i64 part = (head() * p.slots + work.slot) * TILE * D;
    if (work.slot >= 0) {
        store_part<D>(p.parts + part, key_sums, scale);
        store_part<D>(p.value_parts + part, value_sums, one);
    } else {
        store<T, D>(p.key_grad + own, stride, work.count, key_sums, scale, T());
        store<T, D>(p.value_grad + own, stride, work.count, value_sums, one, T());
    }
}

// Σ of parts [begin, end) to rows of `to`.
template <class T, int D>
INLINE void sum_parts(u16* to, i64 stride, const float* parts, Work work) {
    for (int index = threadIdx.x; index < work.count * D / 2; index += THREADS) {
        int row = index / (D / 2), column = index % (D / 2) * 2;
        float low = 0, high = 0;
        for (int i = work.begin; i < work.end; i++) {
            const float* part = parts + (i64)i * TILE * D + row * D + column;
            low += part[0];
            high += part[1];
        }
        *(u32*)(to + row * stride + column) = pack(low, high, T());
    }
}

template <class T, int D>
INLINE void sum_queries(const Backward& p) {
    Work work = p.lists.work[blockIdx.x];
    const float* parts = p.parts + head() * p.slots * TILE * D;
    sum_parts<T, D>(p.query_grad + place<D>(p.queries, work.first), (i64)gridDim.y * D, parts, work);
}

template <class T, int D>
INLINE void sum_keys(const Backward& p) {
    Work work = p.lists.work[blockIdx.x];
    i64 stride = (i64)gridDim.y * D, own = place<D>(p.keys, work.first), from = head() * p.slots * TILE * D;
    sum_parts<T, D>(p.key_grad + own, stride, p.parts + from, work);
    sum_parts<T, D>(p.value_grad + own, stride, p.value_parts + from, work);
}

ENTRY(delta_bf16_64, Backward, THREADS, 8) { delta<Bf16, 64>(p); }
ENTRY(delta_bf16_128, Backward, THREADS, 8) { delta<Bf16, 128>(p); }
ENTRY(delta_f16_64, Backward, THREADS, 8) { delta<F16, 64>(p); }
ENTRY(delta_f16_128, Backward, THREADS, 8) { delta<F16, 128>(p); }
ENTRY(query_bf16_64, Backward, THREADS, 3) { query<Bf16, 64>(p); }
ENTRY(query_bf16_128, Backward, THREADS, 2) { query<Bf16, 128>(p); }
ENTRY(query_f16_64, Backward, THREADS, 3) { query<F16, 64>(p); }
ENTRY(query_f16_128, Backward, THREADS, 2) { query<F16, 128>(p); }
ENTRY(key_bf16_64, Backward, THREADS, 3) { key<Bf16, 64>(p); }
ENTRY(key_bf16_128, Backward, THREADS, 2) { key<Bf16, 128>(p); }
ENTRY(key_f16_64, Backward, THREADS, 3) { key<F16, 64>(p); }
ENTRY(key_f16_128, Backward, THREADS, 2) { key<F16, 128>(p); }
ENTRY(sum_queries_bf16_64, Backward, THREADS, 8) { sum_queries<Bf16, 64>(p); }
ENTRY(sum_queries_bf16_128, Backward, THREADS, 8) { sum_queries<Bf16, 128>(p); }
ENTRY(sum_queries_f16_64, Backward, THREADS, 8) { sum_queries<F16, 64>(p); }
ENTRY(sum_queries_f16_128, Backward, THREADS, 8) { sum_queries<F16, 128>(p); }
ENTRY(sum_keys_bf16_64, Backward, THREADS, 8) { sum_keys<Bf16, 64>(p); }
ENTRY(sum_keys_bf16_128, Backward, THREADS, 8) { sum_keys<Bf16, 128>(p); }
ENTRY(sum_keys_f16_64, Backward, THREADS, 8) { sum_keys<F16, 64>(p); }
ENTRY(sum_keys_f16_128, Backward, THREADS, 8) { sum_keys<F16, 128>(p); }
