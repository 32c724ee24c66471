// Two tiles of queries that share what is loaded for them.
struct Pair {
    int works[2];           // numbers in Lists::work, -1 where there is none
    int begin, end, own[2]; // visits [begin, end); the i-th tile meets none from own[i] on
};

// A tile of keys from `first` on, and what each of the two tiles sees of it, a mask of an Entry or UNSEEN.
struct Visit {
    int first, masks[2];
};
constexpr int UNSEEN = 0x7fffffff;

// How the device finds boxes in a tensor, as the driver encodes it.
struct __align__(64) TensorMap {
    unsigned long long words[16];
};

struct PairedForward {
    TensorMap key, value; // (batch, keys, heads, D), in boxes of 64 tokens and 64 numbers of one head
    Forward forward;
    const Pair* pairs;
    const Visit* visits;
    int count; // pairs, of which each block computes every gridDim.x-th
};
