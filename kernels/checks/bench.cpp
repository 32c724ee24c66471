// Times the device, and attention over the product's own lists: bf16, 24 heads of 128. Prints tables in Markdown.
//
//     bench device [--no-timings]              copies within the memory of the device, products by cuBLAS
//     bench attention FOLDER [--no-timings]    each file of tile_lists in FOLDER, with and without its masks
//     bench once FOLDER                        each kernel once over the windows of 128 x 128 tokens, for a profiler
//
// With --no-timings, for a simulated device, only the lists of 64 x 64 are read; in any case they are checked.
#include "attention.h"
#include "products.h"
#include "tile_lists.h"
#include <cinttypes>
#include <filesystem>

constexpr int D = 128, HEADS = 24;

// `count` random numbers in device memory, a block of which is repeated.
static u16* random_memory(i64 count) {
    constexpr i64 BLOCK = 1 << 20;
    std::mt19937 source(1);
    static Buffer<u16> block = Typed<Bf16>::random(BLOCK, source);
    u16* memory = device().memory<u16>(nullptr, count);
    for (i64 at = 0; at < count; at += BLOCK) device().fill(memory + at, block.data(), std::min(BLOCK, count - at));
    return memory;
}

// Lists in device memory.
struct DeviceLists {
    attention::Lists work = {}, joins = {};
    int work_count, join_count, slots;
    i64 entries = 0;

    explicit DeviceLists(const VisitLists& lists)
        : work_count((int)lists.work.size()), join_count((int)lists.joins.size()), slots(lists.slots) {
        work.work = device().memory(lists.work.data(), lists.work.size());
        work.entries = device().memory(lists.entries.data(), lists.entries.size());
        work.masks = device().memory(lists.masks.data(), lists.masks.size());
        joins = work;
        joins.work = device().memory(lists.joins.data(), lists.joins.size());
        for (const attention::Work& item : lists.work) entries += item.end - item.begin;
    }
    DeviceLists(const DeviceLists&) = delete;
    ~DeviceLists() {
        for (const void* memory : {(const void*)work.work, (const void*)work.entries, (const void*)work.masks,
                                   (const void*)joins.work})
            device().free((void*)memory);
    }
    Grid grid(int bytes) const { return {work_count, HEADS, 1, 128, bytes}; }
    Grid join_grid() const { return {join_count, HEADS, 1, 128, 0}; }
};

// The tensors of a call; inputs are random.
struct Tensors {
    u16 *query, *key, *value, *out, *grad, *query_grad, *key_grad, *value_grad;
    float *lse, *delta, *parts, *value_parts;

    Tensors(i64 tokens, int slots) {
        for (u16** tensor : {&query, &key, &value, &grad}) *tensor = random_memory(tokens * D * HEADS);
        for (u16** tensor : {&out, &query_grad, &key_grad, &value_grad})
            *tensor = device().memory<u16>(nullptr, tokens * D * HEADS);
        for (float** tensor : {&lse, &delta}) *tensor = device().memory<float>(nullptr, tokens * HEADS);
        size_t part_count = (size_t)HEADS * slots * 64 * (D + 1);
        for (float** tensor : {&parts, &value_parts}) *tensor = device().memory<float>(nullptr, part_count);
    }
    Tensors(const Tensors&) = delete;
    ~Tensors() {
        for (u16* memory : {query, key, value, out, grad, query_grad, key_grad, value_grad}) device().free(memory);
        for (float* memory : {lse, delta, parts, value_parts}) device().free(memory);
    }
};

// One call of attention over the lists of a file.
class AttentionCall {
    DeviceLists queries, keys;
    attention::Pair* pairs;
    attention::Visit* visits;
    int pair_count;
    Tensors t;
    attention::Forward forward_parameters;
    attention::Backward backward_parameters;

