// The attention kernels against plain attention in double precision, over ragged grids and text. Its main function is
// `check_attention`.
#pragma once
#include "measure.h"
#include <algorithm>
#include <cstddef>
#include <fstream>

namespace attention {
#include "../clear_attention/common.cuh"

#include "../clear_attention/softmax.cuh"

#include "../clear_attention/pairs.cuh"

#include "../clear_attention/forward.cu"

#include "../clear_attention/backward.cu"
} // namespace attention

// Sizes that the launching side counts on.
static_assert(sizeof(attention::Work) == 20 && sizeof(attention::Entry) == 12 && sizeof(attention::Lists) == 40);
static_assert(sizeof(attention::Forward) == 112 && offsetof(attention::Forward, scale) == 108);
static_assert(sizeof(attention::Pair) == 24 && sizeof(attention::Visit) == 12);
static_assert(sizeof(attention::PairedForward) == 448 && offsetof(attention::PairedForward, count) == 384);
static_assert(sizeof(attention::Backward) == 160 && offsetof(attention::Backward, scale) == 156);

struct Case {
    int batch, heads, text, height, width, pooled;
    double radius; // none sees all: 0
    int hidden;    // text tokens that are padding in the first batch entry, half of it in the others
    int longest;   // entries of a part

    std::string name() const {
        char out[160];
        std::snprintf(out, sizeof out, "%dx%d tokens, r %g, text %d - %d, pooled %d, parts of %d", height, width, radius,
                      text, hidden, pooled, longest);
        return out;
    }
};

struct Span {
    int first, count;
};

// The truth about who sees whom, from the definition alone, and the tiles of the sequence [text, image, pooled].
struct Scene {
    Case of;
    int queries, keys;
    std::vector<Span> query_tiles, key_tiles;
    std::vector<int> rows, columns; // of image tokens, in the order of 8 x 8 patches

    explicit Scene(Case of) : of(of), queries(of.text + of.height * of.width), keys(queries + of.pooled) {
        chop(query_tiles, 0, of.text);
        for (int row = 0; row < of.height; row += 8)
            for (int column = 0; column < of.width; column += 8) add_patch(row, column);
        key_tiles = query_tiles;
        chop(key_tiles, queries, of.pooled);
    }
    int text_tiles() const { return (of.text + 63) / 64; }
    bool counts(int batch, int text) const { return text < of.text - (batch ? of.hidden / 2 : of.hidden); }
    bool near(int query, int key) const {
        if (query < of.text) return key < queries;
        if (key < of.text || key >= queries || of.radius == 0) return true;
        double dy = rows[query - of.text] - rows[key - of.text], dx = columns[query - of.text] - columns[key - of.text];
        return dx * dx + dy * dy < of.radius * of.radius;
    }
    // Patches between which no token can be near: a shortcut for large grids.
    bool apart(Span a, Span b) const {
        if (std::min(a.first, b.first) < of.text || std::max(a.first, b.first) >= queries || of.radius == 0) return false;
        int i = a.first - of.text, j = b.first - of.text;
        return std::max(std::abs(rows[i] - rows[j]), std::abs(columns[i] - columns[j])) > of.radius + 8;
    }
    bool sees(int batch, int query, int key) const { return near(query, key) && (key >= of.text || counts(batch, key)); }

  private:
    static void chop(std::vector<Span>& to, int first, int count) {
        for (int i = 0; i < count; i += 64) to.push_back({first + i, std::min(64, count - i)});
    }
    void add_patch(int row, int column) {
        int height = std::min(8, of.height - row), width = std::min(8, of.width - column);
        query_tiles.push_back({of.text + (int)rows.size(), height * width});
        for (int i = 0; i < height * width; i++) {
            rows.push_back(row + i / width);
            columns.push_back(column + i % width);
        }
    }
};

// What the kernels read, from the truth pair by pair.
struct Built {
    Table<attention::Work> work, joins;
    Table<attention::Entry> entries;
    Table<u32> masks, padding;
    int slots = 0, text_tiles;

    enum class Rows { Queries, Keys };

