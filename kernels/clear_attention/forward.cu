// A block computes 64 queries of one head; keys come 64 at a time through two buffers.
template <int D>
struct Tiles {
    static constexpr int BYTES = TILE * D * 2;
    u8* memory;
    INLINE u8* key(int stage) const { return memory + stage * BYTES; }
    INLINE u8* value(int stage) const { return memory + (2 + stage) * BYTES; }

    INLINE void load(const Forward& p, Entry entry, int stage) const {
        i64 from = place<D>(p.keys, entry.first), stride = (i64)gridDim.y * D;
        load_tile<D, TILE>(key(stage), p.key + from, stride, entry.count);
        load_tile<D, TILE>(value(stage), p.value + from, stride, entry.count);
        commit_copies();
    }
};

template <class T, int D>
INLINE void visit(const u8* key, const u8* value, const u32 (&query)[D / 16][4], bool whole, u32 seen, float scale,
                  float (&sums)[D / 8][4], Running& running) {
    float scores[TILE / 8][4];
    clear(scores);
#pragma unroll
    for (int step = 0; step < D / 16; step++) add_scores<T, D>(scores, query[step], key, 0, step, T());
    if (!whole) hide(scores, seen);
    float old[2];
    soften(scores, old, running, scale);
    scale_rows(sums, old);
    add_product<T, D>(sums, scores, value, 0, T());
}

template <class T, int D>
INLINE void forward(const Forward& p) {
    Tiles<D> tiles = {shared_memory()};
    Work work = p.lists.work[blockIdx.x];
    u8* staged = tiles.key(1); // free until the second entry
    load_tile<D, TILE>(staged, p.query + place<D>(p.queries, work.first), (i64)gridDim.y * D, work.count);
    commit_copies();
    Entry next = p.lists.entries[work.begin];
    tiles.load(p, next, 0);
    u32 next_seen = seen(p.lists, next.mask);
    wait_copies<1>();
    __syncthreads();
    u32 query[D / 16][4];
#pragma unroll
    for (int step = 0; step < D / 16; step++) left<D>(query[step], staged, step);
    float sums[D / 8][4];
    clear(sums);
    Running running = {{-infinity(), -infinity()}, {0, 0}};
    for (int i = work.begin; i < work.end; i++) {
        int stage = (i - work.begin) & 1;
        bool whole = next.mask == WHOLE;
        u32 bits = next_seen;
        wait_copies<0>();
        __syncthreads(); // what the other stage held has been used by all
        if (i + 1 < work.end) {
            next = p.lists.entries[i + 1];
            tiles.load(p, next, stage ^ 1);
            next_seen = seen(p.lists, next.mask);
        }
        visit<T, D>(tiles.key(stage), tiles.value(stage), query, whole, bits, p.scale, sums, running);
    }
    finish<T, D>(p, work, sums, running);
}

// Joins the parts [begin, end) of a query tile: out = Σ 2^(lse_i - lse) out_i.
template <class T, int D>
INLINE void merge(const Forward& p) {
    Work work = p.lists.work[blockIdx.x];
    i64 first = head() * p.slots + work.begin;
    int parts = work.end - work.begin;
    for (int index = threadIdx.x; index < work.count * D / 2; index += THREADS) {
        int row = index / (D / 2), column = index % (D / 2) * 2;
        float top = -infinity(), total = 0, low = 0, high = 0;
        for (int i = 0; i < parts; i++) top = maximum(top, p.part_lse[(first + i) * TILE + row]);
        float base = top == -infinity() ? 0 : top;
        for (int i = 0; i < parts; i++) {
            float weight = exp2_of(p.part_lse[(first + i) * TILE + row] - base);
            const float* part = p.parts + ((first + i) * TILE + row) * D + column;
            total += weight;
            low += weight * part[0];
            high += weight * part[1];
        }
        float scale = total > 0 ? 1 / total : 0;
        *(u32*)(p.out + place<D>(p.queries, work.first + row) + column) = pack(low * scale, high * scale, T());
        if (column == 0)
            p.lse[head() * p.queries + work.first + row] = (total > 0 ? top + log2_of(total) : -infinity()) * LN_2;
    }
}

ENTRY(forward_bf16_64, Forward, THREADS, 4) { forward<Bf16, 64>(p); }
ENTRY(forward_bf16_128, Forward, THREADS, 2) { forward<Bf16, 128>(p); }
ENTRY(forward_f16_64, Forward, THREADS, 4) { forward<F16, 64>(p); }
ENTRY(forward_f16_128, Forward, THREADS, 2) { forward<F16, 128>(p); }
ENTRY(merge_bf16_64, Forward, THREADS, 4) { merge<Bf16, 64>(p); }
ENTRY(merge_bf16_128, Forward, THREADS, 4) { merge<Bf16, 128>(p); }
ENTRY(merge_f16_64, Forward, THREADS, 4) { merge<F16, 64>(p); }
ENTRY(merge_f16_128, Forward, THREADS, 4) { merge<F16, 128>(p); }
