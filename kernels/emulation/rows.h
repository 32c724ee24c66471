// The kernels over rows against their plain references in double precision. Its main function is `check_rows`.
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

// Sizes that the launching side counts on.
static_assert(sizeof(rows::AddBias<F16>) == 32 && sizeof(rows::GatedAdd<Bf16>) == 48 && sizeof(rows::activation::Gelu<F32>) == 32);
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
    Numbers products(width);
    for (int i = 0; i < width; i++) products[i] = round(a[i] * b[i]);
    return mean(products.data(), width, round);
}

// One kernel in one type: its result, what is wanted and what the plain operation gives.
template <class T>
struct RowCheck {
    typedef typename T::Stored Stored;
    RowShape shape;
    std::mt19937 source{7};
    std::vector<Buffer<Stored>> inputs;
    std::vector<Numbers> in;

    explicit RowCheck(RowShape shape) : shape(shape) {}

    Stored* input(size_t count) {
        inputs.push_back(Typed<T>::random(count, source));
        in.push_back(Typed<T>::numbers(inputs.back()));
        return inputs.back().data();
    }

    template <class Parameters, class Kernel, class Plain>
    void run(const std::string& entry, int blocks, Parameters p, Kernel kernel, Plain plain) {
        Buffer<Stored> out(shape.count()), again(shape.count());
        std::string what = entry + ", width " + std::to_string(shape.width);
        for (Buffer<Stored>* to : {&again, &out}) {
            machine.reversed = to == &again;
            p.out = (decltype(p.out))to->data();
            launch(entry, {blocks, 1, 1, 128, 64}, p, kernel);
        }
        expect(out == again, what + ": depends on the order of threads");
        expect(out.walled(), what + ": written behind an end");
        Accuracy accuracy;
        Round exact = [](double x) { return x; }, rough = [](double x) { return Typed<T>::round(x); };
        accuracy.compare(what, Typed<T>::numbers(out), plain(exact), plain(rough), shape.width);
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
    const Numbers &x = check.in[0], &weight = check.in[1], &grad = check.in[2];
    auto rotate = [&](double* row, size_t number, double sign, Round round) {
        size_t token = number / shape.heads % shape.tokens;
        for (int i = 0; i < pairs; i++) {
            double c = cos[token * pairs + i], s = sign * sin[token * pairs + i], even = row[2 * i], odd = row[2 * i + 1];
            row[2 * i] = round(round(even * c) - round(odd * s));
            row[2 * i + 1] = round(round(even * s) + round(odd * c));
        }
    };
    auto forward = [&](Round round) {
        Numbers out(x.size());
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
        Numbers out(grad);
        for (size_t row = 0; row < shape.rows(); row++) {
            const double* from = &x[row * shape.width];
            double* to = &out[row * shape.width];
            double square = round(mean_product(from, from, shape.width, round) + eps), root = round(std::sqrt(square));
            rotate(to, row, -1, round);
            for (int i = 0; i < shape.width; i++) to[i] = round(to[i] * weight[i]);
            double share = round(mean_product(to, from, shape.width, round) / square);
            for (int i = 0; i < shape.width; i++) to[i] = round(round(to[i] - round(from[i] * share)) / root);
        }
        return out;
    };
    int blocks = check.blocks(shape.rows() * lanes);
    check.run(entry("rms_norm_rope", T()), blocks, p, rows::rms_norm_rope<T>, forward);
    check.run(entry("rms_norm_rope_gradient", T()), blocks, p, rows::rms_norm_rope_gradient<T>, backward);
}

// Mean, 1 / √(variance + eps), and the normed row.
struct Normed {
    Numbers y;
    double factor;
    Normed(const double* x, int width, double eps, Round round) : y(x, x + width) {
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
    const Numbers &x = check.in[0], &shift = check.in[1], &scale = check.in[2], &grad = check.in[3];
    auto forward = [&](Round round) {
        Numbers out(x.size());
        for (size_t row = 0; row < shape.rows(); row++) {
            size_t at = row * width, batch = row / shape.tokens * width;
            Normed normed(&x[at], width, eps, round);
            for (int i = 0; i < width; i++)
                out[at + i] = round(round(normed.y[i] * round(1 + scale[batch + i])) + shift[batch + i]);
        }
        return out;
    };
    auto backward = [&](Round round) {
        Numbers out(x.size());
        for (size_t row = 0; row < shape.rows(); row++) {
            size_t at = row * width, batch = row / shape.tokens * width;
            Normed normed(&x[at], width, eps, round);
            Numbers h(width);
            for (int i = 0; i < width; i++) h[i] = round(grad[at + i] * round(1 + scale[batch + i]));
            double middle = mean(h.data(), width, round), share = mean_product(h.data(), normed.y.data(), width, round);
            for (int i = 0; i < width; i++)
                out[at + i] = round(normed.factor * round(round(h[i] - middle) - round(normed.y[i] * share)));
        }
        return out;
    };
    int blocks = (int)shape.rows();
    check.run(entry("modulated_layer_norm", T()), blocks, p, rows::layer_norm::modulated_layer_norm<T>, forward);
    check.run(entry("modulated_layer_norm_gradient", T()), blocks, p, rows::layer_norm::modulated_layer_norm_gradient<T>, backward);
}

template <class T>
void check_elementwise(RowShape shape) {
    RowCheck<T> check(shape);
    size_t count = shape.count();
    auto *x = check.input(count), *grad = check.input(count), *gate = check.input((size_t)shape.batch * shape.width);
    const Numbers &xs = check.in[0], &grads = check.in[1], &gates = check.in[2];
    u32 words = (u32)check.words(), row_words = shape.width / T::PER_LOAD;
    int blocks = check.blocks(words);
    auto gated = [&](const Numbers& residual) {
        return [&](Round round) {
            Numbers out(count);
            for (size_t i = 0; i < count; i++) {
                size_t batch = i / shape.width / shape.tokens;
                out[i] = round(residual[i] + round(gates[batch * shape.width + i % shape.width] * xs[i]));
            }
            return out;
        };
    };
    Numbers zeros(count, 0);
    rows::GatedAdd<T> add = {grad, gate, x, nullptr, words, (u32)shape.tokens, row_words};
    check.run(entry("gated_add", T()), blocks, add, rows::gated_add<T>, gated(grads));
    add.residual = nullptr;
    check.run(entry("gated_add", T()), blocks, add, rows::gated_add<T>, gated(zeros));
    auto biased = [&](Round round) {
        Numbers out(count);
        for (size_t i = 0; i < count; i++) out[i] = round(xs[i] + gates[i % shape.width]);
        return out;
    };
    rows::AddBias<T> bias = {x, gate, nullptr, words, row_words};
    check.run(entry("add_bias", T()), blocks, bias, rows::add_bias<T>, biased);
    const double root = std::sqrt(2 / std::acos(-1.));
    auto gelu = [&](Round round) {
        Numbers out(count);
        for (size_t i = 0; i < count; i++) {
            double cube = round(round(xs[i] * xs[i]) * xs[i]), u = round(root * round(xs[i] + round(0.044715 * cube)));
            out[i] = round(round(0.5 * xs[i]) * round(1 + round(std::tanh(u))));
        }
        return out;
    };
    auto slope = [&](Round round) {
        Numbers out(count);
        for (size_t i = 0; i < count; i++) {
            double square = round(xs[i] * xs[i]), u = round(root * round(xs[i] + round(0.044715 * round(square * xs[i]))));
            double t = round(std::tanh(u)), inner = round(root * round(1 + round(3 * 0.044715 * square)));
            double share = round(round(0.5 * xs[i]) * round(round(1 - round(t * t)) * inner));
            out[i] = round(grads[i] * round(round(0.5 * round(1 + t)) + share));
        }
        return out;
    };
    rows::activation::Gelu<T> p = {x, grad, nullptr, words};
    check.run(entry("gelu", T()), blocks, p, rows::activation::gelu<T>, gelu);
    check.run(entry("gelu_gradient", T()), blocks, p, rows::activation::gelu_gradient<T>, slope);
}

inline void check_permute() {
    RowShape shape = {2, 37, 1, 24};
    RowCheck<F32> check(shape);
    float* x = check.input(shape.count());
    Table<u32> from(shape.tokens);
    for (int i = 0; i < shape.tokens; i++) from[i] = (i * 5 + 3) % shape.tokens;
    u32 words = (u32)check.words();
    auto plain = [&](Round) {
        Numbers out(shape.count());
        for (size_t i = 0; i < out.size(); i++) {
            size_t row = i / shape.width, batch = row / shape.tokens * shape.tokens;
            out[i] = check.in[0][(batch + from[row % shape.tokens]) * shape.width + i % shape.width];
        }
        return out;
    };
    rows::Permute p = {(const Four*)x, nullptr, from.data(), words, (u32)shape.tokens, 6};
    check.run("permute", check.blocks(words), p, rows::permute, plain);
}

template <class T>
void check_rows_of() {
    for (int width : {64, 128, 40, 256 / (8 / T::PER_LOAD)}) check_rms_norm_rope<T>({2, 5, 3, width}, width != 64);
    for (int width : {48, 1152, 3072, 4096}) check_layer_norm<T>({2, 3, 1, width});
    check_elementwise<T>({2, 7, 1, 1160});
}

inline void check_rows() {
    machine.late_copies = machine.reversed = false;
    check_permute();
    check_rows_of<Bf16>();
    check_rows_of<F16>();
    check_rows_of<F32>();
}
