// Checks that the attention forward reaches all of tensors with more than 2^32 numbers. See `check_large_offsets`.
//
// The kernels over rows are left out: a launch covers its whole tensor, which takes hours on the simulated device. They
// count words of 16 bytes in 32 bits and widen before they scale; tests of the Rust code bound what they are given.
#pragma once
#include "attention.h"

namespace large {

// The sequence of FLUX for 8192 x 8192 px, and the smallest batch whose tensors have more than 2^32 numbers.
constexpr int D = 128, HEADS = 24, TEXT = 512, TOKENS = TEXT + 512 * 512, BATCH = 6;
constexpr size_t TOKEN = (size_t)HEADS * D, COUNT = BATCH * TOKENS * TOKEN;
static_assert(COUNT > 1ull << 32 && (size_t)(BATCH - 1) * TOKENS * TOKEN > 1ull << 31);

// First tokens of the only tiles that exist: the first of the image and its last two.
constexpr int TILES[] = {TEXT, TOKENS - 128, TOKENS - 64};

// They stand for the patches of an image of 8 x 24 tokens, each of which sees itself and its neighbours, through masks.
// The list of the one in the middle is split.
inline Sequence sequence() { return Sequence({1, 1, 0, 8, 24, 0, 6, 0, 2}); }

// The lists of that image, with its tiles where they are in the large one.
inline VisitLists lists() {
    VisitLists lists(sequence(), VisitLists::Rows::Queries);
    for (attention::Work& work : lists.work) work.first = TILES[work.first / 64];
    for (attention::Work& join : lists.joins) join.first = TILES[join.first / 64];
    for (attention::Entry& entry : lists.entries) entry.first = TILES[entry.first / 64];
    return lists;
}

// Calls a function of the driver that Device does not have, or that may fail.
template <class... Arguments>
int call(const char* name, Arguments... arguments) {
    device(); // has made the context by then
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    auto function = (int (*)(Arguments...))(library ? dlsym(library, name) : nullptr);
    return function ? function(arguments...) : -1;
}

// `count` values of device memory, whose contents are arbitrary; `data` is null if there is not enough.
template <class V>
struct DeviceMemory {
    V* data = nullptr;
    size_t count;
    explicit DeviceMemory(size_t count) : count(count) {
        constexpr int OUT_OF_MEMORY = 2;
        unsigned long long memory;
        int status = call("cuMemAlloc_v2", &memory, count * sizeof(V));
        expect(status == 0 || status == OUT_OF_MEMORY, "cuMemAlloc_v2: error " + std::to_string(status));
        if (status == 0) data = (V*)memory;
    }
    DeviceMemory(const DeviceMemory&) = delete;
    ~DeviceMemory() {
        if (data) device().free(data);
    }
    void forget() { // all becomes NaN
        int status = call("cuMemsetD8Async", (unsigned long long)data, (u8)0xff, count * sizeof(V), (void*)nullptr);
        expect(status == 0, "cuMemsetD8Async: error " + std::to_string(status));
    }
    void read(V* to, size_t first, size_t count) const {
        int status = call("cuMemcpyDtoH_v2", (void*)to, (unsigned long long)(data + first), count * sizeof(V));
        expect(status == 0, "cuMemcpyDtoH_v2: error " + std::to_string(status));
    }
};

// The part of a tensor that exists: (BATCH, tiles, 64, HEADS, D).
struct Rows {
    static constexpr size_t TILE = 64 * TOKEN;
    std::vector<u16> numbers = std::vector<u16>(BATCH * std::size(TILES) * TILE);

    static Rows random(int seed, float deviation) {
        std::mt19937 source(seed);
        std::normal_distribution<float> normal(0, deviation);
        Rows rows;
        for (u16& x : rows.numbers) x = rounded(normal(source), Bf16());
        return rows;
    }
    Values of(int batch, int head) const {
        Values out;
        size_t tokens = 64 * std::size(TILES);
        for (size_t token = batch * tokens; token < (batch + 1) * tokens; token++)
            for (int i = 0; i < D; i++) out.push_back(number(numbers[token * TOKEN + head * D + i], Bf16()));
        return out;
    }
    // Calls `copy` with where a tile begins in the whole tensor, and with the tile.
    template <class Copy>
    void for_each_tile(Copy copy) {
        u16* tile = numbers.data();
        for (size_t batch = 0; batch < BATCH; batch++)
            for (int first : TILES) {
                copy((batch * TOKENS + first) * TOKEN, tile);
                tile += TILE;
            }
    }
};

inline void write(const DeviceMemory<u16>& tensor, Rows& rows) {
    rows.for_each_tile([&](size_t first, u16* tile) { device().fill(tensor.data + first, tile, Rows::TILE); });
}

inline Rows read(const DeviceMemory<u16>& tensor) {
    Rows rows;
    rows.for_each_tile([&](size_t first, u16* tile) { tensor.read(tile, first, Rows::TILE); });
    return rows;
}

// What is on the device. To save memory, the output takes the place of the queries: a block writes only what it alone
// has read.
struct Tensors {
    static constexpr double GIGABYTES = 1e-9 * (3. * COUNT * sizeof(u16) + BATCH * HEADS * TOKENS * sizeof(float));
    DeviceMemory<u16> query{COUNT}, key{COUNT}, value{COUNT};
    DeviceMemory<float> lse{(size_t)BATCH * HEADS * TOKENS};

