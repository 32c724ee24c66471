// Lets the host compiler read the kernel sources, so that the checks fill the very structs that the kernels take. Types and
// number formats are those of prelude.cuh. Device functions are only declared: kernels run as PTX on a device.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef long long i64;

#define ENTRY(name, Parameters, threads, blocks) inline void name(const Parameters p)
#define INLINE inline
#define __align__(bytes) alignas(bytes)

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
struct alignas(16) Four {
    u32 word[4];
};

inline float number(u16 x, Bf16) {
    u32 bits = (u32)x << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline float number(u16 x, F16) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return (float)y;
}
inline float number(float x, F32) { return x; }

// To the nearest, ties to even.
inline u16 rounded(float x, Bf16) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u16 rounded(float x, F16) {
    _Float16 y = (_Float16)x;
    u16 bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}
inline float rounded(float x, F32) { return x; }

struct Index {
    int x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();

u8* shared_memory();
float infinity();
float maximum(float a, float b);
float exp2_of(float x);
float log2_of(float x);
float inverse_root(float x);
float shuffle_xor(float x, int lanes);
u32 bits_of(float x);
float float_of(u32 bits);
template <class T>
u32 pack(float low, float high, T);
template <class T, class V, int N>
void load(float (&to)[N], const V* from, T);
template <class T, class V, int N>
void store(V* to, const float (&from)[N], T);
void copy_async(void* to, const void* from, bool valid);
void copy_word_async(void* to, const void* from, bool valid);
void commit_copies();
template <int N>
void wait_copies();
void load_matrices(u32 (&to)[4], const void* row);
void load_matrices_transposed(u32 (&to)[4], const void* row);
template <class T>
void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, T);