    Built(const Scene& scene, Rows rows) : text_tiles(scene.text_tiles()) {
        const auto &down = rows == Rows::Queries ? scene.query_tiles : scene.key_tiles,
                   &across = rows == Rows::Queries ? scene.key_tiles : scene.query_tiles;
        auto near = [&](int row, int column) {
            return rows == Rows::Queries ? scene.near(row, column) : scene.near(column, row);
        };
        for (Span row : down) {
            int begin = (int)entries.size();
            for (Span column : across) {
                if (scene.apart(row, column)) continue;
                int text = rows == Rows::Queries ? column.first : row.first;
                add_entry(row, column, near, scene.of.hidden > 0 && text < scene.of.text ? text / 64 : -1);
            }
            add_work(row, begin, (int)entries.size(), scene.of.longest);
        }
        for (int batch = 0; batch < scene.of.batch; batch++)
            for (int tile = 0; tile < text_tiles; tile++) {
                auto counts = [&](int row, int column) {
                    int text = tile * 64 + (rows == Rows::Queries ? column : row);
                    return text < scene.of.text && scene.counts(batch, text);
                };
                add_mask(padding, counts);
            }
    }

    // As Lists of lists.rs prints itself.
    Built(std::istream& from, int text_tiles) : text_tiles(text_tiles) {
        size_t count;
        from >> slots >> count;
        read_work(work, from, count);
        from >> count;
        read_work(joins, from, count);
        from >> count;
        for (entries.resize(count); attention::Entry & entry : entries) from >> entry.first >> entry.count >> entry.mask;
        from >> count;
        for (masks.resize(count); u32& word : masks) from >> word;
        expect(!from.fail() && masks.size() % 128 == 0, "lists.txt");
    }

    attention::Lists lists(const Table<attention::Work>& of) const {
        return {of.data(), entries.data(), masks.data(), padding.data(), text_tiles};
    }

  private:
    static void read_work(Table<attention::Work>& to, std::istream& from, size_t count) {
        for (to.resize(count); attention::Work & work : to)
            from >> work.first >> work.count >> work.begin >> work.end >> work.slot;
    }

    template <class Seen>
    static void add_mask(Table<u32>& to, Seen seen) {
        for (int thread = 0; thread < 128; thread++) {
            u32 bits = 0;
            for (int bit = 0; bit < 32; bit++) {
                int row = thread / 32 * 16 + thread % 32 / 4 + bit % 4 / 2 * 8, column = bit / 4 * 8 + thread % 4 * 2 + bit % 2;
                bits |= (u32)seen(row, column) << bit;
            }
            to.push_back(bits);
        }
    }

