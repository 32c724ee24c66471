// x + bias, over rows; the result may take the place of x.
template <class T>
struct AddBias {
    typedef typename T::Stored Stored;
    const Stored *x, *bias; // x (rows, width), bias (width)
    Stored* out;            // as x
    u32 words;              // of 16 bytes in x
    u32 row_words;          // width / numbers of a word
};

template <class T>
INLINE void add_bias(const AddBias<T>& p) {
    u32 word = thread_number();
    if (word >= p.words) return;
    i64 at = (i64)word * T::PER_LOAD;
    float x[T::PER_LOAD], bias[T::PER_LOAD];
    load(x, p.x + at, T());
    load(bias, p.bias + word % p.row_words * T::PER_LOAD, T());
#pragma unroll
    for (int i = 0; i < T::PER_LOAD; i++) x[i] += bias[i];
    store(p.out + at, x, T());
}

ENTRY(add_bias_bf16, AddBias<Bf16>, THREADS, 8) { add_bias(p); }
ENTRY(add_bias_f16, AddBias<F16>, THREADS, 8) { add_bias(p); }
ENTRY(add_bias_f32, AddBias<F32>, THREADS, 8) { add_bias(p); }
