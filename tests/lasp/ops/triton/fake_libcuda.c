/* A CUDA driver library without a GPU: it writes down what a kernel is launched with.

   Tensor maps hold the arguments they were encoded from. */

#include "cuda.h"
#include <stdint.h>
#include <string.h>

#define MAX_PARAMS 128

struct launch {
  uint32_t grid[3], block[3], shared, attributes, num_params, padding;
  uint64_t function, stream;
  unsigned char values[MAX_PARAMS][128];
} last_launch;

struct map {
  uint32_t kind[6], box[4], steps[4];
  uint64_t address, dims[4], strides[3];
};
_Static_assert(sizeof(struct map) <= sizeof(CUtensorMap), "a map of four dimensions fits");

static uint64_t sizes[MAX_PARAMS];
static uint32_t num_sizes;

/* The sizes of the parameters of all kernels, from now on. */
void set_sizes(const uint64_t *given, uint32_t count) {
  num_sizes = count;
  memcpy(sizes, given, count * sizeof(uint64_t));
}

static void write_down(CUfunction f, CUstream stream, void **params) {
  last_launch.function = (uint64_t)f;
  last_launch.stream = (uint64_t)stream;
  last_launch.num_params = num_sizes;
  memset(last_launch.values, 0, sizeof(last_launch.values));
  for (uint32_t i = 0; i < num_sizes; i++)
    memcpy(last_launch.values[i], params[i], sizes[i]);
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream stream,
                        void **params, void **extra) {
  uint32_t sizes_of[7] = {gx, gy, gz, bx, by, bz, shared};
  memcpy(last_launch.grid, sizes_of, sizeof(sizes_of));
  last_launch.attributes = 0;
  write_down(f, stream, params);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params,
                          void **extra) {
  memcpy(last_launch.grid, config, 7 * sizeof(uint32_t));
  last_launch.attributes = config->numAttrs;
  write_down(f, config->hStream, params);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t *offset, size_t *size) {
  if (index >= num_sizes)
    return CUDA_ERROR_INVALID_VALUE;
  *offset = 0;
  *size = sizes[index];
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *dims,
                                const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  struct map written = {{type, rank, interleave, swizzle, promotion, fill}};
  if (rank > 4 || (uint64_t)map % 64)
    return CUDA_ERROR_INVALID_VALUE;
  written.address = (uint64_t)address;
  memcpy(written.dims, dims, rank * sizeof(*dims));
  memcpy(written.strides, strides, (rank - 1) * sizeof(*strides));
  memcpy(written.box, box, rank * sizeof(*box));
  memcpy(written.steps, steps, rank * sizeof(*steps));
  memset(map, 0, sizeof(*map));
  memcpy(map, &written, sizeof(written));
  return CUDA_SUCCESS;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  ((struct map *)map)->address = (uint64_t)address;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13020;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error";
  return CUDA_SUCCESS;
}
