// Checks the kernels over rows against references in f64. See `check_rows`.
#pragma once
#include "measure.h"
#include <cstddef>
#include <functional>

namespace rows {
#include "../rows.cuh"

#include "../add_bias/kernel.cu"

#include "../gated_add/kernel.cu"

#include "../permute/kernel.cu"

#include "../rms_norm_rope/kernel.cu"
namespace layer_norm {
#include "../modulated_layer_norm/kernel.cu"
}
namespace activation {
#include "../gelu/kernel.cu"
}
} // namespace rows

// The Rust code that launches these kernels assumes the same layout; tests.rs asserts it there.
static_assert(sizeof(rows::AddBias<F16>) == 32 && sizeof(rows::GatedAdd<Bf16>) == 48);
static_assert(sizeof(rows::activation::Gelu<F32>) == 32);
static_assert(sizeof(rows::layer_norm::ModulatedLayerNorm<Bf16>) == 56 && sizeof(rows::Permute) == 40);
static_assert(sizeof(rows::RmsNormRope<Bf16>) == 72 && offsetof(rows::RmsNormRope<Bf16>, eps) == 68);

struct RowShape {
    int batch, tokens, heads, width;
    size_t rows() const { return (size_t)batch * tokens * heads; }
    size_t count() const { return rows() * width; }
};

typedef std::function<double(double)> Round;

inline double mean(const double* x, int width, Round round) {
    double sum = 0;
    for (int i = 0; i < width; i++) sum += x[i];
    return round(sum / width);
}

inline double mean_product(const double* a, const double* b, int width, Round round) {
    Values products(width);
    for (int i = 0; i < width; i++) products[i] = round(a[i] * b[i]);
    return mean(products.data(), width, round);
}

// Runs a kernel in one number format and compares it with a reference.
template <class T>
struct RowCheck {
    typedef typename T::Stored Stored;
    RowShape shape;
    std::mt19937 source{7};
    std::vector<Buffer<Stored>> inputs;
    std::vector<Values> in;

    explicit RowCheck(RowShape shape) : shape(shape) {}

    Stored* input(size_t count) {
        inputs.push_back(Typed<T>::random(count, source));
        in.push_back(Typed<T>::values(inputs.back()));
        return inputs.back().data();
    }

    // `reference(round)` computes the wanted result, with `round` applied to each step.
    template <class Parameters, class Reference>
    void run(const std::string& entry, int blocks, Parameters p, Reference reference) {
        Buffer<Stored> out(shape.count()), again(shape.count());
        std::string what = entry + ", width " + std::to_string(shape.width);
        for (Buffer<Stored>* to : {&again, &out}) {
            set_schedule(to == &again ? Schedule::Opposite : Schedule::Default);
            p.out = (decltype(p.out))to->data();
            device().launch(entry, {blocks, 1, 1, 128, 64}, p);
        }
        expect(out == again, what + ": depends on the order of warps");
        expect(out.is_guard_intact(), what + ": written out of bounds");
        Accuracy accuracy;
        Round exact = [](double x) { return x; }, rough = [](double x) { return Typed<T>::round(x); };
        accuracy.compare(what, Typed<T>::values(out), reference(exact), reference(rough), shape.width);
        std::printf("%s: error %.2e, plain %.2e\n", what.c_str(), accuracy.kernel, accuracy.plain);
    }

    int blocks(size_t threads) const { return (int)(threads + 127) / 128; }
    size_t words() const { return shape.count() / T::PER_LOAD; }
};

