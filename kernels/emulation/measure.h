// Buffers that start as no numbers and are walled in, random numbers, and the bound on a kernel's error. Knows no kernel.
#pragma once
#include "launch.h"
#include <random>
#include <string>

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
    if (holds) return;
    failures++;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// `count` numbers between two walls; every byte is 0xff, which no f16, bf16 or f32 number has.
template <class V>
class Buffer {
    static constexpr size_t WALL = 64;
    Table<V> all;
    V* first() { return (V*)(((uintptr_t)all.data() + 15) / 16 * 16) + WALL; }

  public:
    size_t count;
    explicit Buffer(size_t count) : all(count + 2 * WALL + 16), count(count) {
        std::memset(all.data(), 0xff, all.size() * sizeof(V));
    }
    V* data() { return first(); }
    V& operator[](size_t i) { return first()[i]; }
    // No number behind either end has been written.
    bool walled() {
        for (size_t i = 0; i < WALL * sizeof(V); i++)
            if (((u8*)(first() - WALL))[i] != 0xff || ((u8*)(first() + count))[i] != 0xff) return false;
        return true;
    }
    bool operator==(Buffer& other) { return std::memcmp(data(), other.data(), count * sizeof(V)) == 0; }
};

typedef std::vector<double> Numbers;

template <class T>
struct Typed {
    typedef typename T::Stored Stored;
    static Buffer<Stored> random(size_t count, std::mt19937& source, double deviation = 1) {
        std::normal_distribution<double> normal(0, deviation);
        Buffer<Stored> out(count);
        for (size_t i = 0; i < count; i++) out[i] = rounded((float)normal(source), T());
        return out;
    }
    static Numbers numbers(Buffer<Stored>& from) {
        Numbers out(from.count);
        for (size_t i = 0; i < from.count; i++) out[i] = number(from[i], T());
        return out;
    }
    // As the plain operation leaves it in this type.
    static double round(double x) { return number(rounded((float)x, T()), T()); }
};

// Root of the summed squares of a - b, over all and over the worst run of `row`.
struct Distance {
    double all = 0, worst = 0;
    Distance(const Numbers& a, const Numbers& b, size_t row) {
        for (size_t first = 0; first < a.size(); first += row) {
            double sum = 0;
            for (size_t i = first; i < first + row; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
            all += sum;
            worst = worst < sum ? sum : !(sum == sum) ? NAN : worst;
        }
        all = std::sqrt(all);
        worst = std::sqrt(worst);
    }
};

// The bound on a kernel's error: twice that of the plain operation in the same type, plus 1e-6; over the whole tensor,
// and the worst row against the worst row.
struct Accuracy {
    double kernel = 0, plain = 0; // worst relative errors so far

    void compare(const std::string& what, const Numbers& got, const Numbers& want, const Numbers& rough, size_t row) {
        Distance norm(want, Numbers(want.size(), 0), row), error(got, want, row), usual(rough, want, row);
        bool written = true;
        for (double x : got) written &= x == x;
        expect(written, what + ": not all is written, or no number");
        double all = error.all / norm.all, bound = 2 * usual.all / norm.all + 1e-6;
        expect(all <= bound, what + ": relative error " + std::to_string(all) + ", bound " + std::to_string(bound));
        double worst = error.worst / norm.worst, row_bound = 2 * usual.worst / norm.worst + 1e-6;
        expect(worst <= row_bound, what + ": worst row " + std::to_string(worst) + ", bound " + std::to_string(row_bound));
        kernel = std::max(kernel, all);
        plain = std::max(plain, usual.all / norm.all);
    }
};