    template <class Parameters>
    static void start(const char* name, Grid grid, Parameters p, const attention::Lists& lists, int slots) {
        p.lists = lists;
        p.slots = slots;
        device().start(entry(name, Bf16(), D), grid, p);
    }
    void merge() { start("merge", queries.join_grid(), forward_parameters, queries.joins, queries.slots); }

  public:
    explicit AttentionCall(const TileLists& lists)
        : queries(lists.queries), keys(lists.keys), pairs(device().memory(lists.pairs.data(), lists.pairs.size())),
          visits(device().memory(lists.visits.data(), lists.visits.size())), pair_count((int)lists.pairs.size()),
          t(lists.header.queries(), std::max(queries.slots, keys.slots)) {
        int tokens = lists.header.queries();
        float scale = 1 / std::sqrt((float)D), *part_lse = t.parts + (i64)HEADS * queries.slots * 64 * D;
        forward_parameters = {t.query, t.key, t.value, t.out, t.lse, t.parts, part_lse, queries.work, tokens, tokens,
                              queries.slots, attention::LOG2_E * scale};
        backward_parameters = {t.query, t.key, t.value, t.out, t.grad, t.lse, t.delta, t.query_grad, t.key_grad,
                               t.value_grad, t.parts, t.value_parts, queries.work, 1, HEADS, tokens, tokens,
                               queries.slots, scale};
    }
    AttentionCall(const AttentionCall&) = delete;
    ~AttentionCall() {
        device().free(pairs);
        device().free(visits);
    }

    i64 visited() const { return queries.entries; }

    void forward() {
        start("forward", queries.grid(4 * 64 * D * 2), forward_parameters, queries.work, queries.slots);
        merge();
    }
    void paired_forward() {
        int pairs_per_block = std::clamp(pair_count * HEADS / (132 * 16), 1, 8); // as in problem.rs
        start_paired<Bf16, D>(forward_parameters, pairs, visits, pair_count, HEADS, 1, pairs_per_block, Bf16());
        merge();
    }
    void backward() {
        int key_bytes = 2 * 64 * D * 2 + 4 * 32 * D * 2 + 4 * 32 * 4;
        i64 elements = (i64)backward_parameters.queries * HEADS * D;
        start("delta", {(int)((elements / 8 + 127) / 128), 1, 1, 128, 0}, backward_parameters, queries.work, 0);
        start("query", queries.grid(4 * 64 * D * 2), backward_parameters, queries.work, queries.slots);
        start("sum_queries", queries.join_grid(), backward_parameters, queries.joins, queries.slots);
        start("key", keys.grid(key_bytes), backward_parameters, keys.work, keys.slots);
        start("sum_keys", keys.join_grid(), backward_parameters, keys.joins, keys.slots);
    }
};

static void print_attention(const TileLists& lists, const char* masks) {
    AttentionCall call(lists);
    auto print = [&](const char* what, int products, auto work) {
        double ms = device().median_ms(10, work);
        double rate = 2e-9 * products * 64 * 64 * D * HEADS * call.visited() / ms;
        std::printf("| %s | %s | %s | %.3f | %.0f |\n", lists.header.name().c_str(), masks, what, ms, rate);
        std::fflush(stdout);
    };
    print("forward", 2, [&] { call.forward(); });
    if (supports_paired_forward()) print("forward_sm90a", 2, [&] { call.paired_forward(); });
    print("backward", 7, [&] { call.backward(); });
}

static TileLists read_lists(const std::filesystem::path& path) {
    std::ifstream from(path);
    TileLists lists(from);
    lists.check();
    return lists;
}

