/* What crosses the boundary between clearform and a plugin, for C99 and C++.
 *
 * A plugin is a shared library with two symbols: clearform_plugin_description, which CLEARFORM_DESCRIPTION defines, and
 * clearform_plugin_v1, which returns its ClearformPlugin. That leads to the table of one interface:
 * ClearformAdapterTable, which edits weights, or ClearformBranchTable, which computes residuals beside the model.
 *
 * Four rules hold everywhere. A table or struct begins with its size, grows only at its end, and is read and written
 * only as far as that size says. Numbers, pointers and these structs are all that crosses; no exception does. A tensor
 * is owned by whoever received it, who calls its deleter once; where one is only lent, the comment says so. A function
 * that can fail returns CLEARFORM_OK, or else has told the host's `fail` why.
 *
 * The host may call an instance from any thread, and from several at once; `close` comes alone and last.
 *
 * crates/plugin-abi/src says the same in Rust, and a test holds the two together. */
#ifndef CLEARFORM_PLUGIN_H_
#define CLEARFORM_PLUGIN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Tensors: the structs of DLPack 1 (https://github.com/dmlc/dlpack, Apache-2.0), as its dlpack.h has them ----
 *
 * Who uses dlpack.h itself includes it before this file. */

#if defined(DLPACK_VERSION) || defined(DLPACK_DLPACK_H_)

#if !defined(DLPACK_MAJOR_VERSION) || DLPACK_MAJOR_VERSION != 1
#error "clearform needs the structs of DLPack 1, and another dlpack.h was included before clearform_plugin.h"
#endif

#else

/* The version that these structs follow. */
#define DLPACK_MAJOR_VERSION 1
#define DLPACK_MINOR_VERSION 0

/* A flag: the receiver must not write. */
#define DLPACK_FLAG_BITMASK_READ_ONLY (1UL << 0UL)

/* Where memory lies: that of the process, or of a CUDA device. */
enum { kDLCPU = 1, kDLCUDA = 2 };

/* Kinds of numbers: signed integers, unsigned ones, IEEE floating point (16 bits are f16); with 16 bits, bfloat16. */
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

typedef struct {
    uint32_t major; /* Changes when the layout changes: of another major only `deleter` may be used. */
    uint32_t minor; /* Changes when constants are added. */
} DLPackVersion;

typedef struct {
    int32_t device_type; /* kDLCPU or kDLCUDA. */
    int32_t device_id;   /* 0 on the CPU. */
} DLDevice;

typedef struct {
    uint8_t code;   /* kDLFloat and so on. */
    uint8_t bits;   /* Of one number. */
    uint16_t lanes; /* Numbers in one element; 1 unless vectorised. */
} DLDataType;

/* All pointers belong to the DLManagedTensorVersioned around it. */
typedef struct {
    void *data;           /* First byte of the allocation; null only if the tensor is empty. */
    DLDevice device;      /* Where `data` lies. Across this boundary it is the CPU. */
    int32_t ndim;         /* Length of `shape` and `strides`. */
    DLDataType dtype;     /* Number format. */
    int64_t *shape;       /* Extents, outermost first. */
    int64_t *strides;     /* Elements, not bytes, from one index to the next; null for row-major, as it must be here. */
    uint64_t byte_offset; /* Bytes from `data` to the first element. */
} DLTensor;

