// Prints a table of attention times, forward and backward: bf16, 24 heads of 128, 512 text tokens. On compute capability 9.0
// the table has both forwards.
#include "attention.h"
#include <cinttypes>
#include <cmath>

constexpr int D = 128, HEADS = 24;

// Lists in device memory.
struct DeviceLists {
    attention::Lists work = {}, joins = {};
    const attention::Pair* pairs = nullptr;
    const attention::Visit* visits = nullptr;
    int pair_count = 0;
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
        if (!supports_paired_forward()) return;
        PairLists pair_lists(lists);
        pair_count = (int)pair_lists.pairs.size();
        pairs = device().memory(pair_lists.pairs.data(), pair_lists.pairs.size());
        visits = device().memory(pair_lists.visits.data(), pair_lists.visits.size());
    }
    ~DeviceLists() {
        for (const void* memory : {(const void*)work.work, (const void*)work.entries, (const void*)work.masks,
                                   (const void*)joins.work, (const void*)pairs, (const void*)visits})
            if (memory) device().free((void*)memory);
    }
    Grid grid(int bytes) const { return {work_count, HEADS, 1, 128, bytes}; }
    Grid join_grid() const { return {join_count, HEADS, 1, 128, 0}; }
};

// The tensors of a call; inputs are random.
struct Tensors {
    u16 *query, *key, *value, *out, *grad, *query_grad, *key_grad, *value_grad;
    float *lse, *delta, *parts, *value_parts;

    Tensors(i64 tokens, int slots) {
        std::mt19937 source(1);
        Buffer<u16> block = Typed<Bf16>::random(tokens * D, source);
        for (u16** tensor : {&query, &key, &value, &out, &grad, &query_grad, &key_grad, &value_grad}) {
            *tensor = device().memory<u16>(nullptr, tokens * D * HEADS);
            for (int head = 0; head < HEADS; head++) device().fill(*tensor + head * tokens * D, block.data(), tokens * D);
        }
        for (float** tensor : {&lse, &delta}) *tensor = device().memory<float>(nullptr, tokens * HEADS);
        size_t part_count = (size_t)HEADS * slots * 64 * (D + 1);
        for (float** tensor : {&parts, &value_parts}) *tensor = device().memory<float>(nullptr, part_count);
    }
    ~Tensors() {
        for (u16* memory : {query, key, value, out, grad, query_grad, key_grad, value_grad}) device().free(memory);
        for (float* memory : {lse, delta, parts, value_parts}) device().free(memory);
    }
};

static double rate(i64 entries, int products, double ms) { return 2e-9 * products * 64 * 64 * D * HEADS * entries / ms; }

static void bench(int side, double radius, int text) {
    // As in lists.rs: only rows longer than those of the image are split, into at most 16 parts.
    int reach = 2 * (int)std::ceil((radius + 7) / 8) + 1, tiles = (side * side + text) / 64;
    int longest = radius == 0 ? tiles : std::max({64, tiles / 16 + 1, reach * reach + text / 64});
    Sequence sequence({1, HEADS, text, side, side, 0, radius, 0, longest});
    DeviceLists queries(VisitLists(sequence, VisitLists::Rows::Queries)), keys(VisitLists(sequence, VisitLists::Rows::Keys));
    Tensors t(sequence.queries, std::max(queries.slots, keys.slots));
    float scale = 1 / std::sqrt((float)D);
    attention::Forward forward = {t.query, t.key, t.value, t.out, t.lse, t.parts, t.parts + (i64)HEADS * queries.slots * 64 * D,
                                  queries.work, sequence.queries, sequence.keys, queries.slots, attention::LOG2_E * scale};
    attention::Backward backward = {t.query, t.key, t.value, t.out, t.grad, t.lse, t.delta, t.query_grad, t.key_grad,
                                    t.value_grad, t.parts, t.value_parts, queries.work, 1, HEADS, sequence.queries,
                                    sequence.keys, queries.slots, scale};
    auto start = [](const char* name, Grid grid, auto p, const attention::Lists& lists, int slots) {
        p.lists = lists;
        p.slots = slots;
        device().start(entry(name, Bf16(), D), grid, p);
    };
    double forward_ms = device().median_ms(10, [&] {
        start("forward", queries.grid(4 * 64 * D * 2), forward, queries.work, queries.slots);
        start("merge", queries.join_grid(), forward, queries.joins, queries.slots);
    });
    double paired_ms = !supports_paired_forward() ? NAN : device().median_ms(10, [&] {
        int pairs_per_block = std::clamp(queries.pair_count * HEADS / (132 * 16), 1, 8); // as in problem.rs
        start_paired<Bf16, D>(forward, queries.pairs, queries.visits, queries.pair_count, HEADS, 1, pairs_per_block, Bf16());
        start("merge", queries.join_grid(), forward, queries.joins, queries.slots);
    });
    int key_bytes = 2 * 64 * D * 2 + 4 * 32 * D * 2 + 4 * 32 * 4;
    double backward_ms = device().median_ms(10, [&] {
        start("delta", {(int)((i64)sequence.queries * HEADS * D / 8 / 128) + 1, 1, 1, 128, 0}, backward, queries.work, 0);
        start("query", queries.grid(4 * 64 * D * 2), backward, queries.work, queries.slots);
        start("sum_queries", queries.join_grid(), backward, queries.joins, queries.slots);
        start("key", keys.grid(key_bytes), backward, keys.work, keys.slots);
        start("sum_keys", keys.join_grid(), backward, keys.joins, keys.slots);
    });
    std::printf("| %d x %d | %g | %d | %" PRId64 " | %.3f | %.0f | %.3f | %.0f | %.3f | %.0f |\n", side, side, radius, text,
                (int64_t)queries.entries, forward_ms, rate(queries.entries, 2, forward_ms), paired_ms,
                rate(queries.entries, 2, paired_ms), backward_ms, rate(queries.entries, 7, backward_ms));
    std::fflush(stdout);
}

int main() {
    std::printf("| grid | r | text | tiles visited by a head | forward ms | TFLOP/s on visited tiles | forward sm_90a ms | "
                "TFLOP/s | backward ms | TFLOP/s |\n"
                "|---|---|---|---|---|---|---|---|---|---|\n");
    bench(64, 0, 512);
    bench(128, 0, 512);
    for (int side : {64, 128, 256, 512})
        for (double radius : {8., 16., 32.}) bench(side, radius, 512);
}
