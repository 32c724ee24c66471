// The first CUDA device by the driver's own library, which is opened at run time: no toolkit is needed. Knows no kernel.
#pragma once
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

class Device {
  public:
    Device() {
        library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) fail("libcuda.so.1 cannot be opened: is there a driver?");
        call("cuInit", 0u);
        int number;
        call("cuDeviceGet", &number, 0);
        char name[128];
        call("cuDeviceGetName", name, (int)sizeof name, number);
        int major, minor;
        call("cuDeviceGetAttribute", &major, 75, number);
        call("cuDeviceGetAttribute", &minor, 76, number);
        of_device = 10 * major + minor;
        std::printf("device: %s, compute capability %d.%d\n", name, major, minor);
        void* context;
        call("cuDevicePrimaryCtxRetain", &context, number);
        call("cuCtxSetCurrent", context);
        for (const char* file : {"add_bias/kernel", "clear_attention/forward", "clear_attention/backward", "gated_add/kernel", "gelu/kernel",
                                 "modulated_layer_norm/kernel", "permute/kernel", "rms_norm_rope/kernel"})
            load(file);
        if (of_device == 90) load("clear_attention/forward_sm90a");
    }

    // Compute capability, major · 10 + minor.
    int capability() const { return of_device; }

    template <class Parameters>
    void launch(const std::string& entry, Grid grid, const Parameters& p) {
        start(entry, grid, p);
        synchronize();
    }
    void synchronize() { call("cuCtxSynchronize"); }

    template <class Parameters>
    void start(const std::string& entry, Grid grid, const Parameters& p) {
        if (grid.x == 0) return;
        void *function = find(entry), *arguments[] = {(void*)&p}, *none = nullptr;
        call("cuFuncSetAttribute", function, 8, grid.shared_bytes); // most dynamic shared memory
        call("cuLaunchKernel", function, (unsigned)grid.x, (unsigned)grid.y, (unsigned)grid.z, (unsigned)grid.threads, 1u, 1u,
             (unsigned)grid.shared_bytes, none, (void**)arguments, (void**)none);
    }

    // How the device finds boxes of 64 tokens and 64 numbers of one head in a tensor of such extents, innermost first.
    void tensor_map(unsigned long long* map, int format, const void* memory, std::array<unsigned long long, 4> extents) {
        unsigned long long row = extents[0] * 2, strides[] = {row, row * extents[1], row * extents[1] * extents[2]};
        unsigned box[] = {64, 1, 64, 1}, steps[] = {1, 1, 1, 1};
        constexpr int SWIZZLE_128 = 3, PROMOTE_256 = 3;
        call("cuTensorMapEncodeTiled", map, format, 4u, (void*)memory, extents.data(), strides, box, steps, 0, SWIZZLE_128,
             PROMOTE_256, 0);
    }

    // Memory of the host that the device reads and writes at the same address.
    void* host_memory(size_t bytes) {
        void* memory;
        call("cuMemHostAlloc", &memory, bytes, 3u); // portable, mapped
        return memory;
    }
    void free_host(void* memory) { call("cuMemFreeHost", memory); }

    // Memory of the device, filled from `from` if there is one.
    template <class V>
    V* memory(const V* from, size_t count) {
        unsigned long long memory;
        call("cuMemAlloc_v2", &memory, count * sizeof(V) + 16);
        if (from) fill((V*)memory, from, count);
        return (V*)memory;
    }
    template <class V>
    void fill(V* to, const V* from, size_t count) {
        if (count) call("cuMemcpyHtoD_v2", (unsigned long long)to, (const void*)from, count * sizeof(V));
    }
    void free(void* memory) { call("cuMemFree_v2", (unsigned long long)memory); }

    // Milliseconds that `work` takes, the median of `repeat` runs.
    template <class Work>
    double median_ms(int repeat, Work work) {
        void *begin, *end, *stream = nullptr;
        call("cuEventCreate", &begin, 0u);
        call("cuEventCreate", &end, 0u);
        std::vector<float> times(repeat);
        work();
        for (float& time : times) {
            call("cuEventRecord", begin, stream);
            work();
            call("cuEventRecord", end, stream);
            call("cuEventSynchronize", end);
            call("cuEventElapsedTime", &time, begin, end);
        }
        std::sort(times.begin(), times.end());
        return times[repeat / 2];
    }

  private:
    int of_device;
    void* library;
    std::map<std::string, void*> functions;
    std::vector<void*> modules;

    [[noreturn]] static void fail(const std::string& what) {
        std::fprintf(stderr, "%s\n", what.c_str());
        std::exit(2);
    }

    template <class... Arguments>
    void call(const char* name, Arguments... arguments) {
        auto function = (int (*)(Arguments...))dlsym(library, name);
        if (!function) fail(std::string(name) + ": the driver has no such function");
        if (int status = function(arguments...)) fail(std::string(name) + ": error " + std::to_string(status));
    }

    void load(const std::string& file) {
        std::ifstream from("../" + file + ".ptx");
        std::stringstream text;
        text << from.rdbuf();
        void* module;
        call("cuModuleLoadData", &module, (const void*)text.str().c_str());
        modules.push_back(module);
    }

    void* find(const std::string& entry) {
        void*& function = functions[entry];
        auto get = (int (*)(void**, void*, const char*))dlsym(library, "cuModuleGetFunction");
        for (void* module : modules)
            if (!function && get(&function, module, entry.c_str()) != 0) function = nullptr;
        if (!function) fail(entry + ": in no module");
        return function;
    }
};

inline Device& device() {
    static Device device;
    return device;
}

// A container's memory, where the device sees it.
template <class V>
struct OnDevice {
    typedef V value_type;
    OnDevice() = default;
    template <class Other>
    OnDevice(const OnDevice<Other>&) {}
    V* allocate(size_t count) { return (V*)device().host_memory(count * sizeof(V)); }
    void deallocate(V* memory, size_t) { device().free_host(memory); }
    bool operator==(const OnDevice&) const { return true; }
};