template <class T>
void check_rms_norm_rope(RowShape shape, bool rotated) {
    RowCheck<T> check(shape);
    std::normal_distribution<float> normal;
    int pairs = shape.width / 2, lanes = 1;
    Buffer<float> cos((size_t)shape.tokens * pairs), sin(cos.count);
    for (size_t i = 0; i < cos.count; i++) {
        float angle = normal(check.source);
        cos[i] = rotated ? std::cos(angle) : 1;
        sin[i] = rotated ? std::sin(angle) : 0;
    }
    while (lanes * T::PER_LOAD < shape.width) lanes *= 2;
    float eps = 1e-6f;
    rows::RmsNormRope<T> p = {check.input(shape.count()), check.input(shape.width), check.input(shape.count()), nullptr, nullptr,
                              nullptr, (u32)shape.rows(), (u32)shape.tokens, (u32)shape.heads, shape.width, lanes, eps};
    if (rotated) p.cos = cos.data(), p.sin = sin.data();
    const Values &x = check.in[0], &weight = check.in[1], &grad = check.in[2];
    auto rotate = [&](double* row, size_t number, double sign, Round round) {
        size_t token = number / shape.heads % shape.tokens;
        for (int i = 0; i < pairs; i++) {
            double c = cos[token * pairs + i], s = sign * sin[token * pairs + i], even = row[2 * i], odd = row[2 * i + 1];
            row[2 * i] = round(round(even * c) - round(odd * s));
            row[2 * i + 1] = round(round(even * s) + round(odd * c));
        }
    };
    auto forward = [&](Round round) {
        Values out(x.size());
        for (size_t row = 0; row < shape.rows(); row++) {
            const double* from = &x[row * shape.width];
            double* to = &out[row * shape.width];
            double root = round(std::sqrt(round(mean_product(from, from, shape.width, round) + eps)));
            for (int i = 0; i < shape.width; i++) to[i] = round(round(from[i] / root) * weight[i]);
            rotate(to, row, 1, round);
        }
        return out;
    };
    auto backward = [&](Round round) {
        Values out(grad);
        for (size_t row = 0; row < shape.rows(); row++) {
            const double* from = &x[row * shape.width];
            double* to = &out[row * shape.width];
            double square = round(mean_product(from, from, shape.width, round) + eps), root = round(std::sqrt(square));
            rotate(to, row, -1, round);
            for (int i = 0; i < shape.width; i++) to[i] = round(to[i] * weight[i]);
            double projection = round(mean_product(to, from, shape.width, round) / square);
            for (int i = 0; i < shape.width; i++) to[i] = round(round(to[i] - round(from[i] * projection)) / root);
        }
        return out;
    };
    int blocks = check.blocks(shape.rows() * lanes);
    check.run(entry("rms_norm_rope", T()), blocks, p, forward);
    check.run(entry("rms_norm_rope_gradient", T()), blocks, p, backward);
}

// A normalized row, and 1 / √(variance + eps).
struct NormalizedRow {
    Values y;
    double factor;
    NormalizedRow(const double* x, int width, double eps, Round round) : y(x, x + width) {
        double middle = mean(x, width, round);
        for (double& value : y) value = round(value - middle);
        factor = round(1 / round(std::sqrt(round(mean_product(y.data(), y.data(), width, round) + eps))));
        for (double& value : y) value = round(value * factor);
    }
};

template <class T>
void check_layer_norm(RowShape shape) {
    RowCheck<T> check(shape);
    int width = shape.width;
    float eps = 1e-6f;
    size_t vectors = (size_t)shape.batch * width;
    rows::layer_norm::ModulatedLayerNorm<T> p = {check.input(shape.count()), check.input(vectors), check.input(vectors),
                                                 check.input(shape.count()), nullptr, shape.tokens, width, eps};
    const Values &x = check.in[0], &shift = check.in[1], &scale = check.in[2], &grad = check.in[3];
    auto forward = [&](Round round) {
        Values out(x.size());
        for (size_t row = 0; row < shape.rows(); row++) {
            size_t at = row * width, batch = row / shape.tokens * width;
            NormalizedRow normalized(&x[at], width, eps, round);
            for (int i = 0; i < width; i++)
                out[at + i] = round(round(normalized.y[i] * round(1 + scale[batch + i])) + shift[batch + i]);
        }
        return out;
    };
    auto backward = [&](Round round) {
        Values out(x.size());
        for (size_t row = 0; row < shape.rows(); row++) {
            size_t at = row * width, batch = row / shape.tokens * width;
            NormalizedRow normalized(&x[at], width, eps, round);
            Values h(width);
            for (int i = 0; i < width; i++) h[i] = round(grad[at + i] * round(1 + scale[batch + i]));
            double middle = mean(h.data(), width, round);
            double projection = mean_product(h.data(), normalized.y.data(), width, round);
            for (int i = 0; i < width; i++)
                out[at + i] = round(normalized.factor * round(round(h[i] - middle) - round(normalized.y[i] * projection)));
        }
        return out;
    };
    int blocks = (int)shape.rows();
    check.run(entry("modulated_layer_norm", T()), blocks, p, forward);
    check.run(entry("modulated_layer_norm_gradient", T()), blocks, p, backward);
}

