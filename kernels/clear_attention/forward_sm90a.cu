// The forward for compute capability 9.0. Two warpgroups compute a tile of a pair each; one thread of a third has the
// device copy tiles of keys and values into a ring, which both read. While a warpgroup takes the softmax of one tile's
// scores, its product with the values before is under way (Shah et al., FlashAttention-3, section 3.2).
constexpr int BLOCK = 3 * THREADS;

// Where in the ring a thread is.
struct Turn {
    int stage = 0;
    u32 parity = 0;
};

template <int D>
struct Ring {
    static constexpr int STAGES = 6, BYTES = TILE * D * 2, BOX = TILE * 128;
    u8* memory;

    INLINE u8* key(int stage) const { return memory + 2 * stage * BYTES; }
    INLINE u8* value(int stage) const { return memory + (2 * stage + 1) * BYTES; }
    INLINE u64* full(int stage) const { return (u64*)(memory + 2 * STAGES * BYTES) + stage; }
    INLINE u64* free(int stage) const { return full(STAGES + stage); }

    INLINE void begin() const {
        for (int stage = 0; stage < STAGES; stage++) {
            begin_barrier(full(stage), 1);
            begin_barrier(free(stage), 2 * THREADS / 32); // a lane of each warp
        }
        publish_barriers();
    }

    INLINE void load(const PairedForward& p, int first, Turn turn) const {
        wait_for_phase(free(turn.stage), turn.parity ^ 1);
        arrive_and_expect(full(turn.stage), 2 * BYTES);
#pragma unroll
        for (int box = 0; box < D / 64; box++) {
            load_box(key(turn.stage) + box * BOX, &p.key, box * 64, blockIdx.y, first, blockIdx.z, full(turn.stage));
            load_box(value(turn.stage) + box * BOX, &p.value, box * 64, blockIdx.y, first, blockIdx.z, full(turn.stage));
        }
    }

    INLINE void wait(Turn turn) const { wait_for_phase(full(turn.stage), turn.parity); }
    INLINE void release(int stage) const {
        if (threadIdx.x % 32 == 0) arrive(free(stage));
    }
    INLINE void next(Turn& turn) const {
        if (++turn.stage < STAGES) return;
        turn.stage = 0;
        turn.parity ^= 1;
    }
};

template <int D>
INLINE void produce(const PairedForward& p, Ring<D> ring) {
    Turn turn;
    for (int i = blockIdx.x; i < p.count; i += gridDim.x) {
        int end = p.pairs[i].end;
        for (int j = p.pairs[i].begin; j < end; j++, ring.next(turn)) ring.load(p, p.visits[j].first, turn);
    }
}

// What a warpgroup meets of a pair's visits, one after the other.
template <int D>
struct Cursor {
    const PairedForward& p;
    Ring<D> ring;
    int tile;
    Turn turn; // of the visit that comes next
    int at, own, end, ahead;

    INLINE void begin(const Pair& pair) {
        at = pair.begin;
        own = pair.own[tile];
        end = pair.end;
        ahead = mask(at);
    }
    // Waits for the next tile that is seen: its stage and its mask; false behind the last.
    INLINE bool next(int& stage, int& seen) {
        while (at < own) {
            seen = ahead;
            ahead = mask(at + 1);
            ring.wait(turn);
            stage = pass();
            if (seen != UNSEEN) return true;
            ring.release(stage);
        }
        return false;
    }
    // Hands back what the other warpgroup sees alone.
    INLINE void leave() {
        while (at < end) {
            ring.wait(turn);
            ring.release(pass());
        }
    }

  private:
    INLINE int mask(int visit) const { return p.visits[visit < end ? visit : end - 1].masks[tile]; }
    INLINE int pass() {
        int stage = turn.stage;
        ring.next(turn);
        at++;
        return stage;
    }
};

// Rows 16 · warp .. of a tile of queries as the left side of products; those from `count` on are zeros.
template <int D>
INLINE void load_query(u32 (&to)[D / 16][4], const u16* from, i64 stride, int count) {
    int lane = thread() % 32, first = thread() / 32 * 16 + lane / 4;
#pragma unroll
    for (int step = 0; step < D / 16; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first + i % 2 * 8, column = step * 16 + i / 2 * 8 + lane % 4 * 2;
            to[step][i] = row < count ? *(const u32*)(from + row * stride + column) : 0;
        }
}

