/* The C interface between clearform (the host) and its plugins, for C99 and C++.
 *
 * A plugin is a shared library that exports two symbols: clearform_plugin_description, defined with
 * CLEARFORM_DESCRIPTION, and clearform_plugin_v1, which returns a ClearformPlugin. That struct points to the function
 * table of one interface: ClearformAdapterTable (the plugin edits weights) or ClearformBranchTable (the plugin computes
 * residuals for the model's blocks, as a ControlNet does).
 *
 * Four rules apply everywhere:
 *
 *   1. A table or struct with a size field grows only at its end. Read and write it only up to that size.
 *   2. Only numbers, pointers and the structs below cross the interface. Exceptions must not.
 *   3. The receiver of a tensor owns it and calls its deleter exactly once. Where a tensor or text is only borrowed,
 *      the comment says so and for how long.
 *   4. A function that can fail returns CLEARFORM_OK. Otherwise it first passes the reason to the host's `fail`, and
 *      returns CLEARFORM_FAILED.
 *
 * The host may use an instance from any thread, and from several at once. `close` is the last call, and no other call
 * runs at the same time.
 *
 * crates/plugin-abi/src declares the same in Rust; tests/abi.rs compares the two. */
#ifndef CLEARFORM_PLUGIN_H_
#define CLEARFORM_PLUGIN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Tensors: the structs of DLPack 1 (https://github.com/dmlc/dlpack, Apache-2.0), as its dlpack.h has them ----
 *
 * To use dlpack.h itself, include it before this file. */

#if defined(DLPACK_VERSION) || defined(DLPACK_DLPACK_H_)

#if !defined(DLPACK_MAJOR_VERSION) || DLPACK_MAJOR_VERSION != 1
#error "clearform needs the structs of DLPack 1, and another dlpack.h was included before clearform_plugin.h"
#endif

#else

/* The version that these structs follow. */
#define DLPACK_MAJOR_VERSION 1
#define DLPACK_MINOR_VERSION 0

/* Flag: the receiver must not write to the tensor. */
#define DLPACK_FLAG_BITMASK_READ_ONLY (1UL << 0UL)

/* Devices: host memory, or memory of a CUDA device. */
enum { kDLCPU = 1, kDLCUDA = 2 };

/* Type codes: signed integer, unsigned integer, IEEE floating point (f16 with 16 bits), bfloat16 (with 16 bits). */
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

typedef struct {
    uint32_t major; /* Changes with the layout: if it is unknown, use nothing but `deleter`. */
    uint32_t minor; /* Changes when constants are added. */
} DLPackVersion;

typedef struct {
    int32_t device_type; /* kDLCPU or kDLCUDA. */
    int32_t device_id;   /* 0 on the CPU. */
} DLDevice;

typedef struct {
    uint8_t code;   /* kDLFloat and so on. */
    uint8_t bits;   /* Bits of one value. */
    uint16_t lanes; /* Values in one element; 1 unless vectorised. */
} DLDataType;

/* The pointers belong to the DLManagedTensorVersioned that contains this struct. */
typedef struct {
    void *data;           /* First byte of the allocation; may be null if the tensor is empty. */
    DLDevice device;      /* Device of `data`. In this interface it is the CPU. */
    int32_t ndim;         /* Length of `shape` and `strides`. */
    DLDataType dtype;     /* Type of the elements. */
    int64_t *shape;       /* Size of each dimension, outermost first. */
    int64_t *strides;     /* In elements, not bytes; null for row-major, which this interface requires. */
    uint64_t byte_offset; /* Bytes from `data` to the first element. */
} DLTensor;