template <class T>
void check_elementwise(RowShape shape) {
    RowCheck<T> check(shape);
    size_t count = shape.count();
    auto *x = check.input(count), *grad = check.input(count), *gate = check.input((size_t)shape.batch * shape.width);
    const Values &xs = check.in[0], &grads = check.in[1], &gates = check.in[2];
    u32 words = (u32)check.words(), row_words = shape.width / T::PER_LOAD;
    int blocks = check.blocks(words);
    auto gated = [&](const Values& residual) {
        return [&](Round round) {
            Values out(count);
            for (size_t i = 0; i < count; i++) {
                size_t batch = i / shape.width / shape.tokens;
                out[i] = round(residual[i] + round(gates[batch * shape.width + i % shape.width] * xs[i]));
            }
            return out;
        };
    };
    Values zeros(count, 0);
    rows::GatedAdd<T> add = {grad, gate, x, nullptr, words, (u32)shape.tokens, row_words};
    check.run(entry("gated_add", T()), blocks, add, gated(grads));
    add.residual = nullptr;
    check.run(entry("gated_add", T()), blocks, add, gated(zeros));
    auto biased = [&](Round round) {
        Values out(count);
        for (size_t i = 0; i < count; i++) out[i] = round(xs[i] + gates[i % shape.width]);
        return out;
    };
    rows::AddBias<T> bias = {x, gate, nullptr, words, row_words};
    check.run(entry("add_bias", T()), blocks, bias, biased);
    const double root = std::sqrt(2 / std::acos(-1.));
    auto gelu = [&](Round round) {
        Values out(count);
        for (size_t i = 0; i < count; i++) {
            double cube = round(round(xs[i] * xs[i]) * xs[i]), u = round(root * round(xs[i] + round(0.044715 * cube)));
            out[i] = round(round(0.5 * xs[i]) * round(1 + round(std::tanh(u))));
        }
        return out;
    };
    auto slope = [&](Round round) {
        Values out(count);
        for (size_t i = 0; i < count; i++) {
            double square = round(xs[i] * xs[i]), u = round(root * round(xs[i] + round(0.044715 * round(square * xs[i]))));
            double t = round(std::tanh(u)), inner = round(root * round(1 + round(3 * 0.044715 * square)));
            double through_tanh = round(round(0.5 * xs[i]) * round(round(1 - round(t * t)) * inner));
            out[i] = round(grads[i] * round(round(0.5 * round(1 + t)) + through_tanh));
        }
        return out;
    };
    rows::activation::Gelu<T> p = {x, grad, nullptr, words};
    check.run(entry("gelu", T()), blocks, p, gelu);
    check.run(entry("gelu_gradient", T()), blocks, p, slope);
}

inline void check_permute() {
    RowShape shape = {2, 37, 1, 24};
    RowCheck<F32> check(shape);
    float* x = check.input(shape.count());
    DeviceVector<u32> from(shape.tokens);
    for (int i = 0; i < shape.tokens; i++) from[i] = (i * 5 + 3) % shape.tokens;
    u32 words = (u32)check.words();
    auto permuted = [&](Round) {
        Values out(shape.count());
        for (size_t i = 0; i < out.size(); i++) {
            size_t row = i / shape.width, batch = row / shape.tokens * shape.tokens;
            out[i] = check.in[0][(batch + from[row % shape.tokens]) * shape.width + i % shape.width];
        }
        return out;
    };
    rows::Permute p = {(const Four*)x, nullptr, from.data(), words, (u32)shape.tokens, 6};
    check.run("permute", check.blocks(words), p, permuted);
}

template <class T>
void check_format() {
    for (int width : {64, 128, 40, 256 / (8 / T::PER_LOAD)}) check_rms_norm_rope<T>({2, 5, 3, width}, width != 64);
    for (int width : {48, 1152, 3072, 4096}) check_layer_norm<T>({2, 3, 1, width});
    check_elementwise<T>({2, 7, 1, 1160});
}

inline void check_rows() {
    check_permute();
    check_format<Bf16>();
    check_format<F16>();
    check_format<F32>();
}
