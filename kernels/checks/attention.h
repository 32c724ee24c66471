// Checks the attention kernels against attention in f64, over ragged grids and text. See `check_attention`.
#pragma once
#include "locate.h"
#include "paired.h"
#include <fstream>

// Attention and its gradients by definition. `round` is applied to the result of each step.
struct Reference {
    Values out, lse, query, key, value;

    template <class Round>
    Reference(const Sequence& sequence, int D, const Values (&in)[4], Round round) {
        const Case& shape = sequence.shape;
        out = query = Values(in[0].size());
        key = value = Values(in[1].size());
        lse = Values((size_t)shape.batch * shape.heads * sequence.queries);
        for (int batch = 0; batch < shape.batch; batch++)
            for (int head = 0; head < shape.heads; head++)
                for (int i = 0; i < sequence.queries; i++) visit(sequence, D, in, round, batch, head, i);
        for (Values* result : {&query, &key, &value})
            for (double& x : *result) x = round(x);
    }

  private:
    template <class Round>
    void visit(const Sequence& sequence, int D, const Values (&in)[4], Round round, int batch, int head, int row) {
        auto at = [&](int tokens, int token) { return (((size_t)batch * tokens + token) * sequence.shape.heads + head) * D; };
        auto dot = [&](const double* a, const double* b) {
            double sum = 0;
            for (int i = 0; i < D; i++) sum += a[i] * b[i];
            return round(sum);
        };
        size_t q = at(sequence.queries, row);
        std::vector<size_t> seen;
        Values weights, slopes;
        double top = -INFINITY, total = 0, delta = 0, scale = 1 / std::sqrt((double)D);
        for (int token = 0; token < sequence.keys; token++)
            if (sequence.sees(batch, row, token)) seen.push_back(at(sequence.keys, token));
        for (size_t k : seen) {
            weights.push_back(round(scale * dot(&in[0][q], &in[1][k])));
            top = std::max(top, weights.back());
        }
        for (double& x : weights) total += x = round(std::exp(round(x - top)));
        total = round(total);
        lse[((size_t)batch * sequence.shape.heads + head) * sequence.queries + row] = top + std::log(total);
        for (size_t j = 0; j < seen.size(); j++) {
            weights[j] = round(weights[j] / total);
            for (int i = 0; i < D; i++) out[q + i] += weights[j] * in[2][seen[j] + i];
            slopes.push_back(dot(&in[3][q], &in[2][seen[j]]));
            delta += round(weights[j] * slopes[j]);
        }
        for (int i = 0; i < D; i++) out[q + i] = round(out[q + i]);
        for (size_t j = 0; j < seen.size(); j++) {
            double change = round(scale * round(weights[j] * round(slopes[j] - round(delta))));
            for (int i = 0; i < D; i++) {
                query[q + i] += change * in[1][seen[j] + i];
                key[seen[j] + i] += change * in[0][q + i];
                value[seen[j] + i] += weights[j] * in[3][q + i];
            }
        }
    }
};

// A forward and backward pass on the device.
template <class T, int D>
struct AttentionRun {
    Buffer<u16> out, query, key, value;
    Buffer<float> lse, delta;

    AttentionRun(const Sequence& sequence, Buffer<u16> (&in)[4], const VisitLists& forward, const VisitLists& reverse,
                 bool paired)
        : out(in[0].count), query(in[0].count), key(in[1].count), value(in[1].count), lse(in[0].count / D),
          delta(in[0].count / D) {
        run_forward(sequence, in, forward, paired);
        attention::Backward p = {in[0].data(), in[1].data(), in[2].data(), out.data(), in[3].data(), lse.data(),
                                 delta.data(), query.data(), key.data(), value.data(), nullptr, nullptr, {},
                                 sequence.shape.batch, sequence.shape.heads, sequence.queries, sequence.keys, 0,
                                 1 / std::sqrt((float)D)};
        device().launch(entry("delta", T(), D), {(int)(in[0].count / 8 + 127) / 128, 1, 1, 128, 0}, p);
        run_queries(sequence, p, forward);
        run_keys(sequence, p, reverse);
    }

    bool are_guards_intact() {
        bool intact = lse.is_guard_intact() && delta.is_guard_intact();
        for (Buffer<u16>* tensor : {&out, &query, &key, &value}) intact &= tensor->is_guard_intact();
        return intact;
    }
    bool operator==(AttentionRun& other) {
        return out == other.out && query == other.query && key == other.key && value == other.value && lse == other.lse;
    }

