// The passes of a convolution by a sparse weight: images into planes, a tile of pixels times rows
// of entries, and back. On raw memory, each call in one thread.
//
// Note [Lines of pixels]
//
// A convolution is the product of a sparse matrix and a panel (kernels/panel.h) whose lanes are
// pixels. Images are copied into planes, one for each channel, with the padding written out, so
// that the pixels that an output pixel needs lie at distances from it that depend on the entry
// alone: an entry is one address, and consecutive output pixels read consecutive numbers.
//
// Output pixels are numbered along the rows of a plane, one pitch from row to row. That is a line.
// It runs on behind the last pixel of a row, through positions whose sums mean nothing and are
// dropped when the line is written to the image; it runs through as many rows, or whole images, as
// a tile has. A pass is a part of the line, some vectors long, that stays in registers while a row
// of entries goes by.
//
// With a stride s, the image is split into s·s planes, phases, of every s-th pixel; the gradient of
// the input writes to such phases. Where the image itself is such a plane (1×1, stride 1, no
// padding, float32) nothing is copied.
#pragma once

#include <stdint.h>

#include "kernels/isa.h"

namespace ppkernels {

// How the positions of a plane lie in the image, along one axis: position i of phase f is the pixel
// first + f + step·i, and 0 where that is outside of 0 ... size − 1.
struct PlaneAxis {
  int64_t size, first, step, phases;
  // Positions that there are.
  int64_t span;
};

struct Planes {
  PlaneAxis y, x;
  int64_t channels;
  // In the source: from image to image. Channels are contiguous, one after the other.
  int64_t source_image;
  // From row to row, from image to image, and from plane to plane; the plane of channel c and phase
  // (f, h) is number (c·y.phases + f)·x.phases + h. A pitch may be less than x.span, and the images
  // as close, where positions that are shared by neighbours are 0 for both.
  int64_t pitch, image, plane;
};

// Entries of rows, by segments: row r has in block b the entries segments[r·(blocks + 1) + b] to
// where b + 1 begins.
struct Entries {
  const int32_t *segments, *addresses;
  const float* values;  // of no entry for `sample`
  int64_t blocks;
};

// Vectors begin ... begin + vectors − 1 of a line, `passes` times.
struct Line {
  int64_t passes, vectors;
};

// Where a line goes: rows of entries r = (channel·y_phases + f)·x_phases + h hold the pixels
// (f + y_step·i, h + x_step·j) of a channel.
struct Pixels {
  void* out;  // the first image of the tile
  Type type;
  int64_t height, width, channels;
  int64_t y_phases, y_step, x_phases, x_step;
  // The tile's: its images, the first position i and how many of them; pitches as of its planes.
  int64_t images, y, rows, pitch, image;
};

struct SparseConvKernels {
  // Floats of a vector, and the most vectors of a pass.
  int lanes, accumulate_vectors, sample_vectors;

  // Copies the positions y ... y + rows − 1 of `images` images at `source`, of float32 or bfloat16,
  // into planes; what the rows leave of a plane becomes 0. Writes channels·phases·plane floats.
  void (*pack)(const Planes& planes, Type type, const void* source, int64_t images, int64_t y,
               int64_t rows, float* to);

  // For the rows of entries of the output channels begin ... end − 1: the line's sums, from `bias`
  // (null: 0) on, written to the pixels. `stage` has room for the rows of a channel, or with
  // several blocks of all these channels: a pass each, and a vector more in the end.
  // What is written depends on the entries, the blocks and the line's vectors.
  void (*correlate)(const Entries& entries, const float* planes, const Line& line,
                    const Pixels& pixels, const float* bias, int64_t begin, int64_t end,
                    float* stage);

  // For the rows begin ... end − 1: out[e] += Σ gradient · operand of entry e, over the line. The
  // gradient of row r begins at gradients + (r − begin)·gradient_plane, and is 0 wherever the line
  // has no pixel; the operands there must be finite, or the sums are NaN.
  void (*sample)(const Entries& entries, const float* planes, const Line& line,
                 const float* gradients, int64_t gradient_plane, int64_t begin, int64_t end,
                 float* out);

  // n numbers, float32 or bfloat16, as float32.
  void (*widen)(Type type, const void* from, float* to, int64_t n);

  // to[i] = Σ_k parts[k·stride + i], i < n, in order of k, rounded once to the type.
  void (*total)(Type type, const float* parts, int64_t count, int64_t stride, void* to, int64_t n);
};

// The kernels of one instruction set, which must be available.
const SparseConvKernels& sparse_conv_kernels(Isa isa);

}  // namespace ppkernels
