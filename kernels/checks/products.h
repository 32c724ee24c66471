// Products of matrices in bf16 by cuBLAS, which is opened at run time if it is there.
#pragma once
#include "launch.h"

// (rows, inner) times the transpose of (columns, inner), as a linear layer has them.
struct ProductShape {
    int rows, columns, inner;
    double flops() const { return 2. * rows * columns * inner; }
};

class Cublas {
    void *library = nullptr, *handle = nullptr;
    std::string found;

  public:
    Cublas() {
        for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
            if (library) continue;
            library = dlopen(name, RTLD_NOW);
            found = name;
        }
        auto create = library ? (int (*)(void**))dlsym(library, "cublasCreate_v2") : nullptr;
        if (!create || create(&handle) != 0) library = nullptr;
    }
    bool is_there() const { return library; }
    const std::string& name() const { return found; }

    // Returns whether cuBLAS accepted the product.
    bool multiply(ProductShape shape, const u16* rows, const u16* columns, u16* out) {
        constexpr int BF16 = 14, SUMS_IN_F32 = 68, WITH_TENSOR_CORES = 99, AS_STORED = 0, TRANSPOSED = 1, BATCH = 1;
        constexpr i64 STRIDE = 0;
        typedef const void* Pointer;
        typedef int (*Multiply)(void*, int, int, int, int, int, Pointer, Pointer, int, int, i64, Pointer, int, int, i64,
                                Pointer, void*, int, int, i64, int, int, int);
        auto multiply = (Multiply)dlsym(library, "cublasGemmStridedBatchedEx"); // candle's too
        float one = 1, zero = 0;
        // cuBLAS stores columns first, so it computes the transpose.
        return multiply && multiply(handle, TRANSPOSED, AS_STORED, shape.columns, shape.rows, shape.inner, &one,
                                    columns, BF16, shape.inner, STRIDE, rows, BF16, shape.inner, STRIDE, &zero, out,
                                    BF16, shape.columns, STRIDE, BATCH, SUMS_IN_F32, WITH_TENSOR_CORES) == 0;
    }
};
