// The parameters of the attention kernels, as the kernel sources declare them, and the lists that they read.
#pragma once
#include "measure.h"
#include "sequence.h"
#include <cstddef>
#include <istream>

namespace attention {
#include "../clear_attention/common.cuh"

#include "../clear_attention/softmax.cuh"

#include "../clear_attention/pairs.cuh"

#include "../clear_attention/forward.cu"

#include "../clear_attention/backward.cu"
} // namespace attention

// The Rust code that launches these kernels assumes the same layout; tests.rs asserts it there.
static_assert(sizeof(attention::Work) == 20 && sizeof(attention::Entry) == 12 && sizeof(attention::Lists) == 40);
static_assert(sizeof(attention::Forward) == 112 && offsetof(attention::Forward, scale) == 108);
static_assert(sizeof(attention::Pair) == 24 && sizeof(attention::Visit) == 12);
static_assert(sizeof(attention::PairedForward) == 448 && offsetof(attention::PairedForward, count) == 384);
static_assert(sizeof(attention::Backward) == 160 && offsetof(attention::Backward, scale) == 156);

// The lists that kernels read, made from the definition pair by pair.
struct VisitLists {
    DeviceVector<attention::Work> work, joins;
    DeviceVector<attention::Entry> entries;
    DeviceVector<u32> masks, padding;
    int slots = 0, text_tiles;

    enum class Rows { Queries, Keys };

    VisitLists(const Sequence& sequence, Rows rows) : text_tiles(sequence.text_tiles()) {
        bool by_queries = rows == Rows::Queries;
        const auto& row_tiles = by_queries ? sequence.query_tiles : sequence.key_tiles;
        const auto& column_tiles = by_queries ? sequence.key_tiles : sequence.query_tiles;
        auto near = [&](int row, int column) {
            return by_queries ? sequence.near(row, column) : sequence.near(column, row);
        };
        for (Span row : row_tiles) {
            int begin = (int)entries.size();
            for (Span column : column_tiles) {
                if (sequence.are_apart(row, column)) continue;
                int text = by_queries ? column.first : row.first;
                add_entry(row, column, near, sequence.shape.padding > 0 && text < sequence.shape.text ? text / 64 : -1);
            }
            add_work(row, begin, (int)entries.size(), sequence.shape.longest);
        }
        for (int batch = 0; batch < sequence.shape.batch; batch++)
            for (int tile = 0; tile < text_tiles; tile++) {
                auto is_real = [&](int row, int column) {
                    int text = tile * 64 + (by_queries ? column : row);
                    return sequence.is_real_text(batch, text);
                };
                add_mask(padding, is_real);
            }
    }

    // As VisitLists of lists.rs is printed.
    VisitLists(std::istream& from, int text_tiles) : text_tiles(text_tiles) {
        size_t count;
        from >> slots >> count;
        read_work(work, from, count);
        from >> count;
        read_work(joins, from, count);
        from >> count;
        for (entries.resize(count); attention::Entry & entry : entries) from >> entry.first >> entry.count >> entry.mask;
        from >> count;
        for (masks.resize(count); u32& word : masks) from >> word;
        expect(!from.fail() && masks.size() % 128 == 0, "lists cannot be read");
    }

    attention::Lists lists(const DeviceVector<attention::Work>& items) const {
        return {items.data(), entries.data(), masks.data(), padding.data(), text_tiles};
    }

  private:
    static void read_work(DeviceVector<attention::Work>& to, std::istream& from, size_t count) {
        for (to.resize(count); attention::Work & work : to)
            from >> work.first >> work.count >> work.begin >> work.end >> work.slot;
    }

    template <class Sees>
    static void add_mask(DeviceVector<u32>& to, Sees sees) {
        for (int thread = 0; thread < 128; thread++) {
            u32 bits = 0;
            for (int bit = 0; bit < 32; bit++) {
                int row = thread / 32 * 16 + thread % 32 / 4 + bit % 4 / 2 * 8, column = bit / 4 * 8 + thread % 4 * 2 + bit % 2;
                bits |= (u32)sees(row, column) << bit;
            }
            to.push_back(bits);
        }
    }

    template <class Near>
    void add_entry(Span row, Span column, Near near, int text_tile) {
        auto sees = [&](int r, int c) { return r < row.count && c < column.count && near(row.first + r, column.first + c); };
        int pairs = 0;
        for (int i = 0; i < 64 * 64; i++) pairs += sees(i / 64, i % 64);
        if (pairs == 0) return;
        int mask = pairs == row.count * 64 ? attention::WHOLE : (int)masks.size() / 128;
        if (text_tile >= 0)
            mask = -2 - text_tile;
        else if (mask != attention::WHOLE)
            add_mask(masks, sees);
        entries.push_back({column.first, column.count, mask});
    }

    void add_work(Span row, int begin, int end, int longest) {
        int parts = (end - begin + longest - 1) / longest, first_slot = slots;
        for (int i = 0; i < parts; i++) {
            int from = begin + (end - begin) * i / parts, to = begin + (end - begin) * (i + 1) / parts;
            work.push_back({row.first, row.count, from, to, parts > 1 ? slots++ : -1});
        }
        if (parts > 1) joins.push_back({row.first, row.count, first_slot, slots, -1});
    }
};
