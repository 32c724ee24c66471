// Every kernel on the emulated device against its plain reference in double precision. Exit status 1 if one fails.
#include "attention.h"

static std::vector<Case> cases() {
    std::vector<Case> out;
    for (auto [height, width] : {std::pair(5, 8), {13, 7}, {1, 40}, {16, 16}})
        for (int text : {0, 7, 70})
            for (double radius : {0., 1.5, 3., 8., 50.})
                out.push_back({1 + (text == 7), 1 + (radius == 3), text, height, width, radius == 8 ? 6 : 0, radius,
                               text && radius != 3 ? text / 2 + 3 : 0, radius == 3 ? 1 : radius == 8 ? 3 : 64});
    return out;
}

int main() {
    std::vector<Case> all = cases(), few;
    for (size_t i = 0; i < all.size(); i += 4) few.push_back(all[i]);
    check_attention<Bf16, 64>("bf16", all);
    check_attention<F16, 64>("f16", few);
    check_attention<Bf16, 128>("bf16", few);
    check_attention<F16, 128>("f16", few);
    std::printf(failures ? "%d checks failed\n" : "all held\n", failures);
    return failures > 0;
}
