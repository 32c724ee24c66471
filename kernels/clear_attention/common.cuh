// Tiles of 64 rows in shared memory, and the lists that say which of them meet. Knows no softmax.
// Four warps share a tile, 16 rows each. In a 16 x 8 product a lane holds columns 2t and 2t + 1 of rows g and g + 8,
// with g = lane / 4 and t = lane % 4.
constexpr int TILE = 64;
constexpr int HALF = 32;
constexpr int THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Number of this thread among those that share a tile.
#ifdef WARPGROUPS
INLINE u32 thread() { return threadIdx.x % THREADS; }
#else
INLINE u32 thread() { return threadIdx.x; }
#endif

// Rows that one block computes: [first, first + count), at most 64, against entries [begin, end), at least one. With
// slot >= 0 the result is a part.
struct Work {
    int first, count, begin, end, slot;
};

// Columns that are visited: [first, first + count), at most 64. `mask` is WHOLE, or the number of a mask, or -2 - i for
// the mask of text tile i of this batch entry.
struct Entry {
    int first, count, mask;
};
constexpr int WHOLE = -1;

// What a block of rows visits. A mask is a word per thread: bit 4 i + j for row 16 warp + g + j / 2 · 8 and column
// 8 i + 2 t + j % 2. `padding` is (batch, text_tiles) masks.
struct Lists {
    const Work* work;
    const Entry* entries;
    const u32* masks;
    const u32* padding;
    int text_tiles;
};

INLINE u32 seen(const Lists& lists, int mask) {
    if (mask == WHOLE) return ~0u;
    i64 text = (i64)blockIdx.z * lists.text_tiles - 2 - mask;
    const u32* from = mask >= 0 ? lists.masks + (i64)mask * THREADS : lists.padding + text * THREADS;
    return from[thread()];
}

// Bytes from the start of a tile to eight numbers of a row; chunks change places so that ldmatrix meets every bank once.
template <int D>
INLINE int offset(int row, int chunk) {
    return row * D * 2 + ((chunk ^ (row & 7)) << 4);
}

// Starts the copy of rows of one head; those from `count` on become zeros.
template <int D, int ROWS>
INLINE void load_tile(u8* to, const u16* from, i64 stride, int count) {
#pragma unroll
    for (int i = 0; i < ROWS * D / 8 / THREADS; i++) {
        int index = i * THREADS + thread(), row = index / (D / 8), chunk = index % (D / 8);
        bool inside = row < count;
        copy_async(to + offset<D>(row, chunk), from + (inside ? row : 0) * stride + chunk * 8, inside);
    }
}

// Rows 16 · warp .. of a tile as the left side of a product, 16 columns.
template <int D>
INLINE void left(u32 (&to)[4], const u8* tile, int step) {
    int lane = thread() % 32, row = thread() / 32 * 16 + lane % 16;
    load_matrices(to, tile + offset<D>(row, step * 2 + lane / 16));
}

// Sixteen rows of a tile as columns of the right side (its transpose), 16 deep.
template <int D>
INLINE void right_of_rows(u32 (&to)[4], const u8* tile, int first_row, int step) {
    int lane = thread() % 32;
    load_matrices(to, tile + offset<D>(first_row + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
}

// Sixteen rows of a tile as the depth of the right side, 16 columns wide.
template <int D>
INLINE void right_of_columns(u32 (&to)[4], const u8* tile, int first_row, int step) {
    int lane = thread() % 32;
    load_matrices_transposed(to, tile + offset<D>(first_row + lane % 16, step * 2 + lane / 16));
}

// sums += left (16 x 16 of D, at `step`) · transpose of rows [first_row, + 8 N) of `tile`.
template <class T, int D, int N>
INLINE void add_scores(float (&sums)[N][4], const u32 (&a)[4], const u8* tile, int first_row, int step, T type) {
#pragma unroll
    for (int pair = 0; pair < N / 2; pair++) {
        u32 b[4];
        right_of_rows<D>(b, tile, first_row + pair * 16, step);
        multiply_add(sums[2 * pair], a, b[0], b[1], type);
        multiply_add(sums[2 * pair + 1], a, b[2], b[3], type);
    }
}

// Weights (16 x 16, rounded) as the left side of a product.
template <class T>
INLINE void left_of_weights(u32 (&to)[4], const float (&low)[4], const float (&high)[4], T type) {
    to[0] = pack(low[0], low[1], type);
    to[1] = pack(low[2], low[3], type);
    to[2] = pack(high[0], high[1], type);
    to[3] = pack(high[2], high[3], type);
}

// sums += weights (16 x 8 N, rounded) · rows [first_row, + 8 N) of `tile`, D wide.
template <class T, int D, int N>
INLINE void add_product(float (&sums)[D / 8][4], const float (&weights)[N][4], const u8* tile, int first_row, T type) {
#pragma unroll
    for (int pair = 0; pair < N / 2; pair++) {
        u32 a[4];
        left_of_weights(a, weights[2 * pair], weights[2 * pair + 1], type);
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            u32 b[4];
            right_of_columns<D>(b, tile, first_row + pair * 16, step);
            multiply_add(sums[2 * step], a, b[0], b[1], type);
            multiply_add(sums[2 * step + 1], a, b[2], b[3], type);
        }
    }
}

// This lane's 2 rows of a result of D columns, scaled row by row, to tokens of one head.
template <class T, int D>
INLINE void store(u16* to, i64 stride, int count, const float (&sums)[D / 8][4], const float (&scale)[2], T type) {
    int lane = thread() % 32, first = thread() / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + half * 8;
        if (row >= count) continue;
        u32* line = (u32*)(to + row * stride) + lane % 4;
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            line[i * 4] = pack(sums[i][2 * half] * scale[half], sums[i][2 * half + 1] * scale[half], type);
    }
}

// The same as f32 to a part of (64, D).
template <int D>
INLINE void store_part(float* to, const float (&sums)[D / 8][4], const float (&scale)[2]) {
    int lane = thread() % 32, first = thread() / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float* line = to + (first + half * 8) * D + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            line[i * 8] = sums[i][2 * half] * scale[half];
            line[i * 8 + 1] = sums[i][2 * half + 1] * scale[half];
        }
    }
}

template <int N>
INLINE void clear(float (&sums)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        for (int j = 0; j < 4; j++) sums[i][j] = 0;
}

// Number of this head among all: tensors of (batch, heads, ..) are counted by it.
INLINE i64 head() { return (i64)blockIdx.z * gridDim.y + blockIdx.y; }

// Where a token of this head begins in (batch, tokens, heads, D).
template <int D>
INLINE i64 place(int tokens, int token) {
    return (((i64)blockIdx.z * tokens + token) * gridDim.y + blockIdx.y) * D;
}
