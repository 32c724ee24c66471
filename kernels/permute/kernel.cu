// Tokens in another order: out[b, i] = x[b, from[i]], 16 bytes to a thread, of any type. The gradient is the same with
// the inverse order.
struct Permute {
    const Four* x; // (batch, tokens, words) of 16 bytes
    Four* out;     // as x
    const u32* from;
    u32 count; // batch · tokens · words
    u32 tokens, words;
};

ENTRY(permute, Permute, THREADS, 8) {
    u32 at = thread_number(), row = at / p.words;
    if (at >= p.count) return;
    u32 from = row / p.tokens * p.tokens + p.from[row % p.tokens];
    p.out[at] = p.x[(i64)from * p.words + at % p.words];
}
