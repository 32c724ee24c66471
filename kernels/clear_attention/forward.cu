// Softmax over the keys that a list names, online (Milakov and Gimelshein, algorithm 3), in base 2.
// A block computes 64 queries of one head; keys come 64 at a time through two buffers. Queries with long lists are
// computed in parts, which `merge` joins by their log-sum-exp.
struct Forward {
    const u16 *query, *key, *value; // (batch, queries or keys, heads, D)
    u16* out;                       // as query
    float* lse;                     // (batch, heads, queries), natural
    float* parts;                   // (batch, heads, slots, 64, D)
    float* part_lse;                // (batch, heads, slots, 64), base 2
    const Work* work;
    const Entry* entries;
    Plane plane;
    int queries, keys, slots;
    float scale; // 1 / sqrt(D) in base 2
};

// Maximum and sum of this lane's two rows.
struct Running {
    float maximum[2], sum[2];
};

// scores -> exp2(scores - maximum), and what was summed before is scaled to the new maximum.
template <int D>
INLINE void soften(float (&scores)[TILE / 8][4], float (&sums)[D / 8][4], Running& running, float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = -infinity();
#pragma unroll
        for (int i = 0; i < TILE / 8; i++) top = maximum(top, maximum(scores[i][2 * half], scores[i][2 * half + 1]));
        top = maximum(top, shuffle_xor(top, 1));
        top = maximum(running.maximum[half], maximum(top, shuffle_xor(top, 2)) * scale);
        // A row that has seen nothing yet keeps its zeros: -inf - -inf would be no number.
        float base = top == -infinity() ? 0 : top, old = exp2_of(running.maximum[half] - base), total = 0;
        running.maximum[half] = top;
#pragma unroll
        for (int i = 0; i < TILE / 8; i++)
#pragma unroll
            for (int j = 2 * half; j < 2 * half + 2; j++) {
                scores[i][j] = exp2_of(scores[i][j] * scale - base);
                total += scores[i][j];
            }
        running.sum[half] = running.sum[half] * old + total;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            sums[i][2 * half] *= old;
            sums[i][2 * half + 1] *= old;
        }
    }
}

INLINE void mask(float (&scores)[TILE / 8][4], const int* marks, const int (&places)[2], int limit, int cover) {
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < TILE / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (!sees(places[j / 2], marks[i * 8 + column + j % 2], limit, cover)) scores[i][j] = -infinity();
}

template <class T, int D>
struct Tiles {
    static constexpr int BYTES = TILE * D * 2;
    u8* memory;
    INLINE u8* key(int stage) const { return memory + stage * BYTES; }
    INLINE u8* value(int stage) const { return memory + (2 + stage) * BYTES; }
    INLINE int* marks(int stage) const { return (int*)(memory + 4 * BYTES) + stage * TILE; }

    INLINE void load(const Forward& p, Entry entry, int stage) const {
        i64 stride = (i64)gridDim.y * D, from = ((i64)blockIdx.z * p.keys + entry.first) * stride + blockIdx.y * D;
        load_tile<D>(key(stage), p.key + from, stride, entry.count);
        load_tile<D>(value(stage), p.value + from, stride, entry.count);
        int row = threadIdx.x;
        if (row < TILE) marks(stage)[row] = key_mark(p.plane, entry, entry.first + row, row < entry.count);
    }
};