template <class T, int D>
INLINE void start_scores(float (&scores)[TILE / 8][4], const u32 (&query)[D / 16][4], const u8* key) {
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u64 right = right_side(key + step / 4 * Ring<D>::BOX + step % 4 * 32, 1024, 0);
        multiply_add_async<false>(scores, query[step], right, step > 0, T());
    }
    commit_products();
}

template <class T, int D>
INLINE void start_sums(float (&sums)[D / 8][4], const u32 (&weights)[TILE / 16][4], const u8* value) {
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
        multiply_add_async<true>(sums, weights[step], right_side(value + step * 2048, 1024, Ring<D>::BOX), true, T());
    commit_products();
}

// A tile of weights as the left side of products.
template <class T>
INLINE void pack_weights(u32 (&to)[TILE / 16][4], const float (&from)[TILE / 8][4], T type) {
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) left_of_weights(to[step], from[2 * step], from[2 * step + 1], type);
}

// Attention of one tile of queries, which meets one of keys at least.
template <class T, int D>
INLINE void attend(const PairedForward& p, Work work, Cursor<D>& cursor) {
    const Ring<D>& ring = cursor.ring;
    u32 query[D / 16][4], weights[TILE / 16][4];
    load_query<D>(query, p.forward.query + place<D>(p.forward.queries, work.first), (i64)gridDim.y * D, work.count);
    float scores[TILE / 8][4], sums[D / 8][4], old[2];
    clear(sums);
    Running running = {{-infinity(), -infinity()}, {0, 0}};
    int stage, mask;
    cursor.next(stage, mask);
    u32 bits = seen(p.forward.lists, mask);
    settle(query);
    order_registers();
    start_scores<T, D>(scores, query, ring.key(stage));
    wait_products<0>();
    settle(scores);
    if (mask != WHOLE) hide(scores, bits);
    soften(scores, old, running, p.forward.scale);
    pack_weights(weights, scores, T());
    settle(sums);
    settle(weights);
    int before = stage; // its values are still to be added
    for (; cursor.next(stage, mask); before = stage) {
        bits = seen(p.forward.lists, mask);
        order_registers();
        start_scores<T, D>(scores, query, ring.key(stage));
        start_sums<T, D>(sums, weights, ring.value(before));
        wait_products<1>();
        settle(scores);
        if (mask != WHOLE) hide(scores, bits);
        soften(scores, old, running, p.forward.scale);
        settle(scores);
        finish_before_waiting(running.sum[0] + running.sum[1]);
        wait_products<0>();
        settle(sums);
        settle(scores);
        ring.release(before);
        scale_rows(sums, old);
        pack_weights(weights, scores, T());
        settle(sums);
        settle(weights);
    }
    order_registers();
    start_sums<T, D>(sums, weights, ring.value(before));
    wait_products<0>();
    settle(sums);
    ring.release(before);
    finish<T, D>(p.forward, work, sums, running);
}

template <class T, int D>
INLINE void consume(const PairedForward& p, Ring<D> ring) {
    Cursor<D> cursor = {p, ring, uniform(threadIdx.x / THREADS)};
    for (int i = blockIdx.x; i < p.count; i += gridDim.x) {
        const Pair& pair = p.pairs[i];
        int work = pair.works[cursor.tile];
        cursor.begin(pair);
        if (work >= 0) attend<T, D>(p, p.forward.lists.work[work], cursor);
        cursor.leave();
    }
}

template <class T, int D>
INLINE void forward_sm90a(const PairedForward& p) {
    Ring<D> ring = {shared_memory()};
    if (threadIdx.x == 0) ring.begin();
    __syncthreads();
    if (threadIdx.x < 2 * THREADS) {
        take_registers<232>();
        consume<T, D>(p, ring);
    } else {
        keep_registers<40>();
        if (threadIdx.x == 2 * THREADS) produce<D>(p, ring);
    }
}

ENTRY(forward_sm90a_bf16_64, PairedForward, BLOCK, 1) { forward_sm90a<Bf16, 64>(p); }
ENTRY(forward_sm90a_bf16_128, PairedForward, BLOCK, 1) { forward_sm90a<Bf16, 128>(p); }
ENTRY(forward_sm90a_f16_64, PairedForward, BLOCK, 1) { forward_sm90a<F16, 64>(p); }
ENTRY(forward_sm90a_f16_128, PairedForward, BLOCK, 1) { forward_sm90a<F16, 128>(p); }
