// The products of convolution.h. Compiled once, unlike the passes that they make.
// Longer than 350 lines: entries, tasks and the three products are one plan, read together.
#include "kernels/convolution.h"

#include <algorithm>
#include <vector>

#include "kernels/conv_layout.h"
#include "kernels/cuts.h"
#include "kernels/elements.h"
#include "kernels/scratch.h"

// Note [Tiles]
//
// A tile is some rows of one image, or some whole small images. A task is a tile times a part of
// the rows of entries, which are cut only where there are few tiles. A thread takes neighbouring
// tasks, copies each tile into planes once, and takes its rows of entries through it, pass by pass.
//
// Within a pass the entries of a row may go channel block by channel block, so that the planes of a
// block stay in L1 while all rows go by; sums wait in a stage meanwhile. That pays where a row has
// enough entries in a block.
//
// For ∂L/∂values, tiles are shared out to a few slots with sums of their own, however many threads
// there are; the slots' sums are added in order.

namespace ppkernels {
namespace {

// Measured, both: ops/sparse_conv/README.md.
// Of the planes of a tile, what a block of channels has in a pass: two thirds of an L1 of 48
// kilobytes.
constexpr int64_t kBlockBytes = 32 << 10;
// A row has so many entries in a block on average, or there is one block.
constexpr int64_t kBlockEntries = 6;
// Enough tasks to be shared out evenly.
constexpr int64_t kTasks = 32;
// A row of entries costs as much as these entries besides.
constexpr int64_t kRowEntries = 6;
// For ∂L/∂values.
constexpr int64_t kSlots = 8;
constexpr int64_t kSlotBytes = int64_t(64) << 20;

// ---- memory

// What a thread needs for its tiles.
thread_local Scratch plane_scratch, stage_scratch;

// ---- entries

// Entries by segments, as sparse_conv.h has them, and what they are made of.
struct Program {
  std::vector<int32_t> segments, addresses;
  std::vector<float> owned;
  const float* values = nullptr;
  int64_t blocks = 1, channels_of_block = 0;

  // Blocks of the channels that rows read, for `rows` rows.
  Program(const ConvLayout& layout, int64_t rows, int64_t count) {
    const int64_t channels = layout.planes().channels;
    const int64_t in_block = std::max<int64_t>(kBlockBytes / layout.pass_bytes(), 1);
    channels_of_block = std::max<int64_t>(channels, 1);
    if (in_block < channels && count * in_block >= kBlockEntries * rows * channels) {
      blocks = divided_up(channels, in_block);
      channels_of_block = divided_up(channels, blocks);
      blocks = divided_up(channels, channels_of_block);
    }
    segments.resize(size_t(rows * (blocks + 1)));
    addresses.resize(size_t(count));
  }

