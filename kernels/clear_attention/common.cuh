// Tiles of 64 rows in shared memory, and the lists that say which of them meet. Knows no softmax.
// Four warps share a tile, 16 rows each. In a 16 x 8 product a lane holds columns 2t and 2t + 1 of rows g and g + 8,
// with g = lane / 4 and t = lane % 4.
constexpr int TILE = 64;
constexpr int THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Rows that one block computes: [first, first + count) against entries [begin, end). With slot >= 0 the result is a part.
struct Work {
    int first, count, begin, end, slot;
};

// Rows that are visited: [first, first + count). cover: 0 each sees each, 1 the distance decides, 2 padded text.
struct Entry {
    int first;
    short count, cover;
};
enum { WHOLE = 0, DISC = 1, PADDED = 2 };

// Where tokens lie: `places` holds row << 16 | column of image tokens, `visible` (batch, text) a byte per text token.
struct Plane {
    const int* places;
    const u8* visible;
    int text, limit;
};
constexpr int HIDDEN = -1;

// Key `index` of a tile as the mask needs it: its place, or HIDDEN.
INLINE int key_mark(const Plane& plane, Entry pair, int key, bool inside) {
    if (!inside) return HIDDEN;
    if (pair.cover == PADDED) return plane.visible[(i64)blockIdx.z * plane.text + key] ? 0 : HIDDEN;
    return pair.cover == DISC ? plane.places[key - plane.text] : 0;
}

INLINE int query_place(const Plane& plane, int query, bool inside) {
    return inside && query >= plane.text && plane.limit > 0 ? plane.places[query - plane.text] : 0;
}

INLINE bool sees(int query, int key, int limit, int cover) {
    int dy = (query >> 16) - (key >> 16), dx = (query & 0xffff) - (key & 0xffff);
    return key != HIDDEN && (cover != DISC || dy * dy + dx * dx < limit);
}

// Bytes from the start of a tile to eight numbers of a row; chunks change places so that ldmatrix meets every bank once.
template <int D>
INLINE int offset(int row, int chunk) {
    return row * D * 2 + ((chunk ^ (row & 7)) << 4);
}

// Starts the copy of rows of one head; those from `count` on become zeros.
template <int D>
INLINE void load_tile(u8* to, const u16* from, i64 stride, int count) {
#pragma unroll
    for (int i = 0; i < TILE * D / 8 / THREADS; i++) {
        int index = i * THREADS + threadIdx.x, row = index / (D / 8), chunk = index % (D / 8);
        bool inside = row < count;
        copy_async(to + offset<D>(row, chunk), from + (inside ? row : 0) * stride + chunk * 8, inside);
    }
}

// Rows 16 · warp .. of a tile as the left side of a product, 16 columns.
template <int D>
INLINE void left(u32 (&to)[4], const u8* tile, int step) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    load_matrices(to, tile + offset<D>(row, step * 2 + lane / 16));
}

// Sixteen rows of a tile as columns of the right side (its transpose), 16 deep.
template <int D>
INLINE void right_of_rows(u32 (&to)[4], const u8* tile, int first_row, int step) {
    int lane = threadIdx.x % 32;
    load_matrices(to, tile + offset<D>(first_row + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
}

// Sixteen rows of a tile as the depth of the right side, 16 columns wide.
template <int D>
INLINE void right_of_columns(u32 (&to)[4], const u8* tile, int first_row, int step) {
    int lane = threadIdx.x % 32;
    load_matrices_transposed(to, tile + offset<D>(first_row + lane % 16, step * 2 + lane / 16));
}

// Columns 16 · step .. of a product, as the left side of the next one.
template <class T>
INLINE void pack_left(u32 (&to)[4], const float (&a)[4], const float (&b)[4], T type) {
    to[0] = pack(a[0], a[1], type);
    to[1] = pack(a[2], a[3], type);
    to[2] = pack(b[0], b[1], type);
    to[3] = pack(b[2], b[3], type);
}

// sums += left (16 x 16) · rows [first_row, +16) of `tile`, D wide.
template <class T, int D>
INLINE void add_product(float (&sums)[D / 8][4], const u32 (&a)[4], const u8* tile, int first_row, T type) {
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u32 b[4];
        right_of_columns<D>(b, tile, first_row, step);
        multiply_add(sums[2 * step], a, b[0], b[1], type);
        multiply_add(sums[2 * step + 1], a, b[2], b[3], type);
    }
}

// This lane's 2 rows of a result of D columns, scaled row by row, to tokens of one head.
template <class T, int D>
INLINE void store(u16* to, i64 stride, int count, const float (&sums)[D / 8][4], const float (&scale)[2], T type) {
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 4;
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
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 4;
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

// Number of a part: (batch, head, slot).
INLINE i64 part_of(int slot, int slots) { return ((i64)blockIdx.z * gridDim.y + blockIdx.y) * slots + slot; }
