// What kernels over rows of numbers share: 16 bytes to a thread, sums over a group of threads. Knows no kernel.
constexpr int THREADS = 128;

// Number of this thread in the grid. A tensor has fewer than 2^32 times 16 bytes, and divisions of 64 bits are slow.
INLINE u32 thread_number() { return (u32)blockIdx.x * THREADS + threadIdx.x; }

// Σ over `lanes` threads that stand side by side, a power of two up to 32; every thread of the warp has to come here.
INLINE float sum_of_lanes(float x, int lanes) {
    for (int step = 1; step < lanes; step *= 2) x += shuffle_xor(x, step);
    return x;
}

// Σ over the block, in an order that does not vary. `slots` are 4 of shared memory that nothing else uses.
INLINE float sum_of_block(float x, float* slots) {
    x = sum_of_lanes(x, 32);
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    return (slots[0] + slots[1]) + (slots[2] + slots[3]);
}

template <int N>
INLINE void clear(float (&numbers)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) numbers[i] = 0;
}
