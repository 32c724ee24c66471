// Where checks run a kernel: `launch` and memory that it can read. Here it is the emulation; with ON_GPU, a device.
#pragma once
#include "prelude.h"
#include <string>

#ifdef ON_GPU
#include "../on_gpu/device.h"

template <class Parameters, class Kernel>
void launch(const std::string& entry, Grid grid, const Parameters& p, Kernel) {
    device().launch(entry, grid, p);
}
template <class V>
using Visible = OnDevice<V>;
#else
template <class Parameters, class Kernel>
void launch(const std::string&, Grid grid, const Parameters& p, Kernel kernel) {
    machine.launch(grid, [&] { kernel(p); });
}
template <class V>
using Visible = std::allocator<V>;
#endif

template <class V>
using Table = std::vector<V, Visible<V>>;

inline const char* name_of(Bf16) { return "bf16"; }
inline const char* name_of(F16) { return "f16"; }
inline const char* name_of(F32) { return "f32"; }

// Name of an entry point for a type, and for a width of heads.
template <class T>
std::string entry(const char* kernel, T type) {
    return std::string(kernel) + "_" + name_of(type);
}
template <class T>
std::string entry(const char* kernel, T type, int head_dim) {
    return entry(kernel, type) + "_" + std::to_string(head_dim);
}
