// Layer norm without weights, then modulation: norm(x) (1 + scale) + shift (adaLN; DiT, section 3.2), and the gradient
// of x. A block holds a row in its registers.
constexpr int WIDEST = 4096;

template <class T>
struct ModulatedLayerNorm {
    typedef typename T::Stored Stored;
    const Stored *x, *shift, *scale, *grad; // x and grad (batch, tokens, width), shift and scale (batch, width)
    Stored* out;                            // as x
    int tokens, width;                      // width: a multiple of 16 bytes, at most WIDEST numbers
    float eps;
};

// Numbers of a row that this thread holds.
template <class T>
struct Row {
    static constexpr int CHUNKS = WIDEST / THREADS / T::PER_LOAD;
    float chunks[CHUNKS][T::PER_LOAD];

    INLINE static int column(int chunk) { return (chunk * THREADS + threadIdx.x) * T::PER_LOAD; }

    INLINE void load_from(const typename T::Stored* row, int width) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            clear(chunks[c]);
            if (column(c) < width) load(chunks[c], row + column(c), T());
        }
    }

    INLINE void store_to(typename T::Stored* row, int width) const {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (column(c) < width) store(row + column(c), chunks[c], T());
    }

    // Calls of(chunk, i) for every number inside the row.
    template <class Of>
    INLINE static void each(int width, Of of) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (column(c) < width) {
#pragma unroll
                for (int i = 0; i < T::PER_LOAD; i++) of(c, i);
            }
    }

    // x -> (x - mean) / √(variance + eps); gives the second factor. `slots` are 8.
    INLINE float normalize(int width, float eps, float* slots) {
        float sum = 0, squares = 0;
        each(width, [&](int c, int i) { sum += chunks[c][i]; });
        float mean = sum_of_block(sum, slots) / width;
        each(width, [&](int c, int i) {
            chunks[c][i] -= mean;
            squares += chunks[c][i] * chunks[c][i];
        });
        float factor = inverse_root(sum_of_block(squares, slots + 4) / width + eps);
        each(width, [&](int c, int i) { chunks[c][i] *= factor; });
        return factor;
    }
};

template <class T>
INLINE void modulated_layer_norm(const ModulatedLayerNorm<T>& p) {
    float* slots = (float*)shared_memory();
    i64 at = (i64)blockIdx.x * p.width, batch = blockIdx.x / p.tokens;
    Row<T> x, scale, shift;
    x.load_from(p.x + at, p.width);
    x.normalize(p.width, p.eps, slots);
    scale.load_from(p.scale + batch * p.width, p.width);
    shift.load_from(p.shift + batch * p.width, p.width);
    Row<T>::each(p.width, [&](int c, int i) { x.chunks[c][i] = x.chunks[c][i] * (1 + scale.chunks[c][i]) + shift.chunks[c][i]; });
    x.store_to(p.out + at, p.width);
}

// With y = norm(x) and h = grad · (1 + scale): factor · (h - mean h - y · mean(h y)).
template <class T>
INLINE void modulated_layer_norm_gradient(const ModulatedLayerNorm<T>& p) {
    float* slots = (float*)shared_memory();
    i64 at = (i64)blockIdx.x * p.width, batch = blockIdx.x / p.tokens;
    Row<T> x, scaled, scale;
    x.load_from(p.x + at, p.width);
    float factor = x.normalize(p.width, p.eps, slots), sum = 0, product = 0;
    scaled.load_from(p.grad + at, p.width);
    scale.load_from(p.scale + batch * p.width, p.width);
    Row<T>::each(p.width, [&](int c, int i) {
        scaled.chunks[c][i] *= 1 + scale.chunks[c][i];
        sum += scaled.chunks[c][i];
        product += scaled.chunks[c][i] * x.chunks[c][i];
    });
    float mean = sum_of_block(sum, slots + 8) / p.width, share = sum_of_block(product, slots + 12) / p.width;
    Row<T>::each(p.width, [&](int c, int i) { x.chunks[c][i] = factor * (scaled.chunks[c][i] - mean - x.chunks[c][i] * share); });
    x.store_to(p.out + at, p.width);
}

ENTRY(modulated_layer_norm_bf16, ModulatedLayerNorm<Bf16>, THREADS, 4) { modulated_layer_norm(p); }
ENTRY(modulated_layer_norm_f16, ModulatedLayerNorm<F16>, THREADS, 4) { modulated_layer_norm(p); }
ENTRY(modulated_layer_norm_f32, ModulatedLayerNorm<F32>, THREADS, 4) { modulated_layer_norm(p); }
ENTRY(modulated_layer_norm_gradient_bf16, ModulatedLayerNorm<Bf16>, THREADS, 4) { modulated_layer_norm_gradient(p); }
ENTRY(modulated_layer_norm_gradient_f16, ModulatedLayerNorm<F16>, THREADS, 4) { modulated_layer_norm_gradient(p); }
ENTRY(modulated_layer_norm_gradient_f32, ModulatedLayerNorm<F32>, THREADS, 4) { modulated_layer_norm_gradient(p); }
