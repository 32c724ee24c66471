// The smallest calls of attention, one for each thing that can go wrong with the forward for compute capability 9.0.
#pragma once
#include "attention.h"

struct TinyCase {
    const char* name;
    Case shape;
    int visits; // the most of a pair of query tiles
};

// Pooled tokens are keys that image tokens see at any distance: 64 of them are a visit more.
inline const std::vector<TinyCase>& tiny_cases() {
    static const std::vector<TinyCase> cases = {
        {"1-visit", {1, 1, 0, 8, 8, 0, 0, 0, 64}, 1},
        {"2-visits", {1, 1, 0, 8, 16, 0, 0, 0, 64}, 2},
        {"6-visits", {1, 1, 0, 8, 16, 4 * 64, 0, 0, 64}, 6},    // fill the ring
        {"7-visits", {1, 1, 0, 8, 16, 5 * 64, 0, 0, 64}, 7},    // wrap around once
        {"13-visits", {1, 1, 0, 8, 16, 11 * 64, 0, 0, 64}, 13}, // and twice
        {"unseen-runs", {1, 1, 7, 8, 64, 0, 3, 0, 64}, 9},
        {"odd-tiles", {1, 1, 0, 8, 24, 0, 0, 0, 64}, 3},
        {"text-padding", {1, 1, 70, 8, 16, 0, 0, 41, 64}, 4},
        {"batch-2", {2, 2, 7, 8, 16, 0, 3, 2, 64}, 3},
    };
    return cases;
}

inline int most_visits(const VisitLists& lists) {
    int most = 0;
    for (const attention::Pair& pair : PairLists(lists).pairs) most = std::max(most, pair.end - pair.begin);
    return most;
}

// Each line is begun before its kernels start, so that the last one says what hangs.
template <class T, int D>
void check_tiny(const TinyCase& tiny, Forwards forwards) {
    if (forwards == Forwards::Paired && !supports_paired_forward()) return;
    const char* kernels = forwards == Forwards::Paired ? "forward_sm90a" : "forward";
    std::printf("%s, %s, %s, head_dim %d: ", tiny.name, kernels, name_of(T()), D);
    std::fflush(stdout);
    Sequence sequence(tiny.shape);
    VisitLists lists(sequence, VisitLists::Rows::Queries), reverse(sequence, VisitLists::Rows::Keys);
    expect(most_visits(lists) == tiny.visits, std::string(tiny.name) + ": another number of visits");
    Accuracy accuracy[4];
    int before = failures;
    check_case<T, D>(sequence, lists, reverse, accuracy, forwards);
    std::printf("%s, out error %.2e, plain %.2e\n", failures == before ? "right" : "WRONG", accuracy[0].kernel,
                accuracy[0].plain);
}

// Whether there is a case of this name; all of them are `all`.
inline bool check_tiny(const std::string& name) {
    bool found = false;
    device();
    for (const TinyCase& tiny : tiny_cases()) {
        if (name != tiny.name && name != "all") continue;
        found = true;
        for (Forwards forwards : {Forwards::Plain, Forwards::Paired}) {
            check_tiny<Bf16, 64>(tiny, forwards);
            check_tiny<Bf16, 128>(tiny, forwards);
            check_tiny<F16, 64>(tiny, forwards);
            check_tiny<F16, 128>(tiny, forwards);
        }
    }
    return found;
}

// Runs one larger call `count` times, whose results must have equal bits: what depends on timing differs sooner or
// later.
inline void check_repeated(int count) {
    Sequence sequence({1, 2, 70, 40, 40, 0, 8, 0, 64});
    VisitLists lists(sequence, VisitLists::Rows::Queries), reverse(sequence, VisitLists::Rows::Keys);
    AttentionInputs<Bf16, 128> inputs(sequence);
    bool paired = supports_paired_forward();
    AttentionRun<Bf16, 128> first(sequence, inputs.tensors, lists, reverse, paired);
    for (int i = 1; i < count; i++) {
        set_schedule(i % 2 ? Schedule::Opposite : Schedule::Default);
        AttentionRun<Bf16, 128> again(sequence, inputs.tensors, lists, reverse, paired);
        expect(again == first, "run " + std::to_string(i + 1) + " of " + sequence.shape.name() + " has other bits");
    }
    std::printf("%s: %d runs with equal bits\n", sequence.shape.name().c_str(), count);
}
