// Buffers with guard zones, random inputs, and the bound on a kernel's error. Independent of any kernel.
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

// `count` values between two guard zones. All bytes start as 0xff, which is NaN in f16, bf16 and f32.
template <class V>
class Buffer {
    static constexpr size_t GUARD = 64;
    DeviceVector<V> storage;
    V* first() { return (V*)(((uintptr_t)storage.data() + 15) / 16 * 16) + GUARD; }

  public:
    size_t count;
    explicit Buffer(size_t count) : storage(count + 2 * GUARD + 16), count(count) {
        std::memset(storage.data(), 0xff, storage.size() * sizeof(V));
    }
    V* data() { return first(); }
    V& operator[](size_t i) { return first()[i]; }
    // Nothing was written before the first or after the last value.
    bool is_guard_intact() {
        for (size_t i = 0; i < GUARD * sizeof(V); i++)
            if (((u8*)(first() - GUARD))[i] != 0xff || ((u8*)(first() + count))[i] != 0xff) return false;
        return true;
    }
    bool operator==(Buffer& other) { return std::memcmp(data(), other.data(), count * sizeof(V)) == 0; }
};

typedef std::vector<double> Values;

template <class T>
struct Typed {
    typedef typename T::Stored Stored;
    static Buffer<Stored> random(size_t count, std::mt19937& source, double deviation = 1) {
        std::normal_distribution<double> normal(0, deviation);
        Buffer<Stored> out(count);
        for (size_t i = 0; i < count; i++) out[i] = rounded((float)normal(source), T());
        return out;
    }
    static Values values(Buffer<Stored>& from) {
        Values out(from.count);
        for (size_t i = 0; i < from.count; i++) out[i] = number(from[i], T());
        return out;
    }
    static double round(double x) { return number(rounded((float)x, T()), T()); }
};

// L2 norm of a - b, of the whole tensor and of the worst row.
struct Distance {
    double all = 0, worst = 0;
    Distance(const Values& a, const Values& b, size_t row) {
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

// Bounds a kernel's error by twice that of the reference operation in the same format, plus 1e-6. It applies to the whole
// tensor, and to the worst row against the worst row of the reference.
struct Accuracy {
    double kernel = 0, plain = 0; // largest relative errors so far

    // `exact` is the reference in f64; `rough` rounds each of its steps to the format.
    // Returns whether `got` is within the bound.
    bool compare(const std::string& what, const Values& got, const Values& exact, const Values& rough, size_t row) {
        Distance norm(exact, Values(exact.size(), 0), row), error(got, exact, row), usual(rough, exact, row);
        bool written = true;
        for (double x : got) written &= x == x;
        int before = failures;
        expect(written, what + ": not fully written, or NaN");
        double all = error.all / norm.all, bound = 2 * usual.all / norm.all + 1e-6;
        expect(all <= bound, what + ": relative error " + std::to_string(all) + ", bound " + std::to_string(bound));
        double worst = error.worst / norm.worst, row_bound = 2 * usual.worst / norm.worst + 1e-6;
        expect(worst <= row_bound, what + ": worst row " + std::to_string(worst) + ", bound " + std::to_string(row_bound));
        kernel = std::max(kernel, all);
        plain = std::max(plain, usual.all / norm.all);
        return failures == before;
    }
};
