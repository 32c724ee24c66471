// Decompresses what zlib compressed (RFC 1950 and 1951), so that pictures can be compared without any library.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

class Inflater {
    // A canonical Huffman code: number of codes of each length, and the symbols in the order of their codes.
    struct Code {
        std::array<int, 16> counts{};
        std::vector<int> symbols;

        explicit Code(const std::vector<int>& lengths) {
            for (int length = 1; length < 16; length++)
                for (size_t symbol = 0; symbol < lengths.size(); symbol++)
                    if (lengths[symbol] == length) {
                        counts[length]++;
                        symbols.push_back((int)symbol);
                    }
        }
    };

    const std::vector<uint8_t>& in;
    size_t at = 2; // behind the header of zlib
    int bit = 0;
    std::vector<uint8_t> out;

    int bits(int count) {
        int value = 0;
        for (int i = 0; i < count; i++) {
            value |= (in.at(at) >> bit & 1) << i;
            if (++bit == 8) bit = 0, at++;
        }
        return value;
    }
    int symbol(const Code& code) {
        int value = 0, first = 0, index = 0;
        for (int length = 1; length < 16; length++) {
            value |= bits(1);
            int count = code.counts[length];
            if (value - count < first) return code.symbols.at(index + value - first);
            index += count;
            first = (first + count) << 1;
            value <<= 1;
        }
        throw std::runtime_error("not a Huffman code");
    }
    void copy_stored() {
        if (bit) bit = 0, at++;
        size_t length = in.at(at) | in.at(at + 1) << 8;
        for (at += 4; length > 0; length--) out.push_back(in.at(at++));
    }
    static std::array<Code, 2> fixed_codes() {
        std::vector<int> lengths(288, 8);
        std::fill(lengths.begin() + 144, lengths.begin() + 256, 9);
        std::fill(lengths.begin() + 256, lengths.begin() + 280, 7);
        return {Code(lengths), Code(std::vector<int>(30, 5))};
    }
    std::array<Code, 2> dynamic_codes() {
        static constexpr int ORDER[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
        size_t literals = bits(5) + 257, distances = bits(5) + 1;
        std::vector<int> short_lengths(19), lengths;
        for (int i = 0, count = bits(4) + 4; i < count; i++) short_lengths[ORDER[i]] = bits(3);
        Code code(short_lengths);
        while (lengths.size() < literals + distances) {
            int length = symbol(code);
            if (length < 16)
                lengths.push_back(length);
            else if (length == 16)
                lengths.insert(lengths.end(), 3 + bits(2), int(lengths.at(lengths.size() - 1)));
            else
                lengths.insert(lengths.end(), length == 17 ? 3 + bits(3) : 11 + bits(7), 0);
        }
        auto middle = lengths.begin() + (long)literals;
        return {Code({lengths.begin(), middle}), Code({middle, lengths.end()})};
    }
    void copy_block(const std::array<Code, 2>& codes) {
        for (int found; (found = symbol(codes[0])) != 256;) {
            if (found < 256) {
                out.push_back((uint8_t)found);
                continue;
            }
            int length = extended(found - 257, 4, 28, 3, 258), distance = extended(symbol(codes[1]), 2, 30, 1, 0);
            if ((size_t)distance > out.size()) throw std::runtime_error("a distance before the start");
            for (int i = 0; i < length; i++) out.push_back(out[out.size() - distance]);
        }
    }
    // Lengths and distances grow alike: `per_bit` symbols for each number of further bits. The last length is an
    // exception.
    int extended(int symbol, int per_bit, int end, int base, int last) {
        if (last && symbol == end) return last;
        int further = std::max(0, symbol / per_bit - 1), value = base;
        for (int i = 0; i < symbol; i++) value += 1 << std::max(0, i / per_bit - 1);
        return value + bits(further);
    }

  public:
    explicit Inflater(const std::vector<uint8_t>& in) : in(in) {}

    std::vector<uint8_t> inflate() {
        for (bool last = false; !last;) {
            last = bits(1);
            int kind = bits(2);
            if (kind == 0)
                copy_stored();
            else
                copy_block(kind == 1 ? fixed_codes() : dynamic_codes());
        }
        return std::move(out);
    }
};