/* A tensor with the way to give it back. */
typedef struct DLManagedTensorVersioned {
    DLPackVersion version; /* Of the struct that follows. */
    void *manager_ctx;     /* For the one who made it alone. */
    /* Frees the tensor and this struct. Called once, from any thread, by who received it; null if there is nothing to
     * free. */
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags; /* Bits such as DLPACK_FLAG_BITMASK_READ_ONLY. */
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

#endif

/* ---- What both interfaces share ---- */

/* Major version of the boundary. A plugin of another major is refused, whatever else fits. */
#define CLEARFORM_ABI_MAJOR 1

/* Name of the one function that a plugin exports, declared below. */
#define CLEARFORM_ENTRY_SYMBOL "clearform_plugin_v1"

/* Weight edits: LoRA and its kin. Its table is a ClearformAdapterTable. */
#define CLEARFORM_ADAPTER_INTERFACE "clearform.adapter/1"

/* Branches that compute residuals for each block: ControlNet and its kin. Its table is a ClearformBranchTable. */
#define CLEARFORM_BRANCH_INTERFACE "clearform.branch/1"

/* What stands in the file of a library before and after its description, which is TOML. The host finds it by these
 * marks, without loading the library. */
#define CLEARFORM_DESCRIPTION_BEGIN "<<clearform-plugin-description/1>>"
#define CLEARFORM_DESCRIPTION_END "<<end-of-clearform-plugin-description>>"

/* Status: done. */
#define CLEARFORM_OK 0
/* Status: not done; the host's `fail` was told why. */
#define CLEARFORM_FAILED 1

/* A message that a person may want to know, one that a person should know, and one of something that went wrong and was
 * dealt with. */
#define CLEARFORM_LOG_INFO 1
#define CLEARFORM_LOG_WARNING 2
#define CLEARFORM_LOG_ERROR 3

/* Before what the library exports. */
#if defined(_WIN32)
#define CLEARFORM_EXPORT __declspec(dllexport)
#else
#define CLEARFORM_EXPORT __attribute__((visibility("default")))
#endif

/* Defines and exports the description, which is given as one string literal or several in a row. */
#define CLEARFORM_DESCRIPTION(toml_text_literal)                                                                       \
    const char clearform_plugin_description[] = CLEARFORM_DESCRIPTION_BEGIN toml_text_literal CLEARFORM_DESCRIPTION_END

/* Begins a ClearformText with a string literal: `ClearformText part = CLEARFORM_TEXT("transformer");` */
#define CLEARFORM_TEXT(literal) {"" literal, sizeof(literal) - 1}

/* UTF-8 text, not ended by a NUL. Lent: who receives it copies what it keeps. */
typedef struct {
    const char *data; /* First byte; may be null if there is none. */
    size_t length;    /* How many bytes there are. */
} ClearformText;

/* A key and its value. */
typedef struct {
    ClearformText key;
    ClearformText value;
} ClearformPair;

/* What the host lends a plugin until the instance that was opened with it is closed. Its functions are never null, and
 * may be called from any thread. */
typedef struct {
    uint32_t abi_major;   /* CLEARFORM_ABI_MAJOR of the host. */
    uint32_t struct_size; /* Bytes of this struct. */
    void *context;        /* The host's. First argument of every function here. */
    uint32_t threads;     /* Threads that the host computes with; a plugin should not use more. */
    uint32_t reserved;    /* Zero. */
    /* Memory of `size` bytes, aligned to `alignment`, a power of two; null if there is none. It is the plugin's, which
     * gives it back by `release`. */
    void *(*allocate)(void *context, size_t size, size_t alignment);
    /* Gives back what `allocate` gave, with the same size and alignment. */
    void (*release)(void *context, void *memory, size_t size, size_t alignment);
    /* A message for the person; `level` is CLEARFORM_LOG_INFO and so on. The host copies the text. */
    void (*log)(void *context, uint32_t level, ClearformText message);
    /* How far a long call has come, 0 to 1. */
    void (*progress)(void *context, double done);
    /* Why the call that is about to return CLEARFORM_FAILED could not be done. The last one counts. The host copies the
     * text. */
    void (*fail)(void *context, ClearformText message);
} ClearformHost;

/* What a plugin exports. It is the plugin's, and lives as long as the process: libraries are never unloaded. */
typedef struct {
    uint32_t abi_major;      /* CLEARFORM_ABI_MAJOR that the plugin was built for. */
    uint32_t struct_size;    /* Bytes of this struct. */
    ClearformText interface; /* The interface with its revision, as in the description. The plugin's, like this. */
    const void *table;       /* The interface's table. The plugin's, like this. */
} ClearformPlugin;

/* A tensor of a file, not read yet. */
typedef struct {
    ClearformText name;   /* Its name in the file. The file's. */
    const int64_t *shape; /* Extents, outermost first. The file's. */
    int32_t ndim;         /* How many extents there are. */
    DLDataType dtype;     /* Number format; all zero if DLPack has none for it. */
} ClearformTensorInfo;

/* An adapter's file, or files. Lent until `close` with all that it leads to; its functions may be called from any
 * thread. */
typedef struct {
    uint32_t struct_size;               /* Bytes of this struct. */
    uint32_t reserved;                  /* Zero. */
    void *context;                      /* The host's. First argument of `read`. */
    const ClearformTensorInfo *tensors; /* Tensors, sorted by name. The file's. */
    size_t tensor_count;                /* How many there are. */
    const ClearformPair *metadata;      /* Free text that the file holds beside its tensors. The file's. */
    size_t metadata_count;              /* How many pairs there are. */
    ClearformText config;               /* The config.json beside the file, or no text. The file's. */
    /* Reads tensor `index` to the CPU, row-major, and writes it to `tensor` if it returns CLEARFORM_OK. The tensor
     * belongs to the plugin, which calls its deleter or gives it on. */
    int32_t (*read)(void *context, size_t index, DLManagedTensorVersioned **tensor);
} ClearformFile;

/* The description that the host finds in the library's file: see CLEARFORM_DESCRIPTION. */
extern CLEARFORM_EXPORT const char clearform_plugin_description[];

/* Returns what the plugin exports, or null if it does not run with this host. May
 * be called more than once, with other hosts: `open` is given the one that counts. */
CLEARFORM_EXPORT const ClearformPlugin *clearform_plugin_v1(const ClearformHost *host);

/* ---- The interface clearform.adapter/1: an adapter file becomes a list of edits of parameters ----
 *
 * A plugin names parameters as any layout of the model's family does, with dots or with underscores in their place; the
 * host finds where their rows lie in the model. So a plugin needs to know no family. */

/* W + scale * up * down, of factors up (outputs, rank) and down (rank, inputs). */
#define CLEARFORM_EDIT_LOW_RANK 1
/* W + scale * value, of a value shaped as the parameter. */
#define CLEARFORM_EDIT_DELTA 2
/* The value in place of the parameter, which may have another number of columns. */
#define CLEARFORM_EDIT_REPLACE 3
/* Each row of W times its number in value (rows). */
#define CLEARFORM_EDIT_SCALE 4

/* A flag: the edit has a magnitude. */
#define CLEARFORM_EDIT_DECOMPOSED 1

/* `first_row` of an edit of the whole parameter. */
#define CLEARFORM_WHOLE_PARAMETER (-1)

/* One edit of one parameter. The host zeroes it and writes `struct_size`; the plugin fills in the rest. */
typedef struct {
    uint32_t struct_size; /* Bytes of this struct. The host's: it is not to be written. */
    uint32_t kind;        /* CLEARFORM_EDIT_LOW_RANK and so on. */
    uint32_t flags;       /* CLEARFORM_EDIT_DECOMPOSED, or zero. */
    uint32_t reserved;    /* Zero. */
    /* The part of the pipeline, by its folder: transformer, text_encoder, text_encoder_2, vae. A `*` at the end stands
     * for any, of which the first that has the parameter is meant. The plugin's, and stands until `close`. */
    ClearformText component;
    ClearformText parameter; /* The parameter within the part, in any layout. The plugin's, and stands until `close`. */
    int64_t first_row;       /* The row at which the edit begins, or CLEARFORM_WHOLE_PARAMETER. */
    uint64_t rows;           /* Rows that it edits, which its tensors have. */
    uint64_t columns;        /* Elements of a row; 1 for a bias or a norm. */
    double scale;            /* The adapter's own factor, such as alpha / rank. The person's strength comes on top. */
    const size_t *sources;   /* Indexes of the file's tensors that it uses up. The plugin's, and stand until `close`. */
    size_t source_count;     /* How many there are. */
} ClearformEdit;

/* The tensors of an edit, on the CPU. The host zeroes it and writes `struct_size`; the plugin fills in those that the
 * edit has, and all of them belong to the host then, which calls their deleters, also if the call fails. */
typedef struct {
    uint32_t struct_size;            /* Bytes of this struct. The host's: it is not to be written. */
    uint32_t reserved;               /* Zero. */
    DLManagedTensorVersioned *down;  /* (rank, inputs) of CLEARFORM_EDIT_LOW_RANK. The host's from then on. */
    DLManagedTensorVersioned *up;    /* (outputs, rank) of CLEARFORM_EDIT_LOW_RANK. The host's from then on. */
    DLManagedTensorVersioned *value; /* Of every other kind. The host's from then on. */
    /* The norms that rows of the edited weight shall have, (outputs) or (outputs, 1), or its columns, (1, inputs):
     * weight decomposition (DoRA, arXiv 2402.09353, eq. 5). The host's from then on. Null without. */
    DLManagedTensorVersioned *magnitude;
} ClearformEditTensors;

/* The table of clearform.adapter/1. Every function must be there. */
typedef struct {
    uint32_t struct_size; /* Bytes of this struct. */
    uint32_t reserved;    /* Zero. */
    /* Opens a file that the plugin's claims fit. `host` and `file` are lent until `close`. Writes an
     * instance of the plugin's own, which the plugin frees in `close`; nothing if it fails. */
    int32_t (*open)(const ClearformHost *host, const ClearformFile *file, void **instance);
    /* Frees an instance. Tensors that the host has of it stay valid. */
    void (*close)(void *instance);
    /* How many edits there are. */
    size_t (*edit_count)(void *instance);
    /* Describes edit `index`, below `edit_count`; computes nothing. `edit` is the host's, lent for the call. */
    int32_t (*edit)(void *instance, size_t index, ClearformEdit *edit);
    /* Gives the tensors of edit `index`, as often as they are asked for: the host keeps no large ones. `tensors` is the
     * host's, lent for the call. */
    int32_t (*edit_tensors)(void *instance, size_t index, ClearformEditTensors *tensors);
    /* Why tensor `index` of the file is in no edit; no text if there is no reason, which the host calls an error. The
     * text is the plugin's, and stands until `close`. */
    ClearformText (*skipped)(void *instance, size_t index);
} ClearformAdapterTable;

/* ---- The interface clearform.branch/1: a network beside the model gives residuals for its blocks at each step ---- */

/* The control is latents, packed as the model takes its own: (batch, image tokens, channels). */
#define CLEARFORM_CONTROL_LATENTS 1
/* The control is a picture, (batch, 3, height, width). */
#define CLEARFORM_CONTROL_PIXELS 2

/* The model that a branch hangs on. Lent for the call of `open`, with its texts. */
typedef struct {
    uint32_t struct_size;    /* Bytes of this struct. */
    uint32_t reserved;       /* Zero. */
    ClearformText family;    /* Its family ("flux"). */
    ClearformText config;    /* Its diffusers config.json, complete. */
    ClearformText attention; /* The attention that the branch shall have: `full`, or `clear:r=R`. */
} ClearformBase;

/* What a branch takes. The host zeroes it and writes `struct_size`; the plugin fills in the rest. */
typedef struct {
    uint32_t struct_size; /* Bytes of this struct. The host's: it is not to be written. */
    uint32_t control;     /* CLEARFORM_CONTROL_LATENTS or CLEARFORM_CONTROL_PIXELS. */
    uint32_t channels;    /* Channels of the control. */
    uint32_t modes;       /* Modes that it knows (union ControlNets); 0 if it takes none. */
    double low;           /* The pixel value that black becomes, before the VAE if the control is latents. */
    double high;          /* The pixel value that white becomes. */
} ClearformBranchInfo;

/* One evaluation's input, named and shaped as the forward of the family's diffusers class has it, on the CPU. All of it
 * is lent for the call: deleters are not to be called. What is not there is null. */
typedef struct {
    uint32_t struct_size;                      /* Bytes of this struct. */
    uint32_t reserved;                         /* Zero. */
    const DLManagedTensorVersioned *latents;   /* Noisy latents, (batch, image tokens, channels). Lent. */
    const DLManagedTensorVersioned *timestep;  /* (batch). Lent. */
    const DLManagedTensorVersioned *text;      /* Text features, (batch, text tokens, channels). Lent. */
    const DLManagedTensorVersioned *pooled;    /* Pooled text features, (batch, channels). Lent. */
    const DLManagedTensorVersioned *guidance;  /* Guidance scale, (batch), also for models that embed none. Lent. */
    const DLManagedTensorVersioned *image_ids; /* Places of the image tokens, (image tokens, 3). Lent. */
    const DLManagedTensorVersioned *text_ids;  /* Places of the text tokens, (text tokens, 3). Lent. */
    const DLManagedTensorVersioned *control;   /* The control, as ClearformBranchInfo asks for it. Lent. */
    const DLManagedTensorVersioned *mode;      /* Mode of each picture, (batch, 1), 64-bit integers. Lent. */
} ClearformStep;

/* Takes a residual, (batch, image tokens, width) in raster order, which belongs to the host from then on, whatever it
 * returns, and the numbers of the model's blocks after which it is to be added: lent for the call. `context` is the
 * host's. It is called within `residuals`, by one thread at a time. */
typedef int32_t (*ClearformGiveResidual)(void *context, DLManagedTensorVersioned *residual, const uint32_t *blocks,
                                         size_t block_count);

/* The table of clearform.branch/1. Every function must be there. */
typedef struct {
    uint32_t struct_size; /* Bytes of this struct. */
    uint32_t reserved;    /* Zero. */
    /* Opens a file that the plugin's claims fit, for the model `base`. `host` and `file` are lent until `close`, `base`
     * for the call. Writes an instance of the plugin's own, which the plugin frees in `close`; nothing if it fails. */
    int32_t (*open)(const ClearformHost *host, const ClearformFile *file, const ClearformBase *base, void **instance);
    /* Frees an instance. Tensors that the host has of it stay valid. */
    void (*close)(void *instance);
    /* Says what it takes. `info` is the host's, lent for the call. */
    int32_t (*info)(void *instance, ClearformBranchInfo *info);
    /* Computes one evaluation's residuals and calls `give` with `context` for each. The host scales them. `step` is
     * lent for the call; `context` is the host's. */
    int32_t (*residuals)(void *instance, const ClearformStep *step, ClearformGiveResidual give, void *context);
} ClearformBranchTable;

#ifdef __cplusplus
}
#endif

#endif
