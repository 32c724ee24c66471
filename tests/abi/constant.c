/* The plugin "c-constant", the smallest plugin of clearform.branch/1: the file contains a tensor `constant_residual`,
 * (width), which is added to every image token after blocks 0 and 1. To build it:
 * `cc -shared -fPIC -I crates/plugin-abi/include constant.c -o libconstant.so`. */
#include "clearform_plugin.h"

#include <stdlib.h>
#include <string.h>

CLEARFORM_DESCRIPTION("id = 'c-constant'\nversion = '0.1.0'\ninterface = '" CLEARFORM_BRANCH_INTERFACE "'\nabi = 1\n"
                      "summary = 'The same residual for every token'\n"
                      "[[claims]]\nany = ['constant_residual']\n"
                      "[[example]]\nname = 'width 8'\ntensors = { constant_residual = [8] }\n"
                      "base = { family = 'flux', config = {} }\n"
                      "step = { grid = [2, 3], channels = 16, text = [3, 6], pooled = 5, control = [1, 6, 16], "
                      "residuals = [[0, 1]] }\n");

static const char NAME[] = "constant_residual";

typedef struct {
    const ClearformHost *host;
    DLManagedTensorVersioned *constant; /* (width). Owned until close. */
} Instance;

/* A tensor with its shape and values in one allocation. */
typedef struct {
    DLManagedTensorVersioned managed;
    int64_t shape[3];
    unsigned char values[];
} Residual;

static int32_t fail(const ClearformHost *host, const char *reason) {
    host->fail(host->context, (ClearformText){reason, strlen(reason)});
    return CLEARFORM_FAILED;
}

static int32_t constant_open(const ClearformHost *host, const ClearformFile *file, const ClearformBase *base,
                             void **instance) {
    (void)base; /* Any model will do; residuals of the wrong width fail when the host adds them. */
    size_t index = 0;
    while (index < file->tensor_count && (file->tensors[index].name.length != sizeof NAME - 1 ||
                                          memcmp(file->tensors[index].name.data, NAME, sizeof NAME - 1) != 0)) {
        index++;
    }
    if (index == file->tensor_count) return fail(host, "the tensor constant_residual is missing");
    if (file->tensors[index].ndim != 1) return fail(host, "constant_residual: expected one axis, the model's width");
    Instance *self = malloc(sizeof *self);
    if (self == NULL) return fail(host, "out of memory");
    self->host = host;
    if (file->read(file->context, index, &self->constant) != CLEARFORM_OK) {
        free(self);
        return fail(host, "constant_residual cannot be read");
    }
    *instance = self;
    return CLEARFORM_OK;
}

static void constant_close(void *instance) {
    Instance *self = instance;
    if (self->constant->deleter != NULL) self->constant->deleter(self->constant);
    free(self);
}

static int32_t constant_info(void *instance, ClearformBranchInfo *info) {
    (void)instance;
    info->control = CLEARFORM_CONTROL_LATENTS;
    info->channels = 16;
    info->modes = 0;
    info->low = -1.0, info->high = 1.0; /* Pixel values for black and white, as the VAE expects. */
    return CLEARFORM_OK;
}

static void residual_delete(DLManagedTensorVersioned *managed) { free(managed->manager_ctx); }

static int32_t constant_residuals(void *instance, const ClearformStep *step, ClearformGiveResidual give,
                                  void *context) {
    static const uint32_t BLOCKS[] = {0, 1};
    const Instance *self = instance;
    const DLTensor *constant = &self->constant->dl_tensor;
    const int64_t *latents = step->latents->dl_tensor.shape; /* (batch, image tokens, channels) */
    size_t rows = (size_t)latents[0] * (size_t)latents[1];
    size_t row = (size_t)constant->shape[0] * constant->dtype.bits / 8;
    Residual *residual = malloc(sizeof *residual + rows * row);
    if (residual == NULL) return fail(self->host, "out of memory");
    *residual = (Residual){
        .managed = {.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION},
                    .manager_ctx = residual,
                    .deleter = residual_delete,
                    .dl_tensor = {.data = residual->values,
                                  .device = {kDLCPU, 0},
                                  .ndim = 3,
                                  .dtype = constant->dtype,
                                  .shape = residual->shape}},
        .shape = {latents[0], latents[1], constant->shape[0]},
    };
    const unsigned char *from = (const unsigned char *)constant->data + constant->byte_offset;
    for (size_t at = 0; at < rows; at++) memcpy(residual->values + at * row, from, row);
    /* From here on the host owns the residual, whatever it returns. */
    int32_t status = give(context, &residual->managed, BLOCKS, sizeof BLOCKS / sizeof BLOCKS[0]);
    return status == CLEARFORM_OK ? CLEARFORM_OK : fail(self->host, "the host rejected a residual");
}

static const ClearformBranchTable TABLE = {sizeof TABLE,  0,             constant_open,
                                           constant_close, constant_info, constant_residuals};
static const ClearformPlugin PLUGIN = {CLEARFORM_ABI_MAJOR, sizeof PLUGIN, CLEARFORM_TEXT(CLEARFORM_BRANCH_INTERFACE),
                                       &TABLE};

const ClearformPlugin *clearform_plugin_v1(const ClearformHost *host) {
    return host->abi_major == CLEARFORM_ABI_MAJOR ? &PLUGIN : NULL;
}
