// GELU by its tanh approximation, x / (1 + e^-2u) with u = √(2/π) (x + 0.044715 x³), and its gradient.
template <class T>
struct Gelu {
    typedef typename T::Stored Stored;
    const Stored *x, *grad;
    Stored* out;
    u32 words; // of 16 bytes
};

constexpr float SLOPE = 0.7978845608028654f;
constexpr float CUBIC = 0.044715f;
constexpr float LOG2_E = 1.4426950408889634f;

// ½ (1 + tanh u).
INLINE float gate(float x) { return 1 / (1 + exp2_of(-2 * LOG2_E * SLOPE * x * (1 + CUBIC * x * x))); }

INLINE float slope(float x) {
    float share = gate(x), steepness = 2 * SLOPE * (1 + 3 * CUBIC * x * x);
    return share + x * steepness * share * (1 - share);
}

template <class T>
INLINE void gelu(const Gelu<T>& p) {
    i64 at = (i64)thread_number() * T::PER_LOAD;
    if (thread_number() >= p.words) return;
    float x[T::PER_LOAD];
    load(x, p.x + at, T());
#pragma unroll
    for (int i = 0; i < T::PER_LOAD; i++) x[i] *= gate(x[i]);
    store(p.out + at, x, T());
}

template <class T>
INLINE void gelu_gradient(const Gelu<T>& p) {
    i64 at = (i64)thread_number() * T::PER_LOAD;
    if (thread_number() >= p.words) return;
    float x[T::PER_LOAD], grad[T::PER_LOAD];
    load(x, p.x + at, T());
    load(grad, p.grad + at, T());
#pragma unroll
    for (int i = 0; i < T::PER_LOAD; i++) grad[i] *= slope(x[i]);
    store(p.out + at, grad, T());
}

ENTRY(gelu_bf16, Gelu<Bf16>, THREADS, 8) { gelu(p); }
ENTRY(gelu_f16, Gelu<F16>, THREADS, 8) { gelu(p); }
ENTRY(gelu_f32, Gelu<F32>, THREADS, 8) { gelu(p); }
ENTRY(gelu_gradient_bf16, Gelu<Bf16>, THREADS, 8) { gelu_gradient(p); }
ENTRY(gelu_gradient_f16, Gelu<F16>, THREADS, 8) { gelu_gradient(p); }
ENTRY(gelu_gradient_f32, Gelu<F32>, THREADS, 8) { gelu_gradient(p); }
