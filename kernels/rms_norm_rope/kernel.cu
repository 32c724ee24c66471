// Root-mean-square norm over heads, then rotation of interleaved pairs (RoFormer, eq. 34), and the gradient of x.
// Without cosines and sines it is the norm alone. A head is a row; `lanes` threads hold it, 16 bytes each.
template <class T>
struct RmsNormRope {
    typedef typename T::Stored Stored;
    const Stored *x, *weight, *grad; // x and grad (batch, tokens, heads, width), weight (width)
    const float *cos, *sin;          // (tokens, width / 2), or null
    Stored* out;                     // as x
    u32 rows, tokens, heads;
    int width, lanes; // lanes · 16 bytes >= width, a power of two up to 32
    float eps;
};

// This thread's place: nothing to do where it lies behind the row or the last row.
template <class T>
struct Place {
    i64 at;
    int column, token;
    bool inside;

    INLINE explicit Place(const RmsNormRope<T>& p) {
        u32 row = thread_number() / p.lanes;
        column = (int)(thread_number() % p.lanes) * T::PER_LOAD;
        token = (int)(row / p.heads % p.tokens);
        inside = row < p.rows && column < p.width;
        at = (i64)row * p.width + column;
    }
};

// Rotates pairs by the angles of a token, or, with `sign` -1, back.
template <class T>
INLINE void rotate(float (&x)[T::PER_LOAD], const RmsNormRope<T>& p, const Place<T>& place, float sign) {
    if (!p.cos) return;
    i64 from = ((i64)place.token * p.width + place.column) / 2;
#pragma unroll
    for (int i = 0; i < T::PER_LOAD; i += 2) {
        float even = x[i], odd = x[i + 1], cosine = p.cos[from + i / 2], sine = sign * p.sin[from + i / 2];
        x[i] = even * cosine - odd * sine;
        x[i + 1] = even * sine + odd * cosine;
    }
}

// Σ a b over the row.
template <int N>
INLINE float dot(const float (&a)[N], const float (&b)[N], int lanes) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum += a[i] * b[i];
    return sum_of_lanes(sum, lanes);
}

template <class T>
INLINE void rms_norm_rope(const RmsNormRope<T>& p) {
    Place<T> place(p);
    float x[T::PER_LOAD], weight[T::PER_LOAD];
    clear(x);
    if (place.inside) load(x, p.x + place.at, T());
    float factor = inverse_root(dot(x, x, p.lanes) / p.width + p.eps);
    if (!place.inside) return;
    load(weight, p.weight + place.column, T());
#pragma unroll
    for (int i = 0; i < T::PER_LOAD; i++) x[i] *= factor * weight[i];
    rotate(x, p, place, 1);
    store(p.out + place.at, x, T());
}

// With h = weight · grad, rotated back: factor · (h - x · factor² · mean(h x)).
template <class T>
INLINE void rms_norm_rope_gradient(const RmsNormRope<T>& p) {
    Place<T> place(p);
    float x[T::PER_LOAD], scaled[T::PER_LOAD], weight[T::PER_LOAD];
    clear(x);
    clear(scaled);
    if (place.inside) {
        load(x, p.x + place.at, T());
        load(scaled, p.grad + place.at, T());
        load(weight, p.weight + place.column, T());
        rotate(scaled, p, place, -1);
#pragma unroll
        for (int i = 0; i < T::PER_LOAD; i++) scaled[i] *= weight[i];
    }
    float factor = inverse_root(dot(x, x, p.lanes) / p.width + p.eps);
    float share = factor * factor * dot(scaled, x, p.lanes) / p.width;
    if (!place.inside) return;
#pragma unroll
    for (int i = 0; i < T::PER_LOAD; i++) x[i] = factor * (scaled[i] - x[i] * share);
    store(p.out + place.at, x, T());
}

ENTRY(rms_norm_rope_bf16, RmsNormRope<Bf16>, THREADS, 8) { rms_norm_rope(p); }
ENTRY(rms_norm_rope_f16, RmsNormRope<F16>, THREADS, 8) { rms_norm_rope(p); }
ENTRY(rms_norm_rope_f32, RmsNormRope<F32>, THREADS, 8) { rms_norm_rope(p); }
ENTRY(rms_norm_rope_gradient_bf16, RmsNormRope<Bf16>, THREADS, 8) { rms_norm_rope_gradient(p); }
ENTRY(rms_norm_rope_gradient_f16, RmsNormRope<F16>, THREADS, 8) { rms_norm_rope_gradient(p); }
ENTRY(rms_norm_rope_gradient_f32, RmsNormRope<F32>, THREADS, 8) { rms_norm_rope_gradient(p); }