static void bench_attention(const std::filesystem::path& folder, bool timed) {
    std::vector<std::filesystem::path> files;
    for (const auto& file : std::filesystem::directory_iterator(folder))
        if (timed || file.path().filename().string().starts_with("64x64-")) files.push_back(file.path());
    std::sort(files.begin(), files.end());
    device(); // which prints what it is
    if (timed) std::printf("| grid | masks | kernel | ms | TFLOP/s on visited tiles |\n|---|---|---|---|---|\n");
    for (const auto& file : files) {
        TileLists lists = read_lists(file);
        if (failures) return;
        if (timed) {
            print_attention(lists, "as in the product");
            lists.drop_masks();
            print_attention(lists, "none");
        } else {
            std::printf("%s: %zu work items in %zu pairs, %" PRId64 " pairs of tokens; ", lists.header.name().c_str(),
                        lists.queries.work.size(), lists.pairs.size(), (int64_t)lists.header.pairs());
            std::printf("not timed: forward, %sbackward, with masks and without\n",
                        supports_paired_forward() ? "forward_sm90a, " : "");
        }
    }
    expect(!files.empty(), folder.string() + " has no lists");
}

static void run_once(const std::filesystem::path& folder) {
    AttentionCall call(read_lists(folder / "128x128-r16.txt"));
    call.forward();
    if (supports_paired_forward()) call.paired_forward();
    call.backward();
    device().synchronize();
}

static void bench_copy(bool timed) {
    constexpr i64 BYTES = i64(1) << 30;
    if (!timed) return (void)std::printf("copy within the device: not timed\n");
    u8 *from = device().memory<u8>(nullptr, BYTES), *to = device().memory<u8>(nullptr, BYTES);
    double ms = device().median_ms(10, [&] { device().copy(to, from, BYTES); });
    std::printf("| copy of 1 GiB, read and written | %.3f | %.0f GB/s |\n", ms, 2e-6 * BYTES / ms);
    for (u8* memory : {from, to}) device().free(memory);
}

static void bench_product(Cublas& cublas, ProductShape shape, bool timed) {
    if (!timed) return (void)std::printf("%d x %d x %d: not timed\n", shape.rows, shape.columns, shape.inner);
    u16* rows = random_memory((i64)shape.rows * shape.inner);
    u16* columns = random_memory((i64)shape.columns * shape.inner);
    u16* out = device().memory<u16>(nullptr, (i64)shape.rows * shape.columns);
    bool accepted = true;
    double ms = device().median_ms(10, [&] { accepted &= cublas.multiply(shape, rows, columns, out); });
    std::printf("| product of %d x %d x %d, bf16, %s | ", shape.rows, shape.columns, shape.inner,
                cublas.name().c_str());
    std::printf(accepted ? "%.3f | %.0f TFLOP/s |\n" : "refused | |\n", ms, 1e-9 * shape.flops() / ms);
    std::fflush(stdout);
    for (u16* memory : {rows, columns, out}) device().free(memory);
}

static void bench_device(bool timed) {
    device();
    if (timed) std::printf("| device | ms | rate |\n|---|---|---|\n");
    bench_copy(timed);
    Cublas cublas;
    if (!cublas.is_there()) return (void)std::printf("products: cuBLAS is not installed: skipped\n");
    // The last three are those of FLUX at 64 x 64 tokens with 512 of text.
    constexpr ProductShape SQUARE = {8192, 8192, 8192};
    for (ProductShape shape : {SQUARE, {4608, 3072, 3072}, {4608, 12288, 3072}, {4608, 3072, 12288}})
        bench_product(cublas, shape, timed);
}

int main(int count, char** arguments) {
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ); // also to a file: what was printed before a hang says where it is
    std::vector<std::string> words(arguments + 1, arguments + count);
    bool timed = std::erase(words, "--no-timings") == 0;
    if (words.size() == 1 && words[0] == "device") {
        bench_device(timed);
    } else if (words.size() == 2 && words[0] == "attention") {
        bench_attention(words[1], timed);
    } else if (words.size() == 2 && words[0] == "once") {
        run_once(words[1]);
    } else {
        std::fprintf(stderr, "usage: bench device [--no-timings] | attention FOLDER [--no-timings] | once FOLDER\n");
        return 2;
    }
    return failures > 0;
}