  private:
    static size_t parts(const Case& shape, int slots) { return (size_t)shape.batch * shape.heads * slots * 64; }
    static Grid grid(const Case& shape, size_t works, int bytes) { return {(int)works, shape.heads, shape.batch, 128, bytes}; }

    void run_forward(const Sequence& sequence, Buffer<u16> (&in)[4], const VisitLists& visit_lists, bool paired) {
        const Case& shape = sequence.shape;
        Buffer<float> sums(parts(shape, visit_lists.slots) * D), logs(parts(shape, visit_lists.slots));
        attention::Forward p = {in[0].data(), in[1].data(), in[2].data(), out.data(), lse.data(), sums.data(),
                                logs.data(), visit_lists.lists(visit_lists.work), sequence.queries, sequence.keys,
                                visit_lists.slots, attention::LOG2_E / std::sqrt((float)D)};
        if (paired)
            run_paired(p, shape, visit_lists);
        else
            device().launch(entry("forward", T(), D), grid(shape, visit_lists.work.size(), 4 * 64 * D * 2), p);
        p.lists = visit_lists.lists(visit_lists.joins);
        device().launch(entry("merge", T(), D), grid(shape, visit_lists.joins.size(), 0), p);
        expect(sums.is_guard_intact() && logs.is_guard_intact(), "guards of partial results");
    }

    static void run_paired(const attention::Forward& p, const Case& shape, const VisitLists& visit_lists) {
        PairLists lists(visit_lists);
        int count = (int)lists.pairs.size();
        start_paired<T, D>(p, lists.pairs.data(), lists.visits.data(), count, shape.heads, shape.batch, 3, T());
        device().synchronize();
    }

    void run_queries(const Sequence& sequence, attention::Backward p, const VisitLists& visit_lists) {
        Buffer<float> sums(parts(sequence.shape, visit_lists.slots) * D);
        p.parts = sums.data();
        p.lists = visit_lists.lists(visit_lists.work);
        p.slots = visit_lists.slots;
        device().launch(entry("query", T(), D), grid(sequence.shape, visit_lists.work.size(), 4 * 64 * D * 2), p);
        p.lists = visit_lists.lists(visit_lists.joins);
        device().launch(entry("sum_queries", T(), D), grid(sequence.shape, visit_lists.joins.size(), 0), p);
        expect(sums.is_guard_intact(), "guards of partial query gradients");
    }

    void run_keys(const Sequence& sequence, attention::Backward p, const VisitLists& visit_lists) {
        Buffer<float> sums(parts(sequence.shape, visit_lists.slots) * D), value_sums(sums.count);
        p.parts = sums.data();
        p.value_parts = value_sums.data();
        p.lists = visit_lists.lists(visit_lists.work);
        p.slots = visit_lists.slots;
        int bytes = 2 * 64 * D * 2 + 4 * 32 * D * 2 + 4 * 32 * 4;
        device().launch(entry("key", T(), D), grid(sequence.shape, visit_lists.work.size(), bytes), p);
        p.lists = visit_lists.lists(visit_lists.joins);
        device().launch(entry("sum_keys", T(), D), grid(sequence.shape, visit_lists.joins.size(), 0), p);
        expect(sums.is_guard_intact() && value_sums.is_guard_intact(), "guards of partial key gradients");
    }
};

template <class T, int D>
void compare(const std::string& name, const Sequence& sequence, AttentionRun<T, D>& got, const Reference& exact,
             const Reference& rough, Accuracy (&accuracy)[4]) {
    struct {
        const char* name;
        Buffer<u16>& got;
        const Values &exact, &rough;
        const std::vector<Span>& tiles;
    } results[] = {{"out", got.out, exact.out, rough.out, sequence.query_tiles},
                   {"query", got.query, exact.query, rough.query, sequence.query_tiles},
                   {"key", got.key, exact.key, rough.key, sequence.key_tiles},
                   {"value", got.value, exact.value, rough.value, sequence.key_tiles}};
    bool right = true;
    for (int i = 0; i < 4; i++) {
        const auto& [what, buffer, exact, rough, tiles] = results[i];
        Values values = Typed<T>::values(buffer);
        if (accuracy[i].compare(name + ", " + what, values, exact, rough, D)) continue;
        if (right) print_wrong_places(values, exact, rough, tiles, {sequence.shape.heads, D}); // others follow from it
        right = false;
    }
    for (size_t i = 0; i < got.lse.count; i++)
        if (!(std::abs(got.lse[i] - exact.lse[i]) < 2e-5 * (1 + std::abs(exact.lse[i])))) return expect(false, name + ": lse");
}

