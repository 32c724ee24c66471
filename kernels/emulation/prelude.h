// The names of prelude.cuh for a CPU: what the sm_80 instructions do, lane by lane, so that the kernels compile as C++.
// Knows no kernel; machine.h runs the threads.
#pragma once
#include "machine.h"
#include <cmath>
#include <cstring>
#include <limits>

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

inline u8* shared_memory() { return machine.shared(); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float exp2_of(float x) { return x < -126 ? 0 : std::exp2(x); } // results below the least normal are flushed
inline float log2_of(float x) { return std::log2(x); }
inline float inverse_root(float x) { return 1 / std::sqrt(x); }

inline u32 bits_of(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float number(u16 x, Bf16) { return float_of((u32)x << 16); }
inline float number(u16 x, F16) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return (float)y;
}
inline float number(float x, F32) { return x; }

// To the nearest, ties to even.
inline u16 rounded(float x, Bf16) {
    u32 bits = bits_of(x);
    return x != x ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u16 rounded(float x, F16) {
    _Float16 y = (_Float16)x;
    u16 bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}
inline float rounded(float x, F32) { return x; }

template <class T>
u32 pack(float low, float high, T type) {
    return rounded(low, type) | (u32)rounded(high, type) << 16;
}

template <class T>
void load(float (&to)[8], const u16* from, T type) {
    Four four = *(const Four*)from; // misaligned addresses are caught by the sanitizer
    for (int i = 0; i < 8; i++) to[i] = number((u16)(four.word[i / 2] >> (i % 2 * 16)), type);
}
template <class T>
void store(u16* to, const float (&from)[8], T type) {
    Four four;
    for (int i = 0; i < 4; i++) four.word[i] = pack(from[2 * i], from[2 * i + 1], type);
    *(Four*)to = four;
}
inline void load(float (&to)[4], const float* from, F32) {
    Four four = *(const Four*)from;
    std::memcpy(to, &four, 16);
}
inline void store(float* to, const float (&from)[4], F32) {
    Four four;
    std::memcpy(&four, from, 16);
    *(Four*)to = four;
}

inline void __syncthreads() { machine.barrier(); }

inline float shuffle_xor(float x, int lanes) {
    struct Lane {
        float in, out;
        int lanes;
    } own = {x, 0, lanes};
    machine.together<Lane>("shuffle", own, [](Lane* const (&lane)[32]) {
        for (int i = 0; i < 32; i++) lane[i]->out = lane[i ^ lane[i]->lanes]->in;
    });
    return own.out;
}

inline void copy_bytes(void* to, const void* from, int bytes, bool valid) {
    machine.require_shared(to, bytes);
    machine.require((uintptr_t)to % bytes == 0 && (uintptr_t)from % bytes == 0, "cp.async: misaligned");
    machine.copy({to, valid ? from : nullptr, bytes});
}
inline void copy_async(void* to, const void* from, bool valid) { copy_bytes(to, from, 16, valid); }
inline void copy_word_async(void* to, const void* from, bool valid) { copy_bytes(to, from, 4, valid); }
inline void commit_copies() { machine.commit(); }
template <int N>
void wait_copies() {
    machine.wait(N);
}

struct Matrices {
    const u8* row;
    u32* to;
};

// Lane l gives the row l % 8 of matrix l / 8. Eight rows in the same banks are a conflict.
inline void require_rows(Matrices* const (&lane)[32]) {
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned banks = 0;
        for (int i = 0; i < 8; i++) {
            const u8* row = lane[matrix * 8 + i]->row;
            machine.require_shared(row, 16);
            machine.require((uintptr_t)row % 16 == 0, "ldmatrix: misaligned");
            banks |= 1u << (uintptr_t)row / 16 % 8;
        }
        machine.require(banks == 0xff, "ldmatrix: bank conflict");
    }
}

inline void load_matrices(u32 (&to)[4], const void* row) {
    Matrices own = {(const u8*)row, to};
    machine.together<Matrices>("ldmatrix", own, [](Matrices* const (&lane)[32]) {
        require_rows(lane);
        for (int i = 0; i < 32; i++)
            for (int matrix = 0; matrix < 4; matrix++)
                std::memcpy(&lane[i]->to[matrix], lane[matrix * 8 + i / 4]->row + i % 4 * 4, 4);
    });
}

inline void load_matrices_transposed(u32 (&to)[4], const void* row) {
    Matrices own = {(const u8*)row, to};
    machine.together<Matrices>("ldmatrix.trans", own, [](Matrices* const (&lane)[32]) {
        require_rows(lane);
        for (int i = 0; i < 32; i++)
            for (int part = 0; part < 8; part++) {
                const u8* from = lane[part / 2 * 8 + i % 4 * 2 + part % 2]->row + i / 4 * 2;
                std::memcpy((u16*)lane[i]->to + part, from, 2);
            }
    });
}

struct Product {
    float* sums;
    const u32* a;
    u32 b[2];
};

template <class T>
float half_of(u32 word, int which, T type) {
    return number((u16)(word >> (which * 16)), type);
}

// sums (16 x 8, f32) += a (16 x 16) b (16 x 8), with the fragments of mma.m16n8k16.
template <class T>
void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {
    Product own = {sums, a, {b0, b1}};
    machine.together<Product>("mma", own, [](Product* const (&lane)[32]) {
        float left[16][16], right[16][8];
        for (int i = 0; i < 32; i++) {
            int g = i / 4, t = i % 4;
            for (int j = 0; j < 8; j++) left[g + j / 2 % 2 * 8][t * 2 + j / 4 * 8 + j % 2] = half_of(lane[i]->a[j / 2], j % 2, T());
            for (int j = 0; j < 4; j++) right[t * 2 + j / 2 * 8 + j % 2][g] = half_of(lane[i]->b[j / 2], j % 2, T());
        }
        for (int row = 0; row < 16; row++) {
            float out[8] = {};
            for (int k = 0; k < 16; k++)
                for (int column = 0; column < 8; column++) out[column] += left[row][k] * right[k][column];
            for (int column = 0; column < 8; column++)
                lane[row % 8 * 4 + column / 2]->sums[row / 8 * 2 + column % 2] += out[column];
        }
    });
}
