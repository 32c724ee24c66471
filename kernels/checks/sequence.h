// Which tokens attend to each other, by definition, in a sequence of text, image and pooled tokens.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

struct Case {
    int batch, heads, text, height, width, pooled;
    double radius; // 0 for full attention
    int padding;   // padding tokens of the text in the first batch entry; half as many in the others
    int longest;   // the most entries that a block visits before a list is split

    std::string name() const {
        char out[160];
        std::snprintf(out, sizeof out, "%dx%d tokens, r %g, text %d - %d, pooled %d, parts of %d", height, width, radius,
                      text, padding, pooled, longest);
        return out;
    }
};

struct Span {
    int first, count;
};

// Which pairs of tokens attend to each other, by definition, and the tiles of the sequence [text, image, pooled].
struct Sequence {
    Case shape;
    int queries, keys;
    std::vector<Span> query_tiles, key_tiles;
    std::vector<int> rows, columns; // of image tokens, in the order of 8 x 8 patches

    explicit Sequence(Case shape)
        : shape(shape), queries(shape.text + shape.height * shape.width), keys(queries + shape.pooled) {
        add_tiles(query_tiles, 0, shape.text);
        for (int row = 0; row < shape.height; row += 8)
            for (int column = 0; column < shape.width; column += 8) add_patch(row, column);
        key_tiles = query_tiles;
        add_tiles(key_tiles, queries, shape.pooled);
    }
    int text_tiles() const { return (shape.text + 63) / 64; }
    bool is_real_text(int batch, int text) const { return text < shape.text - (batch ? shape.padding / 2 : shape.padding); }
    bool near(int query, int key) const {
        if (query < shape.text) return key < queries;
        if (key < shape.text || key >= queries || shape.radius == 0) return true;
        int i = query - shape.text, j = key - shape.text;
        double dy = rows[i] - rows[j], dx = columns[i] - columns[j];
        return dx * dx + dy * dy < shape.radius * shape.radius;
    }
    // Whether two patches are too far apart for any pair of tokens: a shortcut for large grids.
    bool are_apart(Span a, Span b) const {
        bool are_patches = std::min(a.first, b.first) >= shape.text && std::max(a.first, b.first) < queries;
        if (!are_patches || shape.radius == 0) return false;
        int i = a.first - shape.text, j = b.first - shape.text;
        return std::max(std::abs(rows[i] - rows[j]), std::abs(columns[i] - columns[j])) > shape.radius + 8;
    }
    bool sees(int batch, int query, int key) const {
        return near(query, key) && (key >= shape.text || is_real_text(batch, key));
    }

  private:
    static void add_tiles(std::vector<Span>& to, int first, int count) {
        for (int i = 0; i < count; i += 64) to.push_back({first + i, std::min(64, count - i)});
    }
    void add_patch(int row, int column) {
        int height = std::min(8, shape.height - row), width = std::min(8, shape.width - column);
        query_tiles.push_back({shape.text + (int)rows.size(), height * width});
        for (int i = 0; i < height * width; i++) {
            rows.push_back(row + i / width);
            columns.push_back(column + i % width);
        }
    }
};
