// residual + gate · x, and gate · x alone, which is the gradient of x from that of the sum.
template <class T>
struct GatedAdd {
    typedef typename T::Stored Stored;
    const Stored *residual, *gate, *x; // residual and x (batch, tokens, width), gate (batch, width)
    Stored* out;                       // as x
    u32 words;                         // of 16 bytes in x
    u32 tokens, row_words;             // width / numbers of a word
};

template <class T>
INLINE void gated_add(const GatedAdd<T>& p) {
    u32 word = thread_number(), row = word / p.row_words;
    if (word >= p.words) return;
    i64 at = (i64)word * T::PER_LOAD, gate_at = (i64)(row / p.tokens * p.row_words + word % p.row_words) * T::PER_LOAD;
    float sum[T::PER_LOAD], gate[T::PER_LOAD], x[T::PER_LOAD];
    clear(sum);
    if (p.residual) load(sum, p.residual + at, T());
    load(gate, p.gate + gate_at, T());
    load(x, p.x + at, T());
#pragma unroll
    for (int i = 0; i < T::PER_LOAD; i++) sum[i] += gate[i] * x[i];
    store(p.out + at, sum, T());
}

ENTRY(gated_add_bf16, GatedAdd<Bf16>, THREADS, 8) { gated_add(p); }
ENTRY(gated_add_f16, GatedAdd<F16>, THREADS, 8) { gated_add(p); }
ENTRY(gated_add_f32, GatedAdd<F32>, THREADS, 8) { gated_add(p); }