// Random queries, keys, values and gradients of the output.
template <class T, int D>
struct AttentionInputs {
    Buffer<u16> tensors[4];

    explicit AttentionInputs(const Sequence& sequence)
        : AttentionInputs(sequence, std::mt19937(sequence.shape.height * 1000 + sequence.shape.width * 10 +
                                                 sequence.shape.text)) {}

  private:
    AttentionInputs(const Sequence& sequence, std::mt19937 source)
        : tensors{Typed<T>::random(count(sequence, sequence.queries), source, 2),
                  Typed<T>::random(count(sequence, sequence.keys), source),
                  Typed<T>::random(count(sequence, sequence.keys), source),
                  Typed<T>::random(count(sequence, sequence.queries), source)} {}
    static size_t count(const Sequence& sequence, int tokens) {
        return (size_t)sequence.shape.batch * sequence.shape.heads * tokens * D;
    }
};

enum class Forwards { Both, Plain, Paired };

template <class T, int D>
void check_case(const Sequence& sequence, const VisitLists& forward, const VisitLists& reverse, Accuracy (&accuracy)[4],
                Forwards which = Forwards::Both) {
    const Case& shape = sequence.shape;
    AttentionInputs<T, D> inputs(sequence);
    Buffer<u16>(&in)[4] = inputs.tensors;
    Values values[4] = {Typed<T>::values(in[0]), Typed<T>::values(in[1]), Typed<T>::values(in[2]),
                        Typed<T>::values(in[3])};
    Reference exact(sequence, D, values, [](double x) { return x; }), rough(sequence, D, values, Typed<T>::round);
    std::string name = shape.name() + ", D " + std::to_string(D);
    for (bool paired : {false, true}) {
        if (paired && !supports_paired_forward()) continue;
        if (which == (paired ? Forwards::Plain : Forwards::Paired)) continue;
        set_schedule(Schedule::Default);
        AttentionRun<T, D> got(sequence, in, forward, reverse, paired);
        expect(got.are_guards_intact(), name + ": written out of bounds");
        // Grids of one height have all kinds of text and radius, and repeating only those saves half of the time.
        if (shape.height == 13) {
            set_schedule(Schedule::Opposite);
            AttentionRun<T, D> again(sequence, in, forward, reverse, paired);
            expect(again == got, name + ": depends on the order of warps or copies");
        }
        compare(name + (paired ? ", paired" : ""), sequence, got, exact, rough, accuracy);
    }
}

inline void report(const char* type, int D, const char* what, size_t count, const Accuracy (&accuracy)[4]) {
    const char* names[] = {"out", "query", "key", "value"};
    for (int i = 0; i < 4; i++)
        std::printf("attention %s D %d, %zu %s: %s error %.2e, plain %.2e\n", type, D, count, what, names[i],
                    accuracy[i].kernel, accuracy[i].plain);
}

template <class T, int D>
void check_attention(const std::vector<Case>& cases) {
    Accuracy accuracy[4];
    for (const Case& shape : cases) {
        Sequence sequence(shape);
        VisitLists forward(sequence, VisitLists::Rows::Queries), reverse(sequence, VisitLists::Rows::Keys);
        check_case<T, D>(sequence, forward, reverse, accuracy);
    }
    report(name_of(T()), D, "cases", cases.size(), accuracy);
}

// The lists that the Rust code makes; a test there compares them with this file.
template <class T, int D>
void check_committed_lists() {
    std::ifstream from(kernels_folder() + "/checks/lists.txt");
    Accuracy accuracy[4];
    Case shape = {1, 1, 0, 0, 0, 0, 0, 0, 0};
    size_t count = 0;
    for (int limit; from >> shape.height >> shape.width >> shape.text >> shape.pooled >> limit; count++) {
        shape.radius = std::sqrt((double)limit);
        Sequence sequence(shape);
        VisitLists forward(from, sequence.text_tiles()), reverse(from, sequence.text_tiles());
        check_case<T, D>(sequence, forward, reverse, accuracy);
    }
    expect(count == 3, "lists.txt: 3 sequences");
    report(name_of(T()), D, "committed lists", count, accuracy);
}
