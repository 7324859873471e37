// Where the pixels of a convolution lie: axes, planes, lines and tiles. Compiled once.
#pragma once

#include <stdint.h>

#include <limits>
#include <vector>

#include "kernels/convolution.h"

namespace ppkernels {

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- one axis

// Where an entry of this position in the kernel reads, and whose sums it belongs to.
struct ConvTap {
  int64_t phase, offset;  // of the planes
  int64_t target;         // the phase of the pixels it is for; none if it is not below `targets`
};

struct ConvAxis {
  PlaneAxis planes;
  std::vector<ConvTap> taps;
  // The largest offset; positions of the line; phases of the pixels that are written to, and how
  // far apart the pixels of a phase are.
  int64_t reach, positions, targets, step;

  // Positions at the end of a row that may be the first ones of the next: 0 in both, in all phases.
  int64_t shared() const;
};

ConvAxis forward_axis(const Convolution& sizes, int d);
ConvAxis grad_input_axis(const Convolution& sizes, int d);

// ---- the tiles of a product

struct ConvTile {
  int64_t image, images, y, rows;
};

class ConvLayout {
 public:
  // For `images` images with `channels` channels of this type, and passes of `most` vectors at
  // most. The axes must outlive it.
  ConvLayout(const ConvAxis& y, const ConvAxis& x, int64_t images, int64_t channels, Type type,
             int lanes, int most);

  // Whether all addresses of a tile are int32.
  bool fits() const { return floats() < std::numeric_limits<int32_t>::max(); }
  // Of the planes of a tile, and what passes read behind them.
  int64_t floats() const { return plane_count() * planes_.plane + positions_; }
  int64_t plane_count() const { return planes_.channels * phases(); }
  int64_t phases() const { return y_.planes.phases * x_.planes.phases; }

  int64_t tiles() const { return divided_up(images_, tile_images_) * tiles_down_; }
  ConvTile tile(int64_t index) const {
    const int64_t image = index / tiles_down_ * tile_images_;
    const int64_t y = index % tiles_down_ * tile_rows_;
    return {image, std::min(tile_images_, images_ - image), y,
            std::min(tile_rows_, y_.positions - y)};
  }

  const Planes& planes() const { return planes_; }
  const Line& line() const { return line_; }
  int64_t positions() const { return positions_; }  // of all passes
  int64_t pass() const { return pass_; }            // of one
  // What a pass reads of a channel.
  int64_t pass_bytes() const {
    return phases() * std::min(planes_.plane, pass_ + y_.reach * planes_.pitch + x_.reach) * 4;
  }

  // Where (channel, tap) lies, from an output pixel.
  int64_t address(int64_t channel, const ConvTap& y, const ConvTap& x) const {
    const int64_t plane = (channel * y_.planes.phases + y.phase) * x_.planes.phases + x.phase;
    return plane * planes_.plane + y.offset * planes_.pitch + x.offset;
  }

  // The planes of a tile: `source` itself, or a copy in `room`, which has floats() numbers.
  const float* planes_of(const SparseConvKernels& kernels, TypedMemory source, const ConvTile& tile,
                         float* room) const;

 private:
  void choose_tile(int64_t height, int64_t pass);

  const ConvAxis &y_, &x_;
  int64_t images_, tile_images_, tile_rows_, tiles_down_, positions_, pass_;
  bool in_place_;
  Planes planes_;
  Line line_;
};

}  // namespace ppkernels