  Entries entries() const { return {segments.data(), addresses.data(), values, blocks}; }
};

// The address of each number that stands in `columns`: (channel, tap) for the rows of the weight,
// and also for the transposed topology, whose channels are features.
std::vector<int32_t> table_of(const ConvLayout& layout, const ConvAxis& y, const ConvAxis& x) {
  std::vector<int32_t> table;
  table.reserve(size_t(layout.planes().channels) * y.taps.size() * x.taps.size());
  for (int64_t channel = 0; channel < layout.planes().channels; ++channel) {
    for (const ConvTap& down : y.taps) {
      for (const ConvTap& across : x.taps)
        table.push_back(int32_t(layout.address(channel, down, across)));
    }
  }
  return table;
}

template <class Body>
void with_columns(const SparseIndices& indices, const Body& body) {
  if (indices.wide) return body((const int32_t*)indices.columns);
  body((const uint16_t*)indices.columns);
}

// Rows for one thread at least, where the work is that of a few thousand entries.
int64_t grain_of(int64_t rows, int64_t count) {
  return std::max<int64_t>(1, rows * 8192 / std::max<int64_t>(count, 1));
}

Program forward_program(const ConvLayout& layout, const ConvAxis& y, const ConvAxis& x,
                        int64_t rows, const SparseIndices& indices,
                        const ParallelFor& parallel_for) {
  Program p(layout, rows, indices.count);
  const std::vector<int32_t> table = table_of(layout, y, x);
  const int64_t limit = p.channels_of_block * int64_t(y.taps.size() * x.taps.size());
  with_columns(indices, [&](const auto* columns) {
    parallel_for(rows, grain_of(rows, indices.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        int32_t* segment = p.segments.data() + r * (p.blocks + 1);
        int32_t e = indices.offsets[r];
        const int32_t last = indices.offsets[r + 1];
        for (int64_t b = 0; b < p.blocks; ++b) {
          segment[b] = e;
          for (; e < last && int64_t(columns[e]) < (b + 1) * limit; ++e)
            p.addresses[size_t(e)] = table[size_t(columns[e])];
        }
        segment[p.blocks] = last;
      }
    });
  });
  return p;
}

// Rows (channel, phase): of each channel, the entries of the taps of that phase, block by block,
// within a block tap by tap. Values are gathered into that order.
class GradInputProgram {
 public:
  GradInputProgram(const ConvLayout& layout, const ConvAxis& y, const ConvAxis& x,
                   const SparseIndices& indices, const int32_t* order, const float* values)
      : y_(y), x_(x), indices_(indices), order_(order), values_(values),
        table_(table_of(layout, y, x)), phases_(y.targets * x.targets),
        taps_(int64_t(y.taps.size() * x.taps.size())) {}

  void write(Program& p, int64_t channels, const ParallelFor& parallel_for) const {
    p.owned.resize(size_t(indices_.count));
    p.values = p.owned.data();
    with_columns(indices_, [&](const auto* columns) {
      parallel_for(channels, grain_of(channels, indices_.count), [&](int64_t begin, int64_t end) {
        std::vector<int32_t> next(static_cast<size_t>(taps_));
        for (int64_t c = begin; c < end; ++c) write_channel(p, c, columns, next);
      });
    });
  }

 private:
  template <class Index>
  void write_channel(Program& p, int64_t channel, const Index* columns,
                     std::vector<int32_t>& next) const {
    const int32_t* ends = indices_.offsets + channel * taps_;
    std::copy_n(ends, taps_, next.begin());
    int32_t written = ends[0];
    for (int64_t phase = 0; phase < phases_; ++phase) {
      int32_t* segment = p.segments.data() + (channel * phases_ + phase) * (p.blocks + 1);
      for (int64_t b = 0; b < p.blocks; ++b) {
        segment[b] = written;
        const int64_t limit = (b + 1) * p.channels_of_block * taps_;
        for (int64_t t = 0; t < taps_; ++t) {
          if (phase_of(t) != phase) continue;
          int32_t e = next[size_t(t)];
          for (; e < ends[t + 1] && int64_t(columns[e]) < limit; ++e, ++written) {
            p.addresses[size_t(written)] = table_[size_t(columns[e])];
            p.owned[size_t(written)] = values_[order_[e]];
          }
          next[size_t(t)] = e;
        }
      }
      segment[p.blocks] = written;
    }
  }

  // The number of the phase that a tap is for, or −1.
  int64_t phase_of(int64_t t) const {
    const int64_t width = int64_t(x_.taps.size());
    const int64_t down = y_.taps[size_t(t / width)].target;
    const int64_t across = x_.taps[size_t(t % width)].target;
    return down < y_.targets && across < x_.targets ? down * x_.targets + across : -1;
  }

