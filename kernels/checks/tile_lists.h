// The lists of the product, as the example tile_lists of clearform-attention writes them, and what must hold of any.
#pragma once
#include "paired.h"
#include <bit>
#include <fstream>
#include <set>

struct ListHeader {
    int height, width, text, pooled, limit; // limit 0: full attention

    explicit ListHeader(std::istream& from) { from >> height >> width >> text >> pooled >> limit; }
    int image() const { return height * width; }
    int queries() const { return text + image(); }
    std::string name() const {
        std::string window = limit ? "r = " + std::to_string((int)std::lround(std::sqrt(limit))) : "full";
        return std::to_string(height) + " x " + std::to_string(width) + ", " + window;
    }
    // Pairs of tokens that attend to each other.
    i64 pairs() const { return (i64)text * queries() + (i64)image() * (text + pooled) + near(); }

  private:
    i64 near() const {
        if (limit == 0) return (i64)image() * image();
        i64 sum = 0;
        for (i64 dy = 1 - height; dy < height; dy++)
            for (i64 dx = 1 - width; dx < width; dx++)
                if (dy * dy + dx * dx < limit) sum += (height - std::abs(dy)) * (width - std::abs(dx));
        return sum;
    }
};

struct TileLists {
    ListHeader header;
    VisitLists queries, keys;
    std::vector<attention::Pair> pairs;
    std::vector<attention::Visit> visits;

    explicit TileLists(std::istream& from)
        : header(from), queries(from, (header.text + 63) / 64), keys(from, (header.text + 63) / 64) {
        size_t count = 0;
        from >> count;
        for (pairs.resize(count); attention::Pair & pair : pairs)
            from >> pair.works[0] >> pair.works[1] >> pair.begin >> pair.end >> pair.own[0] >> pair.own[1];
        from >> count;
        for (visits.resize(count); attention::Visit & visit : visits)
            from >> visit.first >> visit.masks[0] >> visit.masks[1];
        expect(!from.fail(), "the file of lists ends early");
    }

    void check() const {
        check_tables(queries, header.queries(), header.queries() + header.pooled, "queries");
        check_tables(keys, header.queries() + header.pooled, header.queries(), "keys");
        std::multiset<int> works;
        bool complete = true;
        for (const attention::Pair& pair : pairs)
            for (int which : {0, 1}) {
                if (pair.works[which] < 0) continue;
                works.insert(pair.works[which]);
                complete &= check_side(pair, which);
            }
        expect(complete, named("a pair visits other tiles than its lists say"));
        for (int i = 0; i < (int)queries.work.size(); i++) complete &= works.count(i) == 1;
        expect(complete, named("the pairs do not have each work item once"));
    }

    // The same visits without masks: wrong results, but the cost of masks is the difference.
    void drop_masks() {
        for (VisitLists* lists : {&queries, &keys})
            for (attention::Entry& entry : lists->entries) entry.mask = attention::WHOLE;
        for (attention::Visit& visit : visits)
            for (int& mask : visit.masks)
                if (mask != attention::UNSEEN) mask = attention::WHOLE;
    }

  private:
    std::string named(const char* what) const { return header.name() + ": " + what; }

    // Rows, columns and masks exist, and masks let through as many pairs as the definition has.
    void check_tables(const VisitLists& lists, int rows, int columns, const char* by) const {
        int masks = (int)lists.masks.size() / 128;
        std::vector<i64> bits(masks);
        for (size_t i = 0; i < lists.masks.size(); i++) bits[i / 128] += std::popcount(lists.masks[i]);
        i64 pairs = 0;
        bool valid = true;
        for (const attention::Work& work : lists.work) {
            valid &= 0 <= work.first && work.first + work.count <= rows && work.slot < lists.slots;
            valid &= 0 <= work.begin && work.end <= (int)lists.entries.size();
            for (int i = work.begin; i < work.end && valid; i++) {
                const attention::Entry& entry = lists.entries[i];
                valid &= 0 <= entry.first && entry.first + entry.count <= columns;
                valid &= -1 <= entry.mask && entry.mask < masks;
                if (valid) pairs += entry.mask < 0 ? (i64)work.count * entry.count : bits[entry.mask];
            }
        }
        expect(valid, named("lists by ") + by + " leave the sequence or name a mask that does not exist");
        expect(pairs == header.pairs(), named("lists by ") + by + " have " + std::to_string(pairs) + " pairs, but " +
                                            std::to_string(header.pairs()) + " attend to each other");
    }

    // A side of a pair meets its work item's entries once each, and skips at most one visit in a row before its last.
    bool check_side(const attention::Pair& pair, int which) const {
        const attention::Work& work = queries.work.at(pair.works[which]);
        std::multiset<std::pair<int, int>> left;
        for (int i = work.begin; i < work.end; i++) left.insert({queries.entries.at(i).first, queries.entries[i].mask});
        int skipped = 0;
        for (int i = pair.begin; i < pair.own[which]; i++) {
            const attention::Visit& visit = visits.at(i);
            skipped = visit.masks[which] == attention::UNSEEN ? skipped + 1 : 0;
            auto found = left.find({visit.first, visit.masks[which]});
            if (skipped > 1 || (skipped == 0 && found == left.end())) return false;
            if (skipped == 0) left.erase(found);
        }
        return left.empty();
    }
};
