// The forward for compute capability 9.0: pairs of query tiles, and its launch.
#pragma once
#include "visit_lists.h"
#include <map>
#include <numeric>

inline bool supports_paired_forward() { return device().capability() == 90; }

// Makes pairs from lists, in the way of pairs.rs.
struct PairLists {
    DeviceVector<attention::Pair> pairs;
    DeviceVector<attention::Visit> visits;

    explicit PairLists(const VisitLists& lists) {
        std::vector<int> order(lists.work.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return lists.work[a].begin < lists.work[b].begin; });
        for (size_t i = 0; i < order.size(); i += 2) add(lists, order[i], i + 1 < order.size() ? order[i + 1] : -1);
    }

  private:
    void add(const VisitLists& lists, int first, int second) {
        attention::Pair pair = {{first, second}, (int)visits.size(), 0, {0, 0}};
        std::map<int, attention::Visit> by_column;
        for (int which : {0, 1}) {
            if (pair.works[which] < 0) continue;
            const attention::Work& work = lists.work[pair.works[which]];
            for (int i = work.begin; i < work.end; i++) {
                const attention::Entry& entry = lists.entries[i];
                attention::Visit visit = {entry.first, {attention::UNSEEN, attention::UNSEEN}};
                by_column.emplace(entry.first, visit).first->second.masks[which] = entry.mask;
            }
        }
        std::vector<attention::Visit> alone[2];
        for (const auto& [column, visit] : by_column)
            if (visit.masks[0] == attention::UNSEEN || visit.masks[1] == attention::UNSEEN)
                alone[visit.masks[0] == attention::UNSEEN].push_back(visit);
            else
                visits.push_back(visit);
        for (size_t i = 0; i < std::max(alone[0].size(), alone[1].size()); i++)
            for (const auto& side : alone)
                if (i < side.size()) visits.push_back(side[i]);
        pair.end = (int)visits.size();
        for (int which : {0, 1}) {
            int& end = pair.own[which];
            end = pair.end;
            while (end > pair.begin && visits[end - 1].masks[which] == attention::UNSEEN) end--;
        }
        pairs.push_back(pair);
    }
};

// Starts the forward over pairs in device memory, of which each block computes up to `pairs_per_block`.
template <class T, int D>
void start_paired(const attention::Forward& p, const attention::Pair* pairs, const attention::Visit* visits, int count,
                  int heads, int batch, int pairs_per_block, T type) {
    int format = std::is_same_v<T, F16> ? 6 : 9;
    typedef unsigned long long Size;
    std::array<Size, 4> sizes = {D, (Size)heads, (Size)p.keys, (Size)batch};
    attention::PairedForward paired = {{}, {}, p, pairs, visits, count};
    device().tensor_map(paired.key.words, format, p.key, sizes);
    device().tensor_map(paired.value.words, format, p.value, sizes);
    int blocks = (count + pairs_per_block - 1) / pairs_per_block, bytes = 6 * (2 * 64 * D * 2 + 2 * 8);
    device().start(entry("forward_sm90a", type, D), {blocks, heads, batch, 3 * 128, bytes}, paired);
}
