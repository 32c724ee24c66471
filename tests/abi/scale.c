/* The plugin "c-scale", which is plugins/example in C: a tensor `PARAMETER.c_scale` contains one factor for each row of
 * the transformer's PARAMETER. To build it: `cc -shared -fPIC -I crates/plugin-abi/include scale.c -o libscale.so`. */
#include "clearform_plugin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

CLEARFORM_DESCRIPTION("id = 'c-scale'\nversion = '0.1.0'\ninterface = '" CLEARFORM_ADAPTER_INTERFACE "'\nabi = 1\n"
                      "summary = 'One factor for each row of a parameter'\n[[claims]]\nany = ['*.c_scale']\n"
                      "[[example]]\nname = 'one layer'\ntensors = { 'proj_out.weight.c_scale' = [4] }\n"
                      "edits = ['transformer.proj_out.weight']\n");

enum { ENDING = sizeof ".c_scale" - 1 };

typedef struct {
    const ClearformHost *host;
    const ClearformFile *file; /* Valid until close, like the names that `parameter` points into. */
    size_t count;              /* Number of edits. */
    size_t sources[];          /* Index of each edit's tensor in the file. */
} Instance;

static int32_t fail(const ClearformHost *host, const char *reason) {
    host->fail(host->context, (ClearformText){reason, strlen(reason)});
    return CLEARFORM_FAILED;
}

/* Lists the edits from names and shapes alone. Other tensors are in no edit, and the host reports them. */
static int32_t scale_open(const ClearformHost *host, const ClearformFile *file, void **instance) {
    Instance *self = malloc(sizeof *self + file->tensor_count * sizeof self->sources[0]);
    if (self == NULL) return fail(host, "out of memory");
    self->host = host, self->file = file, self->count = 0;
    for (size_t index = 0; index < file->tensor_count; index++) {
        ClearformText name = file->tensors[index].name;
        if (name.length <= ENDING || memcmp(name.data + name.length - ENDING, ".c_scale", ENDING) != 0) continue;
        if (file->tensors[index].ndim != 1) return free(self), fail(host, "*.c_scale: expected one factor per row");
        self->sources[self->count++] = index;
    }
    *instance = self;
    return CLEARFORM_OK;
}

static void scale_close(void *instance) { free(instance); }
static size_t scale_edit_count(void *instance) { return ((const Instance *)instance)->count; }

static int32_t scale_edit(void *instance, size_t index, ClearformEdit *edit) {
    const Instance *self = instance;
    const ClearformTensorInfo *tensor = &self->file->tensors[self->sources[index]];
    edit->kind = CLEARFORM_EDIT_SCALE;
    edit->component = (ClearformText)CLEARFORM_TEXT("transformer");
    edit->parameter = (ClearformText){tensor->name.data, tensor->name.length - ENDING};
    edit->first_row = CLEARFORM_WHOLE_PARAMETER;
    edit->rows = (uint64_t)tensor->shape[0];
    edit->columns = 1; /* A factor applies to its whole row, so this does not matter. */
    edit->scale = 1.0;
    edit->sources = &self->sources[index], edit->source_count = 1;
    return CLEARFORM_OK;
}

/* Reads the file's tensor, and passes it on to the host, which frees it. */
static int32_t scale_edit_tensors(void *instance, size_t index, ClearformEditTensors *tensors) {
    const Instance *self = instance;
    int32_t status = self->file->read(self->file->context, self->sources[index], &tensors->value);
    return status == CLEARFORM_OK ? CLEARFORM_OK : fail(self->host, "the factors cannot be read");
}

static ClearformText scale_skipped(void *instance, size_t index) {
    return (void)instance, (void)index, (ClearformText){NULL, 0}; /* Nothing is deliberately left out. */
}

static ClearformAdapterTable table = {sizeof table,     0,          scale_open,         scale_close,
                                      scale_edit_count, scale_edit, scale_edit_tensors, scale_skipped};
static ClearformPlugin plugin = {CLEARFORM_ABI_MAJOR, sizeof plugin, CLEARFORM_TEXT(CLEARFORM_ADAPTER_INTERFACE),
                                 &table};
static const ClearformPlugin *exported = &plugin;

const ClearformPlugin *clearform_plugin_v1(const ClearformHost *host) {
    return host->abi_major == CLEARFORM_ABI_MAJOR ? exported : NULL;
}

/* ---- The plugin ends here. The rest is for clearform's tests: builds that write a trace, or violate the interface. */
#define WHEN_LOADED __attribute__((constructor)) static void
#define SPOIL(function, Written, written, harm)                                                                        \
    static int32_t spoilt(void *instance, size_t index, Written *written) {                                            \
        return scale_##function(instance, index, written) == CLEARFORM_OK ? (harm, CLEARFORM_OK) : CLEARFORM_FAILED;   \
    }                                                                                                                  \
    WHEN_LOADED spoil(void) { table.function = spoilt; }
#ifdef TRACE
static void trace(const char *line) { /* Appends it to the file TRACE. */
    FILE *file = fopen(TRACE, "a");
    if (file != NULL) fputs(line, file), fclose(file);
}
WHEN_LOADED trace_loaded(void) { trace("loaded\n"); }
#else
#define trace(line) ((void)0)
#endif
#if defined WRONG_MAJOR
WHEN_LOADED spoil(void) { plugin.abi_major = 99; }
#elif defined WRONG_INTERFACE
WHEN_LOADED spoil(void) { plugin.interface = (ClearformText)CLEARFORM_TEXT(CLEARFORM_BRANCH_INTERFACE); }
#elif defined NULL_PLUGIN
WHEN_LOADED spoil(void) { exported = NULL; }
#elif defined NULL_TABLE
WHEN_LOADED spoil(void) { plugin.table = NULL; }
#elif defined NULL_FUNCTION
WHEN_LOADED spoil(void) { table.edit_tensors = NULL; }
#elif defined SHORT_TABLE
WHEN_LOADED spoil(void) { table.struct_size = 8; }
#elif defined FAIL_OPEN || defined FAIL_SILENTLY
static int32_t refuse(const ClearformHost *host, const ClearformFile *file, void **instance) {
#ifdef FAIL_OPEN
    fail(host, "this build opens nothing");
#endif
    return (void)host, (void)file, (void)instance, CLEARFORM_FAILED;
}
WHEN_LOADED spoil(void) { table.open = refuse; }
#elif defined WRONG_COUNT
static const size_t BEYOND = 1000;
SPOIL(edit, ClearformEdit, edit, edit->sources = &BEYOND)
#elif defined WRONG_SHAPE
SPOIL(edit, ClearformEdit, edit, edit->rows += 1)
#elif defined WRONG_TENSORS
SPOIL(edit_tensors, ClearformEditTensors, tensors, (tensors->up = tensors->value, tensors->value = NULL))
#elif defined BAD_TENSOR
static void (*original_deleter)(DLManagedTensorVersioned *);
static void traced_deleter(DLManagedTensorVersioned *tensor) { trace("freed\n"), original_deleter(tensor); }
SPOIL(edit_tensors, ClearformEditTensors, tensors,
      (tensors->value->version.major = 9, original_deleter = tensors->value->deleter,
       tensors->value->deleter = traced_deleter))
#endif
