// Convolutions by a sparse weight, on top of the passes of sparse_conv.h: where pixels and entries
// lie, tiles, threads.
//
// Compiled once: it knows neither instruction sets nor torch, and gets its threads from the caller.
// How it goes about it: Note [Lines of pixels] in sparse_conv.h, Note [Tiles] in convolution.cpp.
#pragma once

#include <stdint.h>

#include "kernels/indices.h"
#include "kernels/parallel.h"
#include "kernels/sparse_conv.h"

namespace ppkernels {

// Sizes as (vertical, horizontal). Strides and dilations are positive, no other number is negative;
// output = (input + 2·padding − dilation·(kernel − 1) − 1) / stride + 1, rounded down.
struct Convolution {
  // Of the batch; C; N.
  int64_t images, channels, features;
  int64_t input[2], output[2], kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
};

struct TypedMemory {
  Type type;  // float32 or bfloat16
  const void* data;
};

struct MutableMemory {
  Type type;
  void* data;
};

// Each returns whether it was done: not where the planes of one row of pixels, with all channels,
// exceed 2^31 numbers; nothing is written then. Images are contiguous, [B][C][Y][X]. The result
// depends on the arguments alone, not on threads. Products are added up in float32.

// y = x ∗ θ + b; `bias` is float32 [N], or null.
bool convolution(const SparseConvKernels& kernels, const Convolution& sizes, TypedMemory input,
                 TypedMemory values, const SparseIndices& indices, const float* bias,
                 MutableMemory output, const ParallelFor& parallel_for);

// ∂L/∂x, of which all is written. `indices` are those of the transposed topology, of C·taps rows,
// and entry e of them is entry order[e] of `values`.
bool convolution_grad_input(const SparseConvKernels& kernels, const Convolution& sizes,
                            TypedMemory grad_output, TypedMemory values,
                            const SparseIndices& indices, const int32_t* order,
                            MutableMemory grad_input, const ParallelFor& parallel_for);

// ∂L/∂values. Where an input or a gradient is not finite, so may be the sums of other entries of
// its channel, and where images are read in place of channels in front of it: numbers behind the
// end of an image row, and of an image, are multiplied by 0.
bool convolution_grad_values(const SparseConvKernels& kernels, const Convolution& sizes,
                             TypedMemory grad_output, TypedMemory input,
                             const SparseIndices& indices, MutableMemory grad_values,
                             const ParallelFor& parallel_for);

}  // namespace ppkernels
