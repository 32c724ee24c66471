// Every kernel on the emulated device against its plain reference in double precision. Exit status 1 if one fails.
#include "attention.h"
#include "rows.h"

static std::vector<Case> cases() {
    std::vector<Case> out;
    for (auto [height, width] : {std::pair(5, 8), {13, 7}, {1, 40}, {16, 16}})
        for (int text : {0, 7, 70})
            for (double radius : {0., 1.5, 3., 8., 50.}) {
                if (height == 16 && (text == 7 || radius == 1.5 || radius == 50)) continue;
                Case of = {1, 1, text, height, width, 0, radius, 0, 64};
                if (text == 7 || height == 5) of.batch = 2;
                if (radius == 3 && height < 16) of.heads = 2;
                if (radius == 1.5) of.longest = 1;
                if (radius == 8) of.longest = 2, of.pooled = 6;
                if (radius == 3 || radius == 50) of.hidden = text / 2 + text % 3;
                out.push_back(of);
            }
    return out;
}

// The argument is the half to check: two processes then take half the time.
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
    std::printf(failures ? "%d checks failed\n" : "all held\n", failures);
    return failures > 0;
}
