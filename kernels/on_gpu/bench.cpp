// Times of attention on the device, forward and backward, as rows of a table: bf16, 24 heads of 128, 512 text tokens. On a
// device of compute capability 9.0 the forward of 8.0 has a column of its own.
#include "../emulation/attention.h"
#include <cinttypes>
#include <cmath>

constexpr int D = 128, HEADS = 24;

// Lists in memory of the device.
struct Resident {
    attention::Lists work, joins;
    const attention::Pair* pairs = nullptr;
    const attention::Visit* visits = nullptr;
    int couples = 0;
    int works, parts_of, slots;
    i64 entries = 0;

    explicit Resident(const Built& built)
        : works((int)built.work.size()), parts_of((int)built.joins.size()), slots(built.slots) {
        work = {device().memory(built.work.data(), built.work.size()), device().memory(built.entries.data(), built.entries.size()),
                device().memory(built.masks.data(), built.masks.size()), nullptr, 0};
        joins = work;
        joins.work = device().memory(built.joins.data(), built.joins.size());
        for (const attention::Work& one : built.work) entries += one.end - one.begin;
        if (!runs_pairs()) return;
        Pairs by_two(built);
        couples = (int)by_two.pairs.size();
        pairs = device().memory(by_two.pairs.data(), by_two.pairs.size());
        visits = device().memory(by_two.visits.data(), by_two.visits.size());
    }
    ~Resident() {
        for (const void* memory : {(const void*)work.work, (const void*)work.entries, (const void*)work.masks,
                                   (const void*)joins.work, (const void*)pairs, (const void*)visits})
            if (memory) device().free((void*)memory);
    }
    Grid grid(int bytes) const { return {works, HEADS, 1, 128, bytes}; }
    Grid join_grid() const { return {parts_of, HEADS, 1, 128, 0}; }
};

// Tensors of one call, random numbers in those that are read.
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
        for (float** tensor : {&parts, &value_parts}) *tensor = device().memory<float>(nullptr, (i64)HEADS * slots * 64 * (D + 1));
    }
    ~Tensors() {
        for (u16* memory : {query, key, value, out, grad, query_grad, key_grad, value_grad}) device().free(memory);
        for (float* memory : {lse, delta, parts, value_parts}) device().free(memory);
    }
};

static double rate(i64 entries, int products, double ms) { return 2e-9 * products * 64 * 64 * D * HEADS * entries / ms; }

static void bench(int side, double radius, int text) {
    // As lists.rs does it: only rows longer than those of the image are split, into at most 16 parts.
    int reach = 2 * (int)std::ceil((radius + 7) / 8) + 1, tiles = (side * side + text) / 64;
    int longest = radius == 0 ? tiles : std::max({64, tiles / 16 + 1, reach * reach + text / 64});
    Scene scene({1, HEADS, text, side, side, 0, radius, 0, longest});
    Resident queries(Built(scene, Built::Rows::Queries)), keys(Built(scene, Built::Rows::Keys));
    Tensors t(scene.queries, std::max(queries.slots, keys.slots));
    float scale = 1 / std::sqrt((float)D);
    attention::Forward forward = {t.query, t.key, t.value, t.out, t.lse, t.parts, t.parts + (i64)HEADS * queries.slots * 64 * D,
                                  queries.work, scene.queries, scene.keys, queries.slots, attention::LOG2_E * scale};
    attention::Backward backward = {t.query, t.key, t.value, t.out, t.grad, t.lse, t.delta, t.query_grad, t.key_grad,
                                    t.value_grad, t.parts, t.value_parts, queries.work, 1, HEADS, scene.queries, scene.keys,
                                    queries.slots, scale};
    auto start = [](const char* name, Grid grid, auto p, const attention::Lists& lists, int slots) {
        p.lists = lists;
        p.slots = slots;
        device().start(entry(name, Bf16(), D), grid, p);
    };
    double forward_ms = device().median_ms(10, [&] {
        start("forward", queries.grid(4 * 64 * D * 2), forward, queries.work, queries.slots);
        start("merge", queries.join_grid(), forward, queries.joins, queries.slots);
    });
    double paired_ms = !runs_pairs() ? NAN : device().median_ms(10, [&] {
        int of_block = std::clamp(queries.couples * HEADS / (132 * 16), 1, 8); // as problem.rs does it
        start_paired<Bf16, D>(forward, queries.pairs, queries.visits, queries.couples, HEADS, 1, of_block, Bf16());
        start("merge", queries.join_grid(), forward, queries.joins, queries.slots);
    });
    int key_bytes = 2 * 64 * D * 2 + 4 * 32 * D * 2 + 4 * 32 * 4;
    double backward_ms = device().median_ms(10, [&] {
        start("delta", {(int)((i64)scene.queries * HEADS * D / 8 / 128) + 1, 1, 1, 128, 0}, backward, queries.work, 0);
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
    std::printf("| grid | r | text | tiles visited by a head | forward ms | TFLOP/s on visited tiles | forward sm_90a ms | TFLOP/s | "
                "backward ms | TFLOP/s |\n"
                "|---|---|---|---|---|---|---|---|---|---|\n");
    bench(64, 0, 512);
    bench(128, 0, 512);
    for (int side : {64, 128, 256, 512})
        for (double radius : {8., 16., 32.}) bench(side, radius, 512);
}
