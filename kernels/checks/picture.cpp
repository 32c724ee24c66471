// Compares two pictures, PNG files of 8 bits per channel: `picture A B LEAST` prints the PSNR in dB and fails below
// LEAST.
#include "inflate.h"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

struct Picture {
    int width = 0, height = 0, channels = 0;
    std::vector<uint8_t> bytes;

    explicit Picture(const std::string& path) {
        std::ifstream from(path, std::ios::binary);
        std::vector<uint8_t> file((std::istreambuf_iterator<char>(from)), {}), packed;
        auto number = [&](size_t at) {
            return file.at(at) << 24 | file.at(at + 1) << 16 | file.at(at + 2) << 8 | file.at(at + 3);
        };
        if (file.size() < 33) throw std::runtime_error(path + ": not a PNG");
        width = number(16), height = number(20);
        channels = file[25] == 2 ? 3 : file[25] == 6 ? 4 : file[25] == 0 ? 1 : 0;
        if (file[24] != 8 || file[28] != 0 || channels == 0) throw std::runtime_error(path + ": an unusual PNG");
        for (size_t at = 8; at + 8 <= file.size(); at += 12 + number(at)) {
            if (std::memcmp(&file[at + 4], "IDAT", 4) != 0) continue;
            packed.insert(packed.end(), file.begin() + at + 8, file.begin() + at + 8 + number(at));
        }
        restore(Inflater(packed).inflate());
    }

  private:
    // Undoes the filter of each row.
    void restore(const std::vector<uint8_t>& rows) {
        size_t stride = (size_t)width * channels;
        bytes.resize(stride * height);
        for (int y = 0; y < height; y++)
            for (size_t i = 0; i < stride; i++) {
                size_t at = y * stride + i, before = channels;
                int left = i < before ? 0 : bytes[at - before], up = y == 0 ? 0 : bytes[at - stride];
                int corner = i < before || y == 0 ? 0 : bytes[at - stride - before];
                int guess = predicted(rows.at(y * (stride + 1)), left, up, corner);
                bytes[at] = (uint8_t)(rows.at(y * (stride + 1) + 1 + i) + guess);
            }
    }
    static int predicted(int filter, int left, int up, int corner) {
        if (filter == 0) return 0;
        if (filter == 1) return left;
        if (filter == 2) return up;
        if (filter == 3) return (left + up) / 2;
        int by_left = std::abs(up - corner), by_up = std::abs(left - corner);
        int by_corner = std::abs(left + up - 2 * corner);
        return by_left <= by_up && by_left <= by_corner ? left : by_up <= by_corner ? up : corner;
    }
};

static int compare(const Picture& a, const Picture& b, double least) {
    if (a.width != b.width || a.height != b.height || a.channels != b.channels) {
        std::fprintf(stderr, "the pictures have different sizes\n");
        return 1;
    }
    double squares = 0;
    int largest = 0;
    for (size_t i = 0; i < a.bytes.size(); i++) {
        int difference = std::abs(a.bytes[i] - b.bytes[i]);
        squares += difference * difference;
        largest = std::max(largest, difference);
    }
    double psnr = -10 * std::log10(squares / a.bytes.size() / (255. * 255));
    std::printf("%d x %d px: PSNR %.1f dB, largest difference %d of 255, at least %g dB needed\n", a.width, a.height,
                psnr, largest, least);
    return !(psnr >= least);
}

int main(int count, char** arguments) {
    if (count != 4) {
        std::fprintf(stderr, "usage: picture A B LEAST\n");
        return 2;
    }
    try {
        return compare(Picture(arguments[1]), Picture(arguments[2]), std::atof(arguments[3]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
