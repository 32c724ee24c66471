// What the kernels need of the device, with no header: types, inline PTX for sm_80, and nothing that knows a kernel.
// checks/host_prelude.h declares the same names for the host compiler.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define ENTRY(name, Parameters, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Parameters p)
#define INLINE __device__ __forceinline__

// Kinds of numbers, and how many of them 16 bytes hold.
struct Bf16 {
    typedef u16 Stored;
    static constexpr int PER_LOAD = 8;
};
struct F16 {
    typedef u16 Stored;
    static constexpr int PER_LOAD = 8;
};
struct F32 {
    typedef float Stored;
    static constexpr int PER_LOAD = 4;
};

struct __align__(16) Four {
    u32 word[4];
};

// Boxes that a device copies by itself begin at such multiples.
extern __shared__ __align__(1024) u8 dynamic_memory[];
INLINE u8* shared_memory() { return dynamic_memory; }

INLINE float infinity() { return __int_as_float(0x7f800000); }
INLINE float maximum(float a, float b) { return fmaxf(a, b); }

INLINE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float log2_of(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float inverse_root(float x) { return rsqrtf(x); }
INLINE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// Two numbers in one register, `low` at the lower address.
INLINE u32 pack(float low, float high, Bf16) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

INLINE u32 bits_of(float x) { return __float_as_uint(x); }
INLINE float float_of(u32 x) { return __uint_as_float(x); }

INLINE u32 pack(float low, float high, F16) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

INLINE float number(u16 x, Bf16) { return __uint_as_float((u32)x << 16); }

INLINE float number(u16 x, F16) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// 16 bytes of global memory as numbers, and back.
template <class T>
INLINE void load(float (&to)[8], const u16* from, T type) {
    Four four = *(const Four*)from;
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = number((u16)(four.word[i / 2] >> (i % 2 * 16)), type);
}

template <class T>
INLINE void store(u16* to, const float (&from)[8], T type) {
    Four four;
#pragma unroll
    for (int i = 0; i < 4; i++) four.word[i] = pack(from[2 * i], from[2 * i + 1], type);
    *(Four*)to = four;
}

INLINE void load(float (&to)[4], const float* from, F32) {
    Four four = *(const Four*)from;
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = float_of(four.word[i]);
}

INLINE void store(float* to, const float (&from)[4], F32) {
    Four four;
#pragma unroll
    for (int i = 0; i < 4; i++) four.word[i] = bits_of(from[i]);
    *(Four*)to = four;
}

// 16 bytes from global to shared memory, or zeros.
INLINE void copy_async(void* to, const void* from, bool valid) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// 4 bytes, or zeros.
INLINE void copy_word_async(void* to, const void* from, bool valid) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N groups of this thread are under way.
template <int N>
INLINE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
INLINE void load_matrices(u32 (&to)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

INLINE void load_matrices_transposed(u32 (&to)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// sums (16 x 8, f32) += a (16 x 16) b (16 x 8).
INLINE void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, Bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

INLINE void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, F16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
