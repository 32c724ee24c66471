// The forward for compute capability 9.0, on a device that has it: tiles of queries two by two, and the launch.
#pragma once
#include <map>
#include <numeric>

inline bool runs_pairs() { return device().capability() == 90; }

// As pairs.rs has them, from the lists.
struct Pairs {
    Table<attention::Pair> pairs;
    Table<attention::Visit> visits;

    explicit Pairs(const Built& built) {
        std::vector<int> order(built.work.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return built.work[a].begin < built.work[b].begin; });
        for (size_t i = 0; i < order.size(); i += 2) add(built, order[i], i + 1 < order.size() ? order[i + 1] : -1);
    }

  private:
    void add(const Built& built, int first, int second) {
        attention::Pair pair = {{first, second}, (int)visits.size(), 0, {0, 0}};
        std::map<int, attention::Visit> all;
        for (int which : {0, 1}) {
            if (pair.works[which] < 0) continue;
            const attention::Work& work = built.work[pair.works[which]];
            for (int i = work.begin; i < work.end; i++) {
                const attention::Entry& entry = built.entries[i];
                attention::Visit visit = {entry.first, {attention::UNSEEN, attention::UNSEEN}};
                all.emplace(entry.first, visit).first->second.masks[which] = entry.mask;
            }
        }
        std::vector<attention::Visit> alone[2];
        for (const auto& [column, visit] : all)
            if (visit.masks[0] == attention::UNSEEN || visit.masks[1] == attention::UNSEEN)
                alone[visit.masks[0] == attention::UNSEEN].push_back(visit);
            else
                visits.push_back(visit);
        for (size_t i = 0; i < std::max(alone[0].size(), alone[1].size()); i++)
            for (const auto& side : alone)
                if (i < side.size()) visits.push_back(side[i]);
        pair.end = (int)visits.size();
        for (int which : {0, 1}) {
            pair.own[which] = pair.end;
            while (pair.own[which] > pair.begin && visits[pair.own[which] - 1].masks[which] == attention::UNSEEN) pair.own[which]--;
        }
        pairs.push_back(pair);
    }
};

// Starts the forward over pairs where the device reads them; a block computes so many.
template <class T, int D>
void start_paired(const attention::Forward& p, const attention::Pair* pairs, const attention::Visit* visits, int count, int heads,
                  int batch, int of_block, T type) {
    int format = std::is_same_v<T, F16> ? 6 : 9;
    std::array<unsigned long long, 4> extents = {D, (unsigned long long)heads, (unsigned long long)p.keys, (unsigned long long)batch};
    attention::PairedForward paired = {{}, {}, p, pairs, visits, count};
    device().tensor_map(paired.key.words, format, p.key, extents);
    device().tensor_map(paired.value.words, format, p.value, extents);
    int bytes = 6 * (2 * 64 * D * 2 + 2 * 8);
    device().start(entry("forward_sm90a", type, D), {(count + of_block - 1) / of_block, heads, batch, 3 * 128, bytes}, paired);
}
