// Checks every kernel on the device against a reference in f64. Exits with 1 if a check fails.
#include "attention.h"
#include "rows.h"

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

// The argument chooses half of the checks, so that two processes can share the work.
int main(int, char** arguments) {
    std::vector<Case> all = cases(), few;
    for (size_t i = 0; i < all.size(); i += 7) few.push_back(all[i]);
    if (std::string(arguments[1]) == "narrow") {
        check_attention<Bf16, 64>(all);
    } else {
        check_rows();
        check_committed_lists<Bf16, 64>();
        check_attention<F16, 64>(few);
        check_attention<Bf16, 128>(few);
        check_attention<F16, 128>(few);
    }
    std::printf(failures ? "%d checks failed\n" : "all passed\n", failures);
    return failures > 0;
}