  const ConvAxis &y_, &x_;
  const SparseIndices& indices_;
  const int32_t* order_;
  const float* values_;
  std::vector<int32_t> table_;
  int64_t phases_, taps_;
};

// Values as float32: themselves, or a copy in `room`.
const float* widened(const SparseConvKernels& kernels, TypedMemory values, int64_t count,
                     std::vector<float>& room) {
  if (values.type == Type::kFloat32) return (const float*)values.data;
  room.resize(size_t(count));
  kernels.widen(values.type, values.data, room.data(), count);
  return room.data();
}

// ---- tasks

// body(outer, begin, end) for rows begin ... end − 1 of each of `outers`, all rows of all of them:
// the rows in parts, so that there are enough tasks.
template <class Body>
void for_each_task(int64_t outers, const Cuts& cut, const ParallelFor& parallel_for,
                   const Body& body) {
  const int64_t parts = int64_t(cut.size()) - 1;
  parallel_for(outers * parts, 1, [&](int64_t begin, int64_t end) {
    auto thread = body();
    for (int64_t task = begin; task < end;) {
      const int64_t outer = task / parts, last = std::min(end, (outer + 1) * parts);
      const int64_t from = cut[size_t(task % parts)];
      const int64_t to = cut[size_t(last - outer * parts)];
      if (from < to) thread(outer, from, to);
      task = last;
    }
    plane_scratch.trim();
    stage_scratch.trim();
  });
}

// Of `outers` times these rows, enough tasks.
Cuts task_cuts(const RowCosts& costs, int64_t outers) {
  const int64_t wanted = divided_up(kTasks, std::max<int64_t>(outers, 1));
  return equal_cuts(costs, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(costs.rows, 1)));
}

// All tiles of `source` times the entries, into the pixels of `out`.
void correlate(const SparseConvKernels& kernels, const ConvLayout& layout, const Program& program,
               const ConvAxis& y, const ConvAxis& x, TypedMemory source, const float* bias,
               const RowCosts& costs, const int64_t* size, MutableMemory out,
               const ParallelFor& parallel_for) {
  const int64_t channels = costs.rows, rows = y.targets * x.targets;
  const int64_t staged = program.blocks == 1 ? rows : rows * channels;
  for_each_task(layout.tiles(), task_cuts(costs, layout.tiles()), parallel_for, [&] {
    float* const planes = plane_scratch.floats(layout.floats());
    float* const stage = stage_scratch.floats(staged * layout.pass() + kernels.lanes);
    return [&, planes, stage](int64_t index, int64_t begin, int64_t end) {
      const ConvTile tile = layout.tile(index);
      const int64_t image = channels * size[0] * size[1];
      const Pixels pixels = {(char*)out.data + tile.image * image * element_bytes(out.type),
                             out.type,
                             size[0],
                             size[1],
                             channels,
                             y.targets,
                             y.step,
                             x.targets,
                             x.step,
                             tile.images,
                             tile.y,
                             tile.rows,
                             layout.planes().pitch,
                             layout.planes().image};
      kernels.correlate(program.entries(), layout.planes_of(kernels, source, tile, planes),
                        layout.line(), pixels, bias, begin, end, stage);
    };
  });
}

}  // namespace

bool convolution(const SparseConvKernels& kernels, const Convolution& sizes, TypedMemory input,
                 TypedMemory values, const SparseIndices& indices, const float* bias,
                 MutableMemory output, const ParallelFor& parallel_for) {
  if (sizes.images == 0 || sizes.features == 0) return true;
  const ConvAxis y = forward_axis(sizes, 0), x = forward_axis(sizes, 1);
  const ConvLayout layout(y, x, sizes.images, sizes.channels, input.type, kernels.lanes,
                          kernels.accumulate_vectors);
  if (!layout.fits()) return false;
  Program program = forward_program(layout, y, x, sizes.features, indices, parallel_for);
  program.values = widened(kernels, values, indices.count, program.owned);
  const RowCosts costs = {indices.offsets, sizes.features, kRowEntries};
  correlate(kernels, layout, program, y, x, input, bias, costs, sizes.output, output, parallel_for);
  return true;
}

