// Softmax over the keys that a list names, online (Milakov and Gimelshein, algorithm 3), in base 2, for 64 queries of one
// head that four warps hold. Queries with long lists are computed in parts, which are joined by their log-sum-exp.
struct Forward {
    const u16 *query, *key, *value; // (batch, queries or keys, heads, D)
    u16* out;                       // as query
    float* lse;                     // (batch, heads, queries), natural
    float* parts;                   // (batch, heads, slots, 64, D)
    float* part_lse;                // (batch, heads, slots, 64), base 2
    Lists lists;
    int queries, keys, slots;
    float scale; // 1 / sqrt(D) in base 2
};

// Maximum and sum of this lane's two rows.
struct Running {
    float maximum[2], sum[2];
};

// scores -> exp2(scores - maximum). What was summed before is to be multiplied by `old`, row by row.
INLINE void soften(float (&scores)[TILE / 8][4], float (&old)[2], Running& running, float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = -infinity();
#pragma unroll
        for (int i = 0; i < TILE / 8; i++) top = maximum(top, maximum(scores[i][2 * half], scores[i][2 * half + 1]));
        top = maximum(top, shuffle_xor(top, 1));
        top = maximum(running.maximum[half], maximum(top, shuffle_xor(top, 2)) * scale);
        // A row that has seen nothing yet keeps its zeros: -inf - -inf would be no number.
        float base = top == -infinity() ? 0 : top, total = 0;
        old[half] = exp2_of(running.maximum[half] - base);
        running.maximum[half] = top;
#pragma unroll
        for (int i = 0; i < TILE / 8; i++)
#pragma unroll
            for (int j = 2 * half; j < 2 * half + 2; j++) {
                scores[i][j] = exp2_of(scores[i][j] * scale - base);
                total += scores[i][j];
            }
        running.sum[half] = running.sum[half] * old[half] + total;
    }
}

template <int N>
INLINE void scale_rows(float (&sums)[N][4], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i][j] *= by[j / 2];
}

INLINE void hide(float (&scores)[TILE / 8][4], u32 seen) {
#pragma unroll
    for (int i = 0; i < TILE / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (!(seen >> (4 * i + j) & 1)) scores[i][j] = -infinity();
}

template <class T, int D>
INLINE void finish(const Forward& p, Work work, float (&sums)[D / 8][4], Running& running) {
    int lane = thread() % 32, first = thread() / 32 * 16 + lane / 4;
    float scale[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = running.sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        scale[half] = sum > 0 ? 1 / sum : 0;
        lse[half] = sum > 0 ? running.maximum[half] + log2_of(sum) : -infinity();
    }
    bool whole = work.slot < 0;
    i64 part = head() * p.slots + work.slot;
    float* to = whole ? p.lse + head() * p.queries + work.first : p.part_lse + part * TILE;
    for (int half = 0; half < 2; half++)
        if (lane % 4 == 0 && first + half * 8 < work.count) to[first + half * 8] = lse[half] * (whole ? LN_2 : 1);
    if (whole)
        store<T, D>(p.out + place<D>(p.queries, work.first), (i64)gridDim.y * D, work.count, sums, scale, T());
    else
        store_part<D>(p.parts + part * TILE * D, sums, scale);
}
