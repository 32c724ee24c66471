// Checks every kernel on the device against a reference in f64. Exits with 1 if a check fails, and with 77 if it was skipped
// for lack of memory.
//
//     check others | narrow     half of all checks each, so that two processes can share the work
//     check tiny list           names of the smallest calls of attention
//     check tiny CASE           one of them, in each number format and head dimension; all of them if CASE is `all`
//     check repeat [COUNT]      one larger call, whose runs, 20 of them, must have equal bits
//     check large               calls with offsets above 2^31
#include "large.h"
#include "rows.h"
#include "tiny.h"

static std::vector<Case> cases() {
    std::vector<Case> out;
    for (auto [height, width] : {std::pair(5, 8), {13, 7}, {1, 40}, {16, 16}})
        for (int text : {0, 7, 70})
            for (double radius : {0., 1.5, 3., 8., 50.}) {
                if (height == 16 && (text == 7 || radius == 1.5 || radius == 50)) continue;
                Case shape = {1, 1, text, height, width, 0, radius, 0, 64};
                if (text == 7 || height == 5) shape.batch = 2;
                if (radius == 3 && height < 16) shape.heads = 2;
                if (radius == 1.5) shape.longest = 1;
                if (radius == 8) shape.longest = 2, shape.pooled = 6;
                if (radius == 3 || radius == 50) shape.padding = text / 2 + text % 3;
                out.push_back(shape);
            }
    return out;
}

static void check_others() {
    std::vector<Case> all = cases(), few;
    for (size_t i = 0; i < all.size(); i += 7) few.push_back(all[i]);
    check_rows();
    check_committed_lists<Bf16, 64>();
    check_attention<F16, 64>(few);
    check_attention<Bf16, 128>(few);
    check_attention<F16, 128>(few);
}

static bool run(const std::string& what, const std::string& argument) {
    if (what == "others") return check_others(), true;
    if (what == "narrow") return check_attention<Bf16, 64>(cases()), true;
    if (what == "tiny") return check_tiny(argument);
    if (what == "repeat") return check_repeated(argument.empty() ? 20 : std::stoi(argument)), true;
    if (what == "large") {
        if (!check_large_offsets()) std::exit(77);
        return true;
    }
    return false;
}

int main(int count, char** arguments) {
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ); // also to a file: what was printed before a hang says where it is
    std::string what = count > 1 ? arguments[1] : "", argument = count > 2 ? arguments[2] : "";
    if (what == "tiny" && argument == "list") {
        for (const TinyCase& tiny : tiny_cases()) std::printf("%s\n", tiny.name);
        return 0;
    }
    if (!run(what, argument)) {
        std::fprintf(stderr, "usage: check others | narrow | tiny list|all|CASE | repeat [COUNT] | large\n");
        return 2;
    }
    std::printf(failures ? "%d checks failed\n" : "all passed\n", failures);
    return failures > 0;
}
