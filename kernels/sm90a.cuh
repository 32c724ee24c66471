// What kernels for compute capability 9.0 use of the device beyond prelude.cuh: barriers in shared memory, boxes of a
// tensor that the device copies by itself, and products of a warpgroup, four warps, that run on while it does other work.
typedef unsigned long long u64;

// Parameters stay where they are, for the device to read what they say of tensors. Blocks have several warpgroups.
#undef ENTRY
#define ENTRY(name, Parameters, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Parameters p)
#define WARPGROUPS

INLINE u32 shared_address(const void* memory) { return (u32)__cvta_generic_to_shared(memory); }

// A phase of a barrier ends when `arrivals` threads, and all bytes that were expected, have arrived.
INLINE void begin_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Barriers that this thread began are there for those that copy. The block has to wait for it all the same.
INLINE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

INLINE void arrive_and_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Until a phase of this parity has ended. A new barrier counts as behind one of parity 1.
INLINE void wait_for_phase(u64* barrier, u32 parity) {
    u32 ended = 0;
    while (!ended)
        asm volatile("{\n"
                     ".reg .pred ended;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, ended;\n"
                     "}"
                     : "=r"(ended)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}

// Starts the copy of a box of a tensor of four dimensions; its bytes arrive at the barrier.
INLINE void load_box(void* to, const void* map, int x, int y, int z, int w, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
                 "[%6];" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
                 : "memory");
}

// Registers of each thread of this warpgroup from here on.
template <int COUNT>
INLINE void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
INLINE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The same value in all lanes, as the compiler can see.
INLINE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Before products that read or add to registers which were written since the last ones.
INLINE void order_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N groups of products are under way.
template <int N>
INLINE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps what reads these registers behind the wait before it, and what writes them before the order that comes next.
template <int N>
INLINE void settle(float (&sums)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])::"memory");
}
template <int N>
INLINE void settle(u32 (&factors)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(factors[i][0]), "+r"(factors[i][1]), "+r"(factors[i][2]), "+r"(factors[i][3])::"memory");
}

// Has `x`, which is never negative, computed here. The compiler moves a wait up as far as a branch and would leave
// nothing to do meanwhile.
INLINE void finish_before_waiting(float x) {
    if (x < 0) asm volatile("trap;");
}

// The right side of a product: rows of 128 bytes in shared memory, whose chunks of 16 bytes have changed places, from a
// multiple of 1024 bytes on. `group` is how far eight rows further lies, `block` how far 64 columns further.
INLINE u64 right_side(const void* memory, int group, int block) {
    u64 swizzle_128 = (u64)1 << 62;
    return swizzle_128 | (u64)(group >> 4) << 32 | (u64)(block >> 4) << 16 | shared_address(memory) >> 4;
}

#define SUMS_4(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define SUMS_32(i) \
    SUMS_4(i), SUMS_4(i + 1), SUMS_4(i + 2), SUMS_4(i + 3), SUMS_4(i + 4), SUMS_4(i + 5), SUMS_4(i + 6), SUMS_4(i + 7)
#define NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
    "%25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// sums (64 x 8 N, f32) += or = a (64 x 16, this warp's 16 rows in registers) b. b is (16, 8 N) if `COLUMNS`, and its
// transpose if not.
#define MULTIPLY_ADD_ASYNC(Type, type, N, width, SUMS, NAMES, a0, a1, a2, a3, right, adds, transposed)                   \
    template <bool COLUMNS>                                                                                               \
    INLINE void multiply_add_async(float (&sums)[N][4], const u32 (&a)[4], u64 b, bool add, Type) {                       \
        asm volatile("{\n"                                                                                                \
                     ".reg .pred add;\n"                                                                                  \
                     "setp.ne.b32 add, " adds ", 0;\n"                                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" width "k16.f32." type "." type " {" NAMES "}, "                  \
                     "{" a0 ", " a1 ", " a2 ", " a3 "}, " right ", add, 1, 1, " transposed ";\n"                          \
                     "}"                                                                                                  \
                     : SUMS                                                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)COLUMNS));             \
    }
#define MULTIPLY_ADD_64(Type, type) \
    MULTIPLY_ADD_ASYNC(Type, type, 8, "64", SUMS_32(0), NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
#define MULTIPLY_ADD_128(Type, type)                                                                                       \
    MULTIPLY_ADD_ASYNC(Type, type, 16, "128", SUMS_32(0) COMMA SUMS_32(8), NAMES_64, "%64", "%65", "%66", "%67", "%68",   \
                       "%69", "%70")
#define COMMA ,
MULTIPLY_ADD_64(Bf16, "bf16")
MULTIPLY_ADD_64(F16, "f16")
MULTIPLY_ADD_128(Bf16, "bf16")
MULTIPLY_ADD_128(F16, "f16")