    bool are_allocated() const { return query.data && key.data && value.data && lse.data; }

    void run(const VisitLists& lists, bool paired) {
        size_t parts = (size_t)BATCH * HEADS * lists.slots * 64;
        Buffer<float> sums(parts * D), logs(parts);
        attention::Forward p = {query.data, key.data, value.data, query.data, lse.data, sums.data(), logs.data(),
                                lists.lists(lists.work), TOKENS, TOKENS, lists.slots,
                                attention::LOG2_E / std::sqrt((float)D)};
        auto launch = [&](const char* kernel, size_t works, int bytes) {
            device().launch(entry(kernel, Bf16(), D), {(int)works, HEADS, BATCH, 128, bytes}, p);
        };
        if (paired) {
            PairLists pairs(lists);
            int count = (int)pairs.pairs.size();
            start_paired<Bf16, D>(p, pairs.pairs.data(), pairs.visits.data(), count, HEADS, BATCH, 2, Bf16());
            device().synchronize();
        } else {
            launch("forward", lists.work.size(), 4 * 64 * D * 2);
        }
        p.lists = lists.lists(lists.joins);
        launch("merge", lists.joins.size(), 0);
    }

    Values lse_of(int batch, int head) const {
        std::vector<float> out(64 * std::size(TILES));
        for (size_t i = 0; i < std::size(TILES); i++)
            lse.read(&out[i * 64], ((size_t)batch * HEADS + head) * TOKENS + TILES[i], 64);
        return Values(out.begin(), out.end());
    }
};

// One head of the inputs and results.
struct Head {
    int batch, head;
    Values query, key, value, out, lse;

    void check(const std::string& kernel, Accuracy& accuracy) const {
        std::string name = "large " + kernel + ", batch " + std::to_string(batch) + ", head " + std::to_string(head);
        Values in[4] = {query, key, value, Values(query.size())};
        Reference exact(sequence(), D, in, [](double x) { return x; }), rough(sequence(), D, in, Typed<Bf16>::round);
        accuracy.compare(name, out, exact.out, rough.out, D);
        for (size_t i = 0; i < lse.size(); i++) {
            double bound = 2e-5 * (1 + std::abs(exact.lse[i]));
            if (!(std::abs(lse[i] - exact.lse[i]) < bound)) return expect(false, name + ": lse");
        }
    }
};

} // namespace large

// Returns whether there was enough memory.
inline bool check_large_offsets() {
    using namespace large;
    Tensors tensors;
    if (!tensors.are_allocated()) {
        std::printf("attention beyond 2^32 numbers: skipped, takes %.0f GB of device memory\n", Tensors::GIGABYTES);
        return false;
    }
    Rows query = Rows::random(1, 2), key = Rows::random(2, 1), value = Rows::random(3, 1);
    write(tensors.key, key);
    write(tensors.value, value);
    VisitLists lists = large::lists();
    Accuracy accuracy;
    set_schedule(Schedule::Default);
    for (bool paired : {false, true}) {
        if (paired && !supports_paired_forward()) continue;
        write(tensors.query, query);
        tensors.lse.forget();
        tensors.run(lists, paired);
        Rows out = read(tensors.query);
        for (auto [batch, head] : {std::pair(0, 0), {3, 11}, {BATCH - 1, 0}, {BATCH - 1, HEADS - 1}}) {
            Head one = {batch, head, query.of(batch, head), key.of(batch, head), value.of(batch, head),
                        out.of(batch, head), tensors.lse_of(batch, head)};
            one.check(paired ? "paired forward" : "forward", accuracy);
        }
    }
    std::printf("attention bf16 D %d, beyond 2^32 numbers: out error %.2e, plain %.2e\n", D, accuracy.kernel,
                accuracy.plain);
    return true;
}