/* A tensor with the function that frees it. */
typedef struct DLManagedTensorVersioned {
    DLPackVersion version; /* Version of this struct's layout. */
    void *manager_ctx;     /* Private to the creator of the tensor. */
    /* Frees the tensor and this struct. The receiver calls it once, from any thread; null if there is nothing to
     * free. */
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags; /* Bits such as DLPACK_FLAG_BITMASK_READ_ONLY. */
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

#endif

/* ---- Shared by both interfaces ---- */

/* Major version of this interface. The host rejects plugins built for another one. */
#define CLEARFORM_ABI_MAJOR 1

/* Name of the function that every plugin exports, declared below. */
#define CLEARFORM_ENTRY_SYMBOL "clearform_plugin_v1"

/* Adapters that edit weights, such as LoRA. The table is a ClearformAdapterTable. */
#define CLEARFORM_ADAPTER_INTERFACE "clearform.adapter/1"

/* ControlNets, and similar networks that run beside the model and add residuals to the outputs of its blocks. "Branch"
 * is this interface's stable word for such a network; elsewhere clearform says ControlNet. The table is a
 * ClearformBranchTable. */
#define CLEARFORM_BRANCH_INTERFACE "clearform.branch/1"

/* Markers around the description (TOML) in the library's file. The host searches the file for them, and so reads the
 * description without loading the library. */
#define CLEARFORM_DESCRIPTION_BEGIN "<<clearform-plugin-description/1>>"
#define CLEARFORM_DESCRIPTION_END "<<end-of-clearform-plugin-description>>"

/* Status: success. */
#define CLEARFORM_OK 0
/* Status: failure; the reason was passed to the host's `fail`. */
#define CLEARFORM_FAILED 1

/* Levels of messages. An error is one that the plugin recovered from; others are reported with `fail`. */
#define CLEARFORM_LOG_INFO 1
#define CLEARFORM_LOG_WARNING 2
#define CLEARFORM_LOG_ERROR 3

/* Marks an exported symbol. */
#if defined(_WIN32)
#define CLEARFORM_EXPORT __declspec(dllexport)
#else
#define CLEARFORM_EXPORT __attribute__((visibility("default")))
#endif

/* Defines and exports the description, written as one or more adjacent string literals. */
#define CLEARFORM_DESCRIPTION(toml_text_literal)                                                                       \
    const char clearform_plugin_description[] = CLEARFORM_DESCRIPTION_BEGIN toml_text_literal CLEARFORM_DESCRIPTION_END

/* Initialises a ClearformText from a string literal: `ClearformText component = CLEARFORM_TEXT("transformer");` */
#define CLEARFORM_TEXT(literal) {"" literal, sizeof(literal) - 1}

/* UTF-8 text without a terminating NUL. Always borrowed: the receiver copies what it keeps. */
typedef struct {
    const char *data; /* First byte; may be null if `length` is 0. */
    size_t length;    /* Number of bytes. */
} ClearformText;

/* A key and its value. */
typedef struct {
    ClearformText key;
    ClearformText value;
} ClearformPair;

/* The host's functions. Borrowed by an instance until it is closed. They are never null, and may be called from any
 * thread. */
typedef struct {
    uint32_t abi_major;   /* CLEARFORM_ABI_MAJOR of the host. */
    uint32_t struct_size; /* Size of this struct in bytes. */
    void *context;        /* Owned by the host. First argument of every function here. */
    uint32_t threads;     /* Number of threads the host uses; a plugin should not use more. */
    uint32_t reserved;    /* Zero. */
    /* Allocates `size` bytes, aligned to `alignment` (a power of two); null if that fails. Free with `release`. */
    void *(*allocate)(void *context, size_t size, size_t alignment);
    /* Frees memory from `allocate`; pass the same size and alignment. */
    void (*release)(void *context, void *memory, size_t size, size_t alignment);
    /* Shows a message to the user; `level` is CLEARFORM_LOG_INFO and so on. The host copies the text. */
    void (*log)(void *context, uint32_t level, ClearformText message);
    /* Reports the progress of a long call, 0 to 1. */
    void (*progress)(void *context, double done);
    /* Sets the error message of the current call, which then returns CLEARFORM_FAILED. A later message replaces an
     * earlier one. The host copies the text. */
    void (*fail)(void *context, ClearformText message);
} ClearformHost;

/* What a plugin exports. Owned by the plugin and valid as long as the process: libraries are never unloaded. */
typedef struct {
    uint32_t abi_major;      /* CLEARFORM_ABI_MAJOR that the plugin was built with. */
    uint32_t struct_size;    /* Size of this struct in bytes. */
    ClearformText interface; /* Id of the interface, as in the description. Owned by the plugin. */
    const void *table;       /* The interface's table. Owned by the plugin. */
} ClearformPlugin;

/* Describes a tensor of a file. */
typedef struct {
    ClearformText name;   /* Name in the file. Owned by the file. */
    const int64_t *shape; /* Size of each dimension, outermost first. Owned by the file. */
    int32_t ndim;         /* Number of dimensions. */
    DLDataType dtype;     /* Type of the elements; all zero if DLPack has no such type. */
} ClearformTensorInfo;

/* An adapter's file, or its files. Borrowed by an instance, with everything it points to, until the instance is closed.
 * Its functions may be called from any thread. */
typedef struct {
    uint32_t struct_size;               /* Size of this struct in bytes. */
    uint32_t reserved;                  /* Zero. */
    void *context;                      /* Owned by the host. First argument of `read`. */
    const ClearformTensorInfo *tensors; /* Sorted by name. Owned by the file. */
    size_t tensor_count;                /* Number of tensors. */
    const ClearformPair *metadata;      /* Metadata of the file. Owned by the file. */
    size_t metadata_count;              /* Number of pairs. */
    ClearformText config;               /* The config.json next to the file; of an adapter, peft's adapter_config.json
                                           if there is one. Else empty. Owned by the file. */
    /* Reads tensor `index` into CPU memory, row-major, and stores it in `tensor` if it succeeds. The plugin owns the
     * tensor: it calls the deleter, or passes the tensor on to the host. */
    int32_t (*read)(void *context, size_t index, DLManagedTensorVersioned **tensor);
} ClearformFile;

/* The description, which the host reads from the library's file: see CLEARFORM_DESCRIPTION. */
extern CLEARFORM_EXPORT const char clearform_plugin_description[];

/* Returns the plugin's ClearformPlugin, or null if it does not support this host. It may be called several times with
 * different hosts: an instance uses the one passed to `open`. */
CLEARFORM_EXPORT const ClearformPlugin *clearform_plugin_v1(const ClearformHost *host);

/* ---- Interface clearform.adapter/1: the plugin turns an adapter file into a list of parameter edits ----
 *
 * A plugin names a parameter as any known layout of the model's family does, with dots or with underscores. The host
 * maps that name to the model's own tensors and rows, so a plugin needs no knowledge of model families. W is the weight
 * that is edited. */

/* W + scale * up * down, with the low-rank factors up (outputs, rank) and down (rank, inputs). */
#define CLEARFORM_EDIT_LOW_RANK 1
/* W + scale * value; `value` has the parameter's shape. */
#define CLEARFORM_EDIT_DELTA 2
/* `value` replaces W. It may have more columns. */
#define CLEARFORM_EDIT_REPLACE 3
/* Each row of W times its factor in `value` (rows). */
#define CLEARFORM_EDIT_SCALE 4

/* Flag: the edit has a magnitude (DoRA). */
#define CLEARFORM_EDIT_DECOMPOSED 1

/* `first_row` of an edit that covers the whole parameter. */
#define CLEARFORM_WHOLE_PARAMETER (-1)

/* One edit of one parameter. The host zeroes it and sets `struct_size`; the plugin fills in the rest. Its pointers are
 * owned by the plugin and stay valid until `close`. */
typedef struct {
    uint32_t struct_size; /* Size of this struct in bytes. Set by the host; do not write it. */
    uint32_t kind;        /* CLEARFORM_EDIT_LOW_RANK and so on. */
    uint32_t flags;       /* CLEARFORM_EDIT_DECOMPOSED, or zero. */
    uint32_t reserved;    /* Zero. */
    /* Component of the pipeline, by its folder: transformer, text_encoder, text_encoder_2, vae. A trailing `*` matches
     * any ending; the first component that has the parameter is used. */
    ClearformText component;
    ClearformText parameter; /* Name of the parameter within the component, in any layout. */
    int64_t first_row;       /* First row that is edited, or CLEARFORM_WHOLE_PARAMETER. */
    uint64_t rows;           /* Number of edited rows; the edit's tensors have as many. */
    uint64_t columns;        /* Elements in a row; 1 for a bias or a norm. */
    double scale;            /* The adapter's own, such as alpha / rank. The host applies the user's strength on top. */
    const size_t *sources;   /* Indexes of the file's tensors that this edit is made from. */
    size_t source_count;     /* Number of indexes. */
} ClearformEdit;

/* The tensors of an edit, on the CPU. The host zeroes it and sets `struct_size`; the plugin fills in those that the
 * edit has. The host then owns them and calls their deleters, also if the call fails. */
typedef struct {
    uint32_t struct_size;            /* Size of this struct in bytes. Set by the host; do not write it. */
    uint32_t reserved;               /* Zero. */
    DLManagedTensorVersioned *down;  /* (rank, inputs); only for CLEARFORM_EDIT_LOW_RANK. */
    DLManagedTensorVersioned *up;    /* (outputs, rank); only for CLEARFORM_EDIT_LOW_RANK. */
    DLManagedTensorVersioned *value; /* For every other kind. */
    /* Norms of the edited weight: of its rows, (outputs) or (outputs, 1), or of its columns, (1, inputs). Weight
     * decomposition (DoRA, arXiv 2402.09353, eq. 5). Null without CLEARFORM_EDIT_DECOMPOSED. */
    DLManagedTensorVersioned *magnitude;
} ClearformEditTensors;

/* The function table of clearform.adapter/1. No function may be null. */
typedef struct {
    uint32_t struct_size; /* Size of this struct in bytes. */
    uint32_t reserved;    /* Zero. */
    /* Opens a file that matches the plugin's claims. `host` and `file` are borrowed until `close`. Stores a new
     * instance in `instance` if it succeeds; the plugin frees it in `close`. */
    int32_t (*open)(const ClearformHost *host, const ClearformFile *file, void **instance);
    /* Frees an instance. Tensors that the host received from it stay valid. */
    void (*close)(void *instance);
    /* Number of edits. */
    size_t (*edit_count)(void *instance);
    /* Describes edit `index` (below `edit_count`) without computing its tensors. `edit` is borrowed for the call. */
    int32_t (*edit)(void *instance, size_t index, ClearformEdit *edit);
    /* Returns the tensors of edit `index`. The host may ask for them several times rather than keep large tensors.
     * `tensors` is borrowed for the call. */
    int32_t (*edit_tensors)(void *instance, size_t index, ClearformEditTensors *tensors);
    /* Why tensor `index` of the file is deliberately in no edit. Empty if there is no reason: the host then reports the
     * tensor as not understood. The text is owned by the plugin and stays valid until `close`. */
    ClearformText (*skipped)(void *instance, size_t index);
} ClearformAdapterTable;

/* ---- Interface clearform.branch/1: a network beside the model computes residuals for its blocks at each step ---- */

/* The control is latents in the form of the model's own: (batch, image tokens, channels) where the model takes packed
 * latents, else (batch, channels, height, width). */
#define CLEARFORM_CONTROL_LATENTS 1
/* The control is an image, (batch, 3, height, width). */
#define CLEARFORM_CONTROL_PIXELS 2

/* Flags of ClearformBranchInfo. A host whose struct is too short for them knows none: then a branch that needs one fails
 * in `info`. */
/* Control latents are scaled as the model's own, but not shifted. */
#define CLEARFORM_UNSHIFTED_CONTROL 1
/* The pooled text of every step is zero. */
#define CLEARFORM_ZERO_POOLED 2
/* The branch takes ClearformStep's `embedded`. */
#define CLEARFORM_EMBEDDED_LATENTS 4

/* The model that the branch runs beside. Borrowed for the call of `open`, with its texts. */
typedef struct {
    uint32_t struct_size;    /* Size of this struct in bytes. */
    uint32_t reserved;       /* Zero. */
    ClearformText family;    /* Family, such as "flux". */
    ClearformText config;    /* The model's complete diffusers config.json. */
    ClearformText attention; /* Attention for the branch to use: `full`, or `clear:r=R`. */
} ClearformBase;

/* The input that a branch expects. The host zeroes it and sets `struct_size`; the plugin fills in the rest. */
typedef struct {
    uint32_t struct_size; /* Size of this struct in bytes. Set by the host; do not write it. */
    uint32_t control;     /* CLEARFORM_CONTROL_LATENTS or CLEARFORM_CONTROL_PIXELS. */
    uint32_t channels;    /* Channels of the control. */
    uint32_t modes;       /* Number of modes of a union ControlNet; 0 if it has none. */
    double low;           /* Pixel value for black; the input of the VAE if the control is latents. */
    double high;          /* Pixel value for white. */
    uint32_t flags;       /* CLEARFORM_UNSHIFTED_CONTROL and so on, or zero. The first revision ends before it. */
    uint32_t reserved;    /* Zero. */
} ClearformBranchInfo;

/* The input of one evaluation, on the CPU, with the shapes of the forward method of the family's diffusers class. It is
 * borrowed for the call: do not call the deleters. Tensors that the model does not use are null. */
typedef struct {
    uint32_t struct_size;                      /* Size of this struct in bytes. */
    uint32_t reserved;                         /* Zero. */
    /* Noisy latents: (batch, image tokens, channels) where the model takes packed latents, else (batch, channels,
     * height, width). */
    const DLManagedTensorVersioned *latents;
    const DLManagedTensorVersioned *timestep;  /* (batch). */
    const DLManagedTensorVersioned *text;      /* Text embeddings, (batch, text tokens, channels). */
    const DLManagedTensorVersioned *pooled;    /* Pooled text embeddings, (batch, channels). */
    const DLManagedTensorVersioned *guidance;  /* Guidance scale, (batch), also if the model embeds none. */
    const DLManagedTensorVersioned *image_ids; /* Positions of the image tokens, (image tokens, 3). */
    const DLManagedTensorVersioned *text_ids;  /* Positions of the text tokens, (text tokens, 3). */
    const DLManagedTensorVersioned *control;   /* The control, as ClearformBranchInfo describes it. */
    const DLManagedTensorVersioned *mode;      /* Mode of each image, (batch, 1), 64-bit integers. */
    /* The latents as the model embeds them before its first block, (batch, image tokens, width) in raster order. Null
     * without CLEARFORM_EMBEDDED_LATENTS. The first revision ends before it. */
    const DLManagedTensorVersioned *embedded;
} ClearformStep;

/* Passes a residual, (batch, image tokens, width) in raster order, to the host, with the indexes of the model's blocks
 * whose outputs it is added to. The host owns the residual from then on, whatever it returns; `blocks` is borrowed for
 * the call. Called only within `residuals`, by one thread at a time. */
typedef int32_t (*ClearformGiveResidual)(void *context, DLManagedTensorVersioned *residual, const uint32_t *blocks,
                                         size_t block_count);

/* The function table of clearform.branch/1. No function may be null. */
typedef struct {
    uint32_t struct_size; /* Size of this struct in bytes. */
    uint32_t reserved;    /* Zero. */
    /* Opens a file that matches the plugin's claims, for the model `base`. `host` and `file` are borrowed until
     * `close`, `base` for the call. Stores a new instance in `instance` if it succeeds; the plugin frees it in
     * `close`. */
    int32_t (*open)(const ClearformHost *host, const ClearformFile *file, const ClearformBase *base, void **instance);
    /* Frees an instance. Tensors that the host received from it stay valid. */
    void (*close)(void *instance);
    /* Describes the expected control. `info` is borrowed for the call. */
    int32_t (*info)(void *instance, ClearformBranchInfo *info);
    /* Computes the residuals of one evaluation and calls `give` with `context` for each. The host scales them. `step`
     * is borrowed for the call. */
    int32_t (*residuals)(void *instance, const ClearformStep *step, ClearformGiveResidual give, void *context);
} ClearformBranchTable;

#ifdef __cplusplus
}
#endif

#endif
