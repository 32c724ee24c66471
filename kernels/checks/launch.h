// What the checks need to launch a kernel: names of entry points, and memory that host and device share.
#pragma once
#include "device.h"
#include "host_prelude.h"
#include <string>
#include <vector>

template <class V>
using DeviceVector = std::vector<V, HostMappedAllocator<V>>;

inline const char* name_of(Bf16) { return "bf16"; }
inline const char* name_of(F16) { return "f16"; }
inline const char* name_of(F32) { return "f32"; }

// The entry point of a kernel for a number format and, where it matters, a head dimension.
template <class T>
std::string entry(const char* kernel, T type) {
    return std::string(kernel) + "_" + name_of(type);
}
template <class T>
std::string entry(const char* kernel, T type, int head_dim) {
    return entry(kernel, type) + "_" + std::to_string(head_dim);
}