template <class T, int D>
INLINE void visit(const Forward& p, const Tiles<T, D>& tiles, int stage, Entry entry, const u32 (&query)[D / 16][4],
                  const int (&places)[2], float (&sums)[D / 8][4], Running& running) {
    float scores[TILE / 8][4];
    clear(scores);
#pragma unroll
    for (int step = 0; step < D / 16; step++)
#pragma unroll
        for (int pair = 0; pair < TILE / 16; pair++) {
            u32 b[4];
            right_of_rows<D>(b, tiles.key(stage), pair * 16, step);
            multiply_add(scores[2 * pair], query[step], b[0], b[1], T());
            multiply_add(scores[2 * pair + 1], query[step], b[2], b[3], T());
        }
    if (entry.cover != WHOLE || entry.count < TILE) mask(scores, tiles.marks(stage), places, p.plane.limit, entry.cover);
    soften<D>(scores, sums, running, p.scale);
#pragma unroll
    for (int pair = 0; pair < TILE / 16; pair++) {
        u32 a[4];
        pack_left(a, scores[2 * pair], scores[2 * pair + 1], T());
        add_product<T, D>(sums, a, tiles.value(stage), pair * 16, T());
    }
}

template <class T, int D>
INLINE void finish(const Forward& p, Work work, float (&sums)[D / 8][4], Running& running) {
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 4;
    float scale[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = running.sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        scale[half] = sum > 0 ? 1 / sum : 0;
        lse[half] = sum > 0 ? running.maximum[half] + log2_of(sum) : -infinity();
    }
    i64 part = part_of(work.slot, p.slots), stride = (i64)gridDim.y * D;
    float* to = work.slot >= 0 ? p.part_lse + part * TILE
                               : p.lse + ((i64)blockIdx.z * gridDim.y + blockIdx.y) * p.queries + work.first;
    float unit = work.slot >= 0 ? 1 : LN_2;
    for (int half = 0; half < 2; half++)
        if (lane % 4 == 0 && first + half * 8 < work.count) to[first + half * 8] = lse[half] * unit;
    if (work.slot >= 0) {
        store_part<D>(p.parts + part * TILE * D, sums, scale);
    } else {
        u16* out = p.out + ((i64)blockIdx.z * p.queries + work.first) * stride + blockIdx.y * D;
        store<T, D>(out, stride, work.count, sums, scale, T());
    }
}

template <class T, int D>
INLINE void forward(const Forward& p) {
    Tiles<T, D> tiles = {shared_memory()};
    Work work = p.work[blockIdx.x];
    i64 stride = (i64)gridDim.y * D;
    const u16* from = p.query + ((i64)blockIdx.z * p.queries + work.first) * stride + blockIdx.y * D;
    load_tile<D>(tiles.key(1), from, stride, work.count); // free until the second entry
    tiles.load(p, p.entries[work.begin], 0);
    commit_copies();
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, places[2];
    for (int half = 0; half < 2; half++)
        places[half] = query_place(p.plane, work.first + row + half * 8, row + half * 8 < work.count);
    wait_copies<0>();
    __syncthreads();
    u32 query[D / 16][4];
#pragma unroll
    for (int step = 0; step < D / 16; step++) left<D>(query[step], tiles.key(1), step);
    __syncthreads();
    float sums[D / 8][4];
    clear(sums);
    Running running = {{-infinity(), -infinity()}, {0, 0}};
    for (int i = work.begin; i < work.end; i++) {
        int stage = (i - work.begin) & 1;
        if (i + 1 < work.end) {
            tiles.load(p, p.entries[i + 1], stage ^ 1);
            commit_copies();
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        visit<T, D>(p, tiles, stage, p.entries[i], query, places, sums, running);
        __syncthreads();
    }
    finish<T, D>(p, work, sums, running);
}

// Joins the parts [begin, end) of a query tile: out = Σ 2^(lse_i - lse) out_i.
template <class T, int D>
INLINE void merge(const Forward& p) {
    Work work = p.work[blockIdx.x];
    i64 stride = (i64)gridDim.y * D, first = part_of(work.begin, p.slots);
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
        u16* out = p.out + ((i64)blockIdx.z * p.queries + work.first + row) * stride + blockIdx.y * D + column;
        *(u32*)out = pack(low * scale, high * scale, T());
        if (column == 0)
            p.lse[((i64)blockIdx.z * gridDim.y + blockIdx.y) * p.queries + work.first + row] =
                (total > 0 ? top + log2_of(total) : -infinity()) * LN_2;
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
