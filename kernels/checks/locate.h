// Where the wrong values of an attention result lie, which tells what is wrong with a kernel for compute capability
// 9.0.
#pragma once
#include "measure.h"
#include "sequence.h"

struct HeadShape {
    int heads, head_dim;
};

// Counts of wrong values by their place in a tile.
struct WrongPlaces {
    static constexpr int ROWS = 8, BLOCK = 64, CHUNK = 8; // a chunk is 16 bytes, 8 numbers
    std::vector<size_t> tiles, blocks, groups, chunks;
    size_t total = 0;

    WrongPlaces(size_t tile_count, int head_dim)
        : tiles(tile_count), blocks(head_dim / BLOCK), groups(64 / ROWS), chunks(BLOCK / CHUNK) {}

    void add(size_t tile, int row, int column) {
        total++;
        tiles[tile]++;
        groups[row / ROWS]++;
        blocks[column / BLOCK]++;
        chunks[column % BLOCK / CHUNK]++;
    }
};

inline void print_counts(const char* what, const std::vector<size_t>& counts) {
    std::fprintf(stderr, "  %s:", what);
    for (size_t i = 0; i < std::min<size_t>(counts.size(), 16); i++) std::fprintf(stderr, " %zu", counts[i]);
    std::fprintf(stderr, counts.size() > 16 ? " ...\n" : "\n");
}

// Prints how many values are wrong by place. A value is wrong if its error is above four times the largest one of the
// rough reference. Tensors are (batch, tokens, heads, head_dim).
inline void print_wrong_places(const Values& got, const Values& exact, const Values& rough,
                               const std::vector<Span>& tiles, HeadShape shape) {
    double usual = 0;
    for (size_t i = 0; i < exact.size(); i++) usual = std::max(usual, std::abs(rough[i] - exact[i]));
    size_t per_token = (size_t)shape.heads * shape.head_dim, tokens = tiles.back().first + tiles.back().count;
    WrongPlaces wrong(tiles.size(), shape.head_dim);
    for (size_t first = 0; first < got.size(); first += tokens * per_token)
        for (size_t tile = 0; tile < tiles.size(); tile++)
            for (size_t i = 0; i < tiles[tile].count * per_token; i++) {
                size_t at = first + tiles[tile].first * per_token + i;
                if (std::abs(got[at] - exact[at]) <= 4 * usual) continue; // NaN is wrong
                wrong.add(tile, (int)(i / per_token), (int)(i % shape.head_dim));
            }
    std::fprintf(stderr, "  %zu of %zu values are wrong, counted by place:\n", wrong.total, got.size());
    print_counts("tiles of 64 rows", wrong.tiles);
    print_counts("blocks of 64 columns", wrong.blocks);
    print_counts("groups of 8 rows", wrong.groups);
    print_counts("chunks of 16 bytes", wrong.chunks);
    std::fprintf(stderr, "  an error by 64-column block means the leading byte offset, by 8-row group the stride, by "
                         "16-byte chunk the swizzle\n");
}