bool convolution_grad_input(const SparseConvKernels& kernels, const Convolution& sizes,
                            TypedMemory grad_output, TypedMemory values,
                            const SparseIndices& indices, const int32_t* order,
                            MutableMemory grad_input, const ParallelFor& parallel_for) {
  if (sizes.images == 0 || sizes.channels == 0) return true;
  const ConvAxis y = grad_input_axis(sizes, 0), x = grad_input_axis(sizes, 1);
  const ConvLayout layout(y, x, sizes.images, sizes.features, grad_output.type, kernels.lanes,
                          kernels.accumulate_vectors);
  if (!layout.fits()) return false;
  Program program(layout, sizes.channels * y.targets * x.targets, indices.count);
  std::vector<float> room;
  GradInputProgram(layout, y, x, indices, order, widened(kernels, values, indices.count, room))
      .write(program, sizes.channels, parallel_for);
  const RowCosts costs = {indices.offsets, sizes.channels, kRowEntries * y.targets * x.targets,
                          sizes.taps()};
  correlate(kernels, layout, program, y, x, grad_output, nullptr, costs, sizes.input, grad_input,
            parallel_for);
  return true;
}

bool convolution_grad_values(const SparseConvKernels& kernels, const Convolution& sizes,
                             TypedMemory grad_output, TypedMemory input,
                             const SparseIndices& indices, MutableMemory grad_values,
                             const ParallelFor& parallel_for) {
  const int64_t count = indices.count;
  if (count == 0) return true;
  const ConvAxis y = forward_axis(sizes, 0), x = forward_axis(sizes, 1);
  const ConvLayout layout(y, x, sizes.images, sizes.channels, input.type, kernels.lanes,
                          kernels.sample_vectors);
  if (!layout.fits()) return false;
  const Program program = forward_program(layout, y, x, sizes.features, indices, parallel_for);
  // The gradient along the lines, 0 where they have no pixel: planes without padding.
  Planes lines = layout.planes();
  lines.y = {sizes.output[0], 0, 1, 1, sizes.output[0]};
  lines.x = {sizes.output[1], 0, 1, 1, sizes.output[1]};
  lines.plane = std::max(layout.positions(), layout.planes().image);
  const int64_t pixels = sizes.output[0] * sizes.output[1];
  lines.source_image = sizes.features * pixels;

  const int64_t tiles = layout.tiles();
  const int64_t slots = std::clamp<int64_t>(kSlotBytes / (4 * count), 1,
                                            std::max<int64_t>(std::min(kSlots, tiles), 1));
  std::vector<float> sums(size_t(slots * count));
  const RowCosts costs = {indices.offsets, sizes.features, kRowEntries};
  for_each_task(slots, task_cuts(costs, slots), parallel_for, [&] {
    float* const planes = plane_scratch.floats(layout.floats());
    float* const gradients = stage_scratch.floats(sizes.features * lines.plane);
    return [&, planes, gradients](int64_t slot, int64_t begin, int64_t end) {
      for (int64_t t = slot * tiles / slots; t < (slot + 1) * tiles / slots; ++t) {
        const ConvTile tile = layout.tile(t);
        const float* from = layout.planes_of(kernels, input, tile, planes);
        Planes here = lines;
        here.channels = end - begin;
        const int64_t first = tile.image * lines.source_image + begin * pixels;
        kernels.pack(here, grad_output.type,
                     (const char*)grad_output.data + first * element_bytes(grad_output.type),
                     tile.images, tile.y, tile.rows, gradients);
        kernels.sample(program.entries(), from, layout.line(), gradients, lines.plane, begin, end,
                       sums.data() + slot * count);
      }
    };
  });
  const int64_t bytes = element_bytes(grad_values.type);
  parallel_for(count, 1 << 15, [&](int64_t begin, int64_t end) {
    kernels.total(grad_values.type, sums.data() + begin, slots, count,
                  (char*)grad_values.data + begin * bytes, end - begin);
  });
  return true;
}

}  // namespace ppkernels