    template <class Near>
    void add_entry(Span row, Span column, Near near, int text_tile) {
        auto seen = [&](int r, int c) { return r < row.count && c < column.count && near(row.first + r, column.first + c); };
        int pairs = 0;
        for (int i = 0; i < 64 * 64; i++) pairs += seen(i / 64, i % 64);
        if (pairs == 0) return;
        int mask = pairs == row.count * 64 ? attention::WHOLE : (int)masks.size() / 128;
        if (text_tile >= 0)
            mask = -2 - text_tile;
        else if (mask != attention::WHOLE)
            add_mask(masks, seen);
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

#ifdef ON_GPU
#include "../on_gpu/paired.h"
#else
// The instructions of compute capability 9.0 are not emulated: simulator/ runs them.
inline bool runs_pairs() { return false; }
#endif

// Attention by its definition. With `round`, as the plain operation leaves each step in the type.
struct Plain {
    Numbers out, lse, query, key, value;

    template <class Round>
    Plain(const Scene& scene, int D, const Numbers (&in)[4], Round round) {
        const Case& of = scene.of;
        out = query = Numbers(in[0].size());
        key = value = Numbers(in[1].size());
        lse = Numbers((size_t)of.batch * of.heads * scene.queries);
        for (int batch = 0; batch < of.batch; batch++)
            for (int head = 0; head < of.heads; head++)
                for (int i = 0; i < scene.queries; i++) visit(scene, D, in, round, batch, head, i);
        for (Numbers* result : {&query, &key, &value})
            for (double& x : *result) x = round(x);
    }

  private:
    template <class Round>
    void visit(const Scene& scene, int D, const Numbers (&in)[4], Round round, int batch, int head, int row) {
        auto at = [&](int tokens, int token) { return (((size_t)batch * tokens + token) * scene.of.heads + head) * D; };
        auto dot = [&](const double* a, const double* b) {
            double sum = 0;
            for (int i = 0; i < D; i++) sum += a[i] * b[i];
            return round(sum);
        };
        size_t q = at(scene.queries, row);
        std::vector<size_t> seen;
        Numbers share, slope;
        double top = -INFINITY, total = 0, delta = 0, scale = 1 / std::sqrt((double)D);
        for (int token = 0; token < scene.keys; token++)
            if (scene.sees(batch, row, token)) seen.push_back(at(scene.keys, token));
        for (size_t k : seen) {
            share.push_back(round(scale * dot(&in[0][q], &in[1][k])));
            top = std::max(top, share.back());
        }
        for (double& x : share) total += x = round(std::exp(round(x - top)));
        total = round(total);
        lse[((size_t)batch * scene.of.heads + head) * scene.queries + row] = top + std::log(total);
        for (size_t j = 0; j < seen.size(); j++) {
            share[j] = round(share[j] / total);
            for (int i = 0; i < D; i++) out[q + i] += share[j] * in[2][seen[j] + i];
            slope.push_back(dot(&in[3][q], &in[2][seen[j]]));
            delta += round(share[j] * slope[j]);
        }
        for (int i = 0; i < D; i++) out[q + i] = round(out[q + i]);
        for (size_t j = 0; j < seen.size(); j++) {
            double change = round(scale * round(share[j] * round(slope[j] - round(delta))));
            for (int i = 0; i < D; i++) {
                query[q + i] += change * in[1][seen[j] + i];
                key[seen[j] + i] += change * in[0][q + i];
                value[seen[j] + i] += share[j] * in[3][q + i];
            }
        }
    }
};

// One forward and backward on the emulated device.
template <class T, int D>
struct Run {
    Buffer<u16> out, query, key, value;
    Buffer<float> lse, delta;

    Run(const Scene& scene, Buffer<u16> (&in)[4], const Built& forward, const Built& reverse, bool paired = false)
        : out(in[0].count), query(in[0].count), key(in[1].count), value(in[1].count), lse(in[0].count / D),
          delta(in[0].count / D) {
        run_forward(scene, in, forward, paired);
        attention::Backward p = {in[0].data(), in[1].data(), in[2].data(), out.data(), in[3].data(), lse.data(),
                                 delta.data(), query.data(), key.data(), value.data(), nullptr, nullptr, {},
                                 scene.of.batch, scene.of.heads, scene.queries, scene.keys, 0, 1 / std::sqrt((float)D)};
        launch(entry("delta", T(), D), {(int)(in[0].count / 8 + 127) / 128, 1, 1, 128, 0}, p, attention::delta<T, D>);
        run_queries(scene, p, forward);
        run_keys(scene, p, reverse);
    }

    bool walled() {
        return out.walled() && query.walled() && key.walled() && value.walled() && lse.walled() && delta.walled();
    }
    bool operator==(Run& other) {
        return out == other.out && query == other.query && key == other.key && value == other.value && lse == other.lse;
    }

  private:
    static size_t parts(const Case& of, int slots) { return (size_t)of.batch * of.heads * slots * 64; }
    static Grid grid(const Case& of, size_t works, int bytes) { return {(int)works, of.heads, of.batch, 128, bytes}; }

    void run_forward(const Scene& scene, Buffer<u16> (&in)[4], const Built& built, bool paired) {
        const Case& of = scene.of;
        Buffer<float> sums(parts(of, built.slots) * D), logs(parts(of, built.slots));
        attention::Forward p = {in[0].data(), in[1].data(), in[2].data(), out.data(), lse.data(), sums.data(),
                                logs.data(), built.lists(built.work), scene.queries, scene.keys, built.slots,
                                attention::LOG2_E / std::sqrt((float)D)};
        if (paired)
            run_paired(p, of, built);
        else
            launch(entry("forward", T(), D), grid(of, built.work.size(), 4 * 64 * D * 2), p, attention::forward<T, D>);
        p.lists = built.lists(built.joins);
        launch(entry("merge", T(), D), grid(of, built.joins.size(), 0), p, attention::merge<T, D>);
        expect(sums.walled() && logs.walled(), "parts");
    }

    static void run_paired([[maybe_unused]] const attention::Forward& p, [[maybe_unused]] const Case& of,
                           [[maybe_unused]] const Built& built) {
#ifdef ON_GPU
        Pairs pairs(built);
        start_paired<T, D>(p, pairs.pairs.data(), pairs.visits.data(), (int)pairs.pairs.size(), of.heads, of.batch, 3, T());
        device().synchronize();
#endif
    }

    void run_queries(const Scene& scene, attention::Backward p, const Built& built) {
        Buffer<float> sums(parts(scene.of, built.slots) * D);
        p.parts = sums.data();
        p.lists = built.lists(built.work);
        p.slots = built.slots;
        launch(entry("query", T(), D), grid(scene.of, built.work.size(), 4 * 64 * D * 2), p, attention::query<T, D>);
        p.lists = built.lists(built.joins);
        launch(entry("sum_queries", T(), D), grid(scene.of, built.joins.size(), 0), p, attention::sum_queries<T, D>);
        expect(sums.walled(), "parts of query gradients");
    }

    void run_keys(const Scene& scene, attention::Backward p, const Built& built) {
        Buffer<float> sums(parts(scene.of, built.slots) * D), value_sums(sums.count);
        p.parts = sums.data();
        p.value_parts = value_sums.data();
        p.lists = built.lists(built.work);
        p.slots = built.slots;
        int bytes = 2 * 64 * D * 2 + 4 * 32 * D * 2 + 4 * 32 * 4;
        launch(entry("key", T(), D), grid(scene.of, built.work.size(), bytes), p, attention::key<T, D>);
        p.lists = built.lists(built.joins);
        launch(entry("sum_keys", T(), D), grid(scene.of, built.joins.size(), 0), p, attention::sum_keys<T, D>);
        expect(sums.walled() && value_sums.walled(), "parts of key gradients");
    }
};

template <class T, int D>
void compare(const std::string& name, Run<T, D>& got, const Plain& want, const Plain& rough, Accuracy (&accuracy)[4]) {
    accuracy[0].compare(name + ", out", Typed<T>::numbers(got.out), want.out, rough.out, D);
    accuracy[1].compare(name + ", query", Typed<T>::numbers(got.query), want.query, rough.query, D);
    accuracy[2].compare(name + ", key", Typed<T>::numbers(got.key), want.key, rough.key, D);
    accuracy[3].compare(name + ", value", Typed<T>::numbers(got.value), want.value, rough.value, D);
    for (size_t i = 0; i < got.lse.count; i++)
        if (!(std::abs(got.lse[i] - want.lse[i]) < 2e-5 * (1 + std::abs(want.lse[i])))) return expect(false, name + ": lse");
}

template <class T, int D>
void check_case(const Scene& scene, const Built& forward, const Built& reverse, Accuracy (&accuracy)[4]) {
    const Case& of = scene.of;
    std::mt19937 source(of.height * 1000 + of.width * 10 + of.text);
    size_t per_token = (size_t)of.batch * of.heads * D;
    Buffer<u16> in[4] = {Typed<T>::random(scene.queries * per_token, source, 2), Typed<T>::random(scene.keys * per_token, source),
                         Typed<T>::random(scene.keys * per_token, source), Typed<T>::random(scene.queries * per_token, source)};
    Numbers exact[4] = {Typed<T>::numbers(in[0]), Typed<T>::numbers(in[1]), Typed<T>::numbers(in[2]), Typed<T>::numbers(in[3])};
    Plain want(scene, D, exact, [](double x) { return x; }), rough(scene, D, exact, Typed<T>::round);
    std::string name = of.name() + ", D " + std::to_string(D);
    for (bool paired : {false, true}) {
        if (paired && !runs_pairs()) continue;
        machine.late_copies = machine.reversed = false;
        Run<T, D> got(scene, in, forward, reverse, paired);
        expect(got.walled(), name + ": written behind an end");
        machine.late_copies = machine.reversed = true;
        if (of.height == 13)
            expect(Run<T, D>(scene, in, forward, reverse, paired) == got, name + ": depends on the order of threads and copies");
        compare(name + (paired ? ", paired" : ""), got, want, rough, accuracy);
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
    for (const Case& of : cases) {
        Scene scene(of);
        Built forward(scene, Built::Rows::Queries), reverse(scene, Built::Rows::Keys);
        check_case<T, D>(scene, forward, reverse, accuracy);
    }
    report(name_of(T()), D, "cases", cases.size(), accuracy);
}

// Over the lists that Rust made, which a test there holds to this file.
template <class T, int D>
void check_committed_lists() {
    std::ifstream from("lists.txt");
    Accuracy accuracy[4];
    Case of = {1, 1, 0, 0, 0, 0, 0, 0, 0};
    size_t count = 0;
    for (int limit; from >> of.height >> of.width >> of.text >> of.pooled >> limit; count++) {
        of.radius = std::sqrt((double)limit);
        Scene scene(of);
        Built forward(from, scene.text_tiles()), reverse(from, scene.text_tiles());
        check_case<T, D>(scene, forward, reverse, accuracy);
    }
    expect(count == 3, "lists.txt: 3 scenes");
    report(name_of(T()), D, "committed lists", count, accuracy);
}
