// The first CUDA device, through the driver library alone, which is opened at run time: no CUDA toolkit is needed.
// Modules are read from the folder of the kernels: CHECK_KERNELS, or the parent of the working directory.
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

struct Grid {
    int x, y, z, threads, shared_bytes;
};

// Two ways to run a kernel that must give the same bits. The simulated device swaps the order of warps, and has asynchronous
// copies land late or early. A GPU ignores this, so there it only shows that a second run gives the same bits.
enum class Schedule { Default, Opposite };
inline void set_schedule(Schedule schedule) {
    bool opposite = schedule == Schedule::Opposite;
    setenv("SIMULATOR_ORDER", opposite ? "reverse" : "forward", 1);
    setenv("SIMULATOR_COPIES", opposite ? "early" : "late", 1);
}

inline std::string kernels_folder() {
    const char* folder = std::getenv("CHECK_KERNELS");
    return folder ? folder : "..";
}

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
        device_capability = 10 * major + minor;
        std::printf("device: %s, compute capability %d.%d\n", name, major, minor);
        void* context;
        call("cuDevicePrimaryCtxRetain", &context, number);
        call("cuCtxSetCurrent", context);
        for (const char* file : {"add_bias/kernel", "clear_attention/forward", "clear_attention/backward", "gated_add/kernel",
                                 "gelu/kernel", "modulated_layer_norm/kernel", "permute/kernel", "rms_norm_rope/kernel"})
            load_ptx(file);
        if (device_capability == 90) load_machine_code("clear_attention/forward_sm90a");
    }

    // Compute capability, major · 10 + minor.
    int capability() const { return device_capability; }

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
        constexpr int MAX_DYNAMIC_SHARED_BYTES = 8;
        call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_BYTES, grid.shared_bytes);
        call("cuLaunchKernel", function, (unsigned)grid.x, (unsigned)grid.y, (unsigned)grid.z, (unsigned)grid.threads, 1u, 1u,
             (unsigned)grid.shared_bytes, none, (void**)arguments, (void**)none);
    }

    // Encodes the map of a 16-bit tensor, for boxes of 64 tokens and 64 elements of one head. Sizes are innermost first.
    void tensor_map(unsigned long long* map, int format, const void* memory, std::array<unsigned long long, 4> sizes) {
        unsigned long long row = sizes[0] * 2, strides[] = {row, row * sizes[1], row * sizes[1] * sizes[2]};
        unsigned box[] = {64, 1, 64, 1}, element_strides[] = {1, 1, 1, 1};
        constexpr int SWIZZLE_128 = 3, PROMOTE_256 = 3;
        call("cuTensorMapEncodeTiled", map, format, 4u, (void*)memory, sizes.data(), strides, box, element_strides, 0,
             SWIZZLE_128, PROMOTE_256, 0);
    }

    // Host memory that the device accesses at the same address.
    void* host_memory(size_t bytes) {
        void* memory;
        call("cuMemHostAlloc", &memory, bytes, 3u); // portable, mapped
        return memory;
    }
    void free_host(void* memory) { call("cuMemFreeHost", memory); }

    // Device memory, filled from `from` unless that is null.
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
    // Within the memory of the device; does not wait.
    void copy(void* to, const void* from, size_t bytes) {
        void* stream = nullptr;
        call("cuMemcpyDtoDAsync_v2", (unsigned long long)to, (unsigned long long)from, bytes, stream);
    }
    void free(void* memory) { call("cuMemFree_v2", (unsigned long long)memory); }

    // Median time of `repeat` runs.
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
    int device_capability;
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

    static bool read(const std::string& file, std::string& content) {
        std::ifstream from(kernels_folder() + "/" + file, std::ios::binary);
        std::stringstream text;
        text << from.rdbuf();
        content = text.str();
        return from.is_open() && !content.empty();
    }

    void load_ptx(const std::string& name) {
        std::string text;
        if (!read(name + ".ptx", text)) fail(kernels_folder() + "/" + name + ".ptx: cannot be read");
        void* module;
        call("cuModuleLoadData", &module, (const void*)text.c_str());
        modules.push_back(module);
    }

    // Prefers the machine code that CI has checked to what the driver's compiler makes of the PTX. CHECK_MODULE=ptx
    // tests the latter.
    void load_machine_code(const std::string& name) {
        const char* wanted = std::getenv("CHECK_MODULE");
        if (wanted && std::string(wanted) == "ptx")
            std::printf("module: %s.ptx, as CHECK_MODULE says\n", name.c_str());
        else if (load_cubin(name))
            return;
        load_ptx(name);
    }

    bool load_cubin(const std::string& name) {
        std::string code;
        void* module;
        if (!read(name + ".cubin", code)) {
            std::printf("module: %s.ptx, because there is no cubin\n", name.c_str());
            return false;
        }
        auto load = (int (*)(void**, const void*))dlsym(library, "cuModuleLoadData");
        if (int status = load(&module, code.data())) {
            std::printf("module: %s.ptx, because the driver refuses the cubin: error %d\n", name.c_str(), status);
            return false;
        }
        std::printf("module: %s.cubin\n", name.c_str());
        modules.push_back(module);
        return true;
    }

    void* find(const std::string& entry) {
        void*& function = functions[entry];
        auto get = (int (*)(void**, void*, const char*))dlsym(library, "cuModuleGetFunction");
        for (void* module : modules)
            if (!function && get(&function, module, entry.c_str()) != 0) function = nullptr;
        if (!function) fail(entry + ": no module has this kernel");
        return function;
    }
};

inline Device& device() {
    static Device device;
    return device;
}

// Allocates memory that host and device share.
template <class V>
struct HostMappedAllocator {
    typedef V value_type;
    HostMappedAllocator() = default;
    template <class Other>
    HostMappedAllocator(const HostMappedAllocator<Other>&) {}
    V* allocate(size_t count) { return (V*)device().host_memory(count * sizeof(V)); }
    void deallocate(V* memory, size_t) { device().free_host(memory); }
    bool operator==(const HostMappedAllocator&) const { return true; }
};
