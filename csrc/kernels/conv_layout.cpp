// Where the pixels of a convolution lie: kernels/conv_layout.h.
#include "kernels/conv_layout.h"

#include <algorithm>

#include "kernels/elements.h"

namespace ppkernels {
namespace {

// Planes of a tile, all channels: an L2. Measured: ops/sparse_conv/README.md.
constexpr int64_t kTileBytes = 1 << 20;

int64_t remainder(int64_t a, int64_t b) { return (a % b + b) % b; }

// Whether the planes are the image.
bool is_plane(const ConvAxis& axis) {
  const PlaneAxis& p = axis.planes;
  return p.first == 0 && p.step == 1 && p.phases == 1 && axis.reach == 0 && p.span == p.size;
}

}  // namespace

// ---- one axis

int64_t ConvAxis::shared() const {
  const int64_t last = planes.first + planes.phases - 1;
  const int64_t before = last < 0 ? divided_up(-last, planes.step) : 0;
  const int64_t left = std::max<int64_t>(planes.size - planes.first, 0);
  const int64_t behind = std::max<int64_t>(planes.span - divided_up(left, planes.step), 0);
  return std::min({before, behind, reach});
}

ConvAxis forward_axis(const Convolution& c, int d) {
  const int64_t reach = c.dilation[d] * (c.kernel[d] - 1);
  ConvAxis axis;
  axis.reach = reach / c.stride[d];
  axis.positions = c.output[d];
  axis.targets = axis.step = 1;
  axis.planes = {c.input[d], -c.padding[d], c.stride[d], std::min(c.stride[d], reach + 1),
                 axis.positions + axis.reach};
  for (int64_t t = 0; t < c.kernel[d]; ++t) {
    const int64_t far = c.dilation[d] * t;
    axis.taps.push_back({far % c.stride[d], far / c.stride[d], 0});
  }
  return axis;
}

// Output pixel y reads the input at s·y + d·t − p, so the input pixel f + s·i gets what output
// pixel i + (f + p − d·t)/s has, for the taps t for which that is a whole number.
ConvAxis grad_input_axis(const Convolution& c, int d) {
  ConvAxis axis;
  axis.step = c.stride[d];
  axis.targets = std::min(c.stride[d], c.input[d]);
  axis.positions = divided_up(c.input[d], c.stride[d]);
  int64_t least = std::numeric_limits<int64_t>::max(), largest = -least;
  for (int64_t t = 0; t < c.kernel[d]; ++t) {
    const int64_t back = c.padding[d] - c.dilation[d] * t;
    const int64_t target = remainder(-back, c.stride[d]), offset = (target + back) / c.stride[d];
    axis.taps.push_back({0, offset, target});
    least = std::min(least, offset);
    largest = std::max(largest, offset);
  }
  for (ConvTap& tap : axis.taps) tap.offset -= least;
  axis.reach = largest - least;
  axis.planes = {c.output[d], least, 1, 1, axis.positions + axis.reach};
  return axis;
}

// ---- the tiles of a product

ConvLayout::ConvLayout(const ConvAxis& y, const ConvAxis& x, int64_t images, int64_t channels,
                       Type type, int lanes, int most)
    : y_(y), x_(x), images_(images) {
  planes_.y = y.planes;
  planes_.x = x.planes;
  planes_.channels = channels;
  planes_.source_image = channels * y.planes.size * x.planes.size;
  planes_.pitch = x.planes.span - x.shared();
  const int64_t height = y.planes.span - y.shared();
  planes_.image = height * planes_.pitch;
  in_place_ = type == Type::kFloat32 && is_plane(y) && is_plane(x);
  choose_tile(height, lanes * most);
  // Vectors, evenly among the passes.
  const int64_t length =
      ((tile_images_ - 1) * height + tile_rows_ - 1) * planes_.pitch + x.positions;
  const int64_t vectors = divided_up(length, lanes);
  line_.passes = divided_up(vectors, most);
  line_.vectors = divided_up(vectors, line_.passes);
  positions_ = line_.passes * line_.vectors * lanes;
  pass_ = line_.vectors * lanes;
  if (in_place_) {
    planes_.plane = planes_.image;
    return;
  }
  // An odd number of cache lines, so that planes do not meet in the same sets.
  const int64_t behind = y.reach * planes_.pitch + x.reach;
  const int64_t needed = std::max(positions_ + behind, tile_images_ * planes_.image);
  planes_.plane = (divided_up(needed, 16) | 1) * 16;
}

const float* ConvLayout::planes_of(const SparseConvKernels& kernels, TypedMemory source,
                                   const ConvTile& tile, float* room) const {
  const int64_t begin = tile.image * planes_.source_image;
  if (in_place_) {
    const int64_t here = begin + tile.y * planes_.pitch;
    const int64_t end = here + (planes_.channels - 1) * planes_.plane + positions_;
    if (end <= images_ * planes_.source_image) return (const float*)source.data + here;
  }
  const char* from = (const char*)source.data + begin * element_bytes(source.type);
  kernels.pack(planes_, source.type, from, tile.images, tile.y, tile.rows + y_.reach, room);
  // Where planes end with the image, passes read on behind the last one.
  if (in_place_) std::fill_n(room + plane_count() * planes_.plane, positions_, 0.0f);
  return room;
}

void ConvLayout::choose_tile(int64_t height, int64_t pass) {
  const int64_t row_bytes = plane_count() * planes_.pitch * 4;
  const int64_t most_rows = kTileBytes / std::max<int64_t>(row_bytes, 1);
  tile_images_ = 1;
  tile_rows_ = y_.positions;
  tiles_down_ = 1;
  if (in_place_) return;
  if (most_rows >= y_.planes.span) {
    // As many small images as fill a pass.
    const int64_t room = std::min(pass / planes_.image, most_rows / height);
    const int64_t groups = divided_up(std::max<int64_t>(images_, 1), std::max<int64_t>(room, 1));
    tile_images_ = divided_up(std::max<int64_t>(images_, 1), groups);
    return;
  }
  // Half of a pass at least, so that its vectors are worth their entries.
  const int64_t least = divided_up(pass / 2, planes_.pitch);
  const int64_t rows =
      std::clamp(most_rows - y_.reach, std::min(least, y_.positions), y_.positions);
  tiles_down_ = divided_up(y_.positions, rows);
  tile_rows_ = divided_up(y_.positions, tiles_down_);
  tiles_down_ = divided_up(y_.positions, tile_rows_);
}

}  // namespace ppkernels
