// The search of selection.h. Compiled once, unlike the passes that it makes.
// Longer than 350 lines: it is one algorithm, and its steps are read together.
#include "kernels/selection.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "kernels/elements.h"

namespace ppkernels {
namespace {

// Note [Selection by a sample]
//
// A sample of the keys says within which two keys, low and high, the k-th largest one lies, but for
// one case in ten thousand. One pass over the tensors then does nearly everything: it sets the bits
// of what is above, counts, and lists the few elements between low and high. Among those the k-th
// largest is found in memory, and their bits are set.
//
// Elements equal to low or high are counted and not listed, since those may be many: zeros, or
// values of a coarse grid. Where the count ends among them, a second pass gives bits to the first
// ones.
//
// Should the sample have misled, the counts say so: the k-th largest lies outside of low and high,
// or too many lie between. Then histograms of keys, each in a pass of its own, narrow the range,
// and the pass is made again. So the sample decides about time, never about the result.

// Below this many candidates a sample costs more than it saves: all of them are listed.
constexpr int64_t kSmall = 2048;

// Elements of one part: what a thread takes at a time. A multiple of 512, so that no two parts
// write to one cache line of a mask.
constexpr int64_t kPart = int64_t(1) << 16;

// Below this many elements one thread does it all, as PyTorch's own elementwise ops have it.
constexpr int64_t kGrain = int64_t(1) << 15;

// How many elements may be listed for a count of `entries`.
int64_t budget(int64_t entries) { return 4096 + entries / 16; }

bool bit(const uint8_t* words, int64_t i) { return (words[i >> 3] >> (i & 7)) & 1; }
void set_bit(uint8_t* words, int64_t i) { words[i >> 3] |= uint8_t(1u << (i & 7)); }
void clear_bit(uint8_t* words, int64_t i) { words[i >> 3] &= uint8_t(~(1u << (i & 7))); }

// ---- one tensor, a part of it, and a selection over some

struct Source {
  explicit Source(const SelectTensor& t)
      : tensor(t), elements(t.type, t.data, t.dims, t.shape, t.strides) {}

  const SelectTensor& tensor;
  Elements elements;
  Ranking ranking{};
  // Whether all elements near the bounds are listed, for their keys to decide: where the keys may
  // not order as |x| does, or where bounds cost more than they save.
  bool by_keys = false;
  SelectBounds bounds{};
};

enum class Ties { kNone, kLow, kHigh };

struct Part {
  size_t source, selection;
  int64_t begin, end;  // elements of the source
  SelectCounts counts{};
  // The elements between the bounds, from `begin` on.
  std::vector<uint32_t> indices{};
  std::vector<uint64_t> keys{};
  // Of the listed elements, those with a key above `last` are to be kept, and `last_quota` of those
  // that have it.
  uint64_t last = ~uint64_t(0);
  int64_t last_quota = 0;
  // Of the elements equal to a bound, `quota` are to be kept.
  Ties ties = Ties::kNone;
  int64_t quota = 0;
};

struct Selection {
  size_t first_source = 0, last_source = 0;
  size_t first_part = 0, last_part = 0;
  int64_t entries = 0, candidates = 0, count = 0;
  bool lists_all = false;
  // The bounds of a pass, and between which keys the count-th largest one is known to be.
  uint64_t low = 0, high = 0, lowest = 0, highest = 0;
  std::atomic<int64_t> listed{0};

  bool is_trivial() const { return count == 0 || count == candidates; }
  bool has_all_listed() const { return listed <= budget(entries); }
};

// What a thread works with.
struct Scratch {
  std::vector<uint32_t> indices = std::vector<uint32_t>(kSelectChunk);
  std::vector<uint64_t> keys = std::vector<uint64_t>(kSelectChunk);
  std::vector<uint64_t> elements = std::vector<uint64_t>(kSelectChunk);
};

// Gathers elements from all over a tensor. A trip to memory brings a few neighbours, and a batch of
// trips is begun before the first one's end is waited for.
class SampleReader {
 public:
  static constexpr int kNeighbours = 4;

  // Keys go to keys[found], and `found` counts them, in several threads.
  SampleReader(const SelectKernels& kernels, uint64_t* keys, std::atomic<int64_t>& found)
      : kernels_(kernels), keys_(keys), found_(found) {}

  // The elements from i on, kNeighbours of them if there are as many.
  void add(const Source& source, int64_t i) {
    if (&source != source_ || count_ + kNeighbours > kBatch) {
      flush();
      source_ = &source;
    }
    const uint8_t* within = source.tensor.within;
    const int64_t end = std::min(i + kNeighbours, source.elements.count());
    for (; i < end; ++i) {
      if (within != nullptr && !bit(within, i)) continue;
      places_[count_] = source.elements.at(i);
      __builtin_prefetch(places_[count_++]);
    }
  }

  void flush() {
    if (count_ == 0) return;
    const auto bytes = (size_t)element_bytes(source_->tensor.type);
    char elements[8 * kBatch];
    for (int k = 0; k < count_; ++k) std::memcpy(elements + k * bytes, places_[k], bytes);
    kernels_.keys(source_->tensor.type, elements, count_, source_->ranking,
                  keys_ + found_.fetch_add(count_));
    count_ = 0;
  }

 private:
  static constexpr int kBatch = 512;

  const SelectKernels& kernels_;
  uint64_t* keys_;
  std::atomic<int64_t>& found_;
  const Source* source_ = nullptr;
  const char* places_[kBatch];
  int count_ = 0;
};

// ---- the search

constexpr int kBins = 4096;

// Passes over the weights at most; a sample that is made to mislead costs a few.
constexpr int kRounds = 100;

// How far keys have to be shifted for a range of them to fit into the bins.
int shift_for(uint64_t low, uint64_t high) {
  int shift = 0;
  while (((high - low) >> shift) >= kBins) ++shift;
  return shift;
}

// Finds the bin of the rank-th largest key, counted from 1, and what rank it has there.
int bin_of(const int64_t* bins, int64_t& rank) {
  int bin = kBins - 1;
  while (bin > 0 && rank > bins[bin]) rank -= bins[bin--];
  return bin;
}

class Search {
 public:
  Search(const SelectKernels& kernels, const std::vector<SelectTensor>& tensors,
         const std::vector<int64_t>& counts, const ParallelFor& parallel_for)
      : kernels_(kernels), parallel_for_(parallel_for),
        selections_(counts.size() == 1 ? 1 : tensors.size()) {
    sources_.reserve(tensors.size());
    for (const SelectTensor& t : tensors) sources_.emplace_back(t);
    for (size_t i = 0; i < selections_.size(); ++i) {
      const bool is_one = selections_.size() == 1;
      prepare(i, is_one ? 0 : i, is_one ? tensors.size() : i + 1, counts[i]);
    }
  }

  int64_t run() {
    parallel_for_((int64_t)selections_.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) bracket(selections_[(size_t)i]);
    });
    std::vector<Selection*> open;
    for (Selection& selection : selections_) open.push_back(&selection);
    // Weights that somebody writes to meanwhile might never agree with themselves.
    for (int round = 0; round < kRounds; ++round) {
      sweep(open);
      const int64_t first_nan = find_nan();
      if (first_nan >= 0) return first_nan;
      std::vector<char> is_done(open.size());
      parallel_for_((int64_t)open.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) is_done[(size_t)i] = conclude(*open[(size_t)i]);
      });
      std::vector<Selection*> missed;
      for (size_t i = 0; i < open.size(); ++i) {
        if (!is_done[i]) missed.push_back(open[i]);
      }
      settle(open);
      if (missed.empty()) return -1;
      for (Selection* selection : missed) {
        if (selection->lowest > selection->highest) return kChanged;
        narrow(*selection);
      }
      open = missed;
    }
    return kChanged;
  }

 private:
  // ---- parts and threads

  void prepare(size_t index, size_t first, size_t last, int64_t count) {
    Selection& s = selections_[index];
    s.first_source = first;
    s.last_source = last;
    s.count = count;
    s.first_part = parts_.size();
    bool by_log = false;
    for (size_t i = first; i < last; ++i) {
      by_log |= sources_[i].tensor.alpha != sources_[first].tensor.alpha;
    }
    for (size_t i = first; i < last; ++i) {
      Source& source = sources_[i];
      const int64_t n = source.elements.count();
      source.ranking = {by_log, source.tensor.alpha};
      source.by_keys = by_log && (source.tensor.type == Type::kFloat64 || n <= 256);
      s.entries += n;
      s.candidates += source.tensor.candidates;
      for (int64_t begin = 0; begin < n; begin += kPart) {
        parts_.push_back({i, index, begin, std::min(begin + kPart, n)});
      }
    }
    s.last_part = parts_.size();
    const double ends[] = {0, HUGE_VAL};
    uint64_t keys[2];
    kernels_.keys(Type::kFloat64, ends, 2, {by_log, 1}, keys);
    s.lowest = s.low = keys[0];
    s.highest = s.high = keys[1];
  }

  // Calls body(part, scratch) for each of them, in threads if they are worth it. A thread takes the
  // next part when it is done with one, so that one which other work holds up keeps nobody waiting.
  template <class Body>
  void each_part(const std::vector<Part*>& parts, const Body& body) {
    int64_t total = 0;
    for (const Part* part : parts) total += part->end - part->begin;
    if (total == 0) return;
    std::atomic<size_t> next{0};
    parallel_for_(total, kGrain, [&](int64_t, int64_t) {
      Scratch scratch;
      for (size_t i = next++; i < parts.size(); i = next++) body(*parts[i], scratch);
    });
  }

  // Calls body(elements, begin, end) for each chunk of a part.
  template <class Body>
  void each_chunk(const Part& part, Scratch& scratch, const Body& body) const {
    const Elements& elements = sources_[part.source].elements;
    for (int64_t begin = part.begin; begin < part.end; begin += kSelectChunk) {
      const int64_t end = std::min(begin + kSelectChunk, part.end);
      body(elements.chunk(begin, end, scratch.elements.data()), begin, end);
    }
  }

  std::vector<Part*> parts_of(const Selection& s) {
    std::vector<Part*> parts;
    for (size_t i = s.first_part; i < s.last_part; ++i) parts.push_back(&parts_[i]);
    return parts;
  }

  // ---- between which keys the count-th largest one probably lies

  static uint64_t scattered(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  // The keys of a few elements of each stretch of `stride`, somewhere in it, in no order.
  std::vector<uint64_t> sampled_keys(const Selection& s) {
    constexpr int kNeighbours = SampleReader::kNeighbours;
    const auto side = (int64_t)std::cbrt((double)s.entries);
    const int64_t size = side * side / 2, stride = s.entries / size;
    std::vector<int64_t> starts;
    int64_t start = 0;
    for (size_t i = s.first_source; i < s.last_source; ++i) {
      starts.push_back(start);
      start += sources_[i].elements.count();
    }
    std::vector<uint64_t> keys((size_t)size * kNeighbours);
    std::atomic<int64_t> found{0};
    parallel_for_(size, kSelectChunk / kNeighbours, [&](int64_t begin, int64_t end) {
      SampleReader reader(kernels_, keys.data(), found);
      size_t k =
          std::upper_bound(starts.begin(), starts.end(), begin * stride) - starts.begin() - 1;
      for (int64_t j = begin; j < end; ++j) {
        const uint64_t place = (scattered((uint64_t)j + 1) >> 32) * (uint64_t)stride >> 32;
        const int64_t i = j * stride + (int64_t)place;
        while (k + 1 < starts.size() && starts[k + 1] <= i) ++k;
        reader.add(sources_[s.first_source + k], (i - starts[k]) / kNeighbours * kNeighbours);
      }
      reader.flush();
    });
    keys.resize((size_t)found);
    return keys;
  }

  void bracket(Selection& s) {
    s.lists_all = s.candidates <= kSmall;
    if (s.lists_all || s.is_trivial()) return;
    std::vector<uint64_t> keys = sampled_keys(s);
    const double share = (double)s.count / (double)s.candidates, size = (double)keys.size();
    const double rank = share * size, margin = 4 * std::sqrt(rank * (1 - share)) + 4;
    // Where the part begins that is not sorted out yet.
    auto begin = keys.begin();
    const auto largest = [&](int64_t i) {
      std::nth_element(begin, keys.begin() + i, keys.end(), std::greater<uint64_t>());
      begin = keys.begin() + i;
      return std::min(*begin, s.highest);
    };
    if (rank - margin >= 0) s.high = largest((int64_t)(rank - margin));
    if (rank + margin + 1 < size) s.low = largest((int64_t)(rank + margin) + 1);
  }

  // ---- the pass

  // The smallest bits of |x| whose key is `key` or larger, one more than those of ∞ without any.
  uint64_t bits_from(const Source& source, uint64_t key) const {
    constexpr int kProbes = 16;
    const Type type = source.tensor.type;
    uint64_t begin = 0, end = infinity(type) + 1, keys[kProbes], bits[kProbes];
    while (begin < end) {
      const uint64_t step = (end - begin + kProbes - 1) / kProbes;
      char probes[8 * kProbes];
      for (int k = 0; k < kProbes; ++k) {
        bits[k] = std::min(begin + (uint64_t)k * step, end - 1);
        const auto half = (uint16_t)bits[k];
        const auto single = (uint32_t)bits[k];
        const int64_t bytes = element_bytes(type);
        const void* from = bytes == 8   ? (void*)&bits[k]
                           : bytes == 4 ? (void*)&single
                                        : (void*)&half;
        std::memcpy(probes + k * bytes, from, (size_t)bytes);
      }
      kernels_.keys(type, probes, kProbes, source.ranking, keys);
      int found = 0;
      while (found < kProbes && keys[found] < key) ++found;
      if (found < kProbes) end = bits[found];
      if (found > 0) begin = bits[found - 1] + 1;
    }
    return end;
  }

  SelectBounds bounds_in(const Selection& s, const Source& source) const {
    const uint64_t end = infinity(source.tensor.type) + 1;
    if (s.count == 0) return {end, end, end, end};
    if (s.is_trivial()) return {0, 0, 0, 0};
    if (s.lists_all || (source.by_keys && source.elements.count() <= 256)) return {0, 0, end, end};
    uint64_t low = bits_from(source, s.low), after_high = bits_from(source, s.high + 1);
    if (source.by_keys) {
      // log2 errs by less than 2^-40, so keys order as |x| does but within 2^-38 of it.
      const uint64_t margin = uint64_t(1) << 16;
      low -= std::min(low, margin);
      after_high = std::min(after_high + margin, end);
      return {low, low, after_high, after_high};
    }
    const uint64_t high = bits_from(source, s.high);
    if (s.low == s.high) return {high, high, high, after_high};
    return {low, bits_from(source, s.low + 1), high, after_high};
  }

  void sweep(const std::vector<Selection*>& open) {
    std::vector<Part*> parts;
    for (Selection* s : open) {
      s->listed = 0;
      for (size_t i = s->first_source; i < s->last_source; ++i) {
        sources_[i].bounds = bounds_in(*s, sources_[i]);
      }
      for (Part* part : parts_of(*s)) parts.push_back(part);
    }
    each_part(parts, [&](Part& part, Scratch& scratch) { sweep_part(part, scratch); });
  }

  void sweep_part(Part& part, Scratch& scratch) {
    const Source& source = sources_[part.source];
    const SelectTensor& t = source.tensor;
    Selection& s = selections_[part.selection];
    part.counts = {};
    part.indices.clear();
    part.keys.clear();
    part.last = ~uint64_t(0);
    part.ties = Ties::kNone;
    each_chunk(part, scratch, [&](const void* elements, int64_t begin, int64_t end) {
      uint8_t* words = t.words + begin / 8;
      SelectCounts found = kernels_.sweep(
          t.type, elements, end - begin, t.within ? t.within + begin / 8 : nullptr, source.ranking,
          source.bounds, words, scratch.indices.data(), scratch.keys.data());
      if (source.by_keys && !s.lists_all) judge(s, found, words, scratch);
      part.counts.at_low += found.at_low;
      part.counts.between += found.between;
      part.counts.at_high += found.at_high;
      part.counts.above += found.above;
      part.counts.has_nan |= found.has_nan;
      if (found.between == 0) return;
      s.listed += found.between;
      if (!s.has_all_listed()) return;
      const size_t listed = part.keys.size(), more = (size_t)found.between;
      part.indices.resize(listed + more);
      for (size_t k = 0; k < more; ++k) {
        part.indices[listed + k] = scratch.indices[k] + (uint32_t)(begin - part.begin);
      }
      // An element is read a second time for its key, and may have been written to meanwhile.
      for (size_t k = 0; k < more; ++k) {
        part.keys.push_back(std::min(std::max(scratch.keys[k], s.low), s.high));
      }
    });
  }

  // Sorts what a chunk lists into the classes that it belongs to by its keys.
  static void judge(const Selection& s, SelectCounts& found, uint8_t* words, Scratch& scratch) {
    int64_t kept = 0;
    for (int64_t k = 0; k < found.between; ++k) {
      const uint64_t key = scratch.keys[(size_t)k];
      const uint32_t i = scratch.indices[(size_t)k];
      if (key >= s.high) {
        set_bit(words, i);
        ++(key == s.high ? found.at_high : found.above);
      } else if (key == s.low) {
        ++found.at_low;
      } else if (key > s.low) {
        scratch.keys[(size_t)kept] = key;
        scratch.indices[(size_t)kept++] = i;
      }
    }
    found.between = kept;
  }

  int64_t find_nan() const {
    for (const Part& part : parts_) {
      if (part.counts.has_nan) return (int64_t)part.source;
    }
    return -1;
  }

  // ---- what follows from the counts of a pass

  // Gives bits to the count-th largest element and all before it, or leaves that to `settle`; or
  // narrows the range and returns false.
  bool conclude(Selection& s) {
    if (s.is_trivial()) return true;
    const std::vector<Part*> parts = parts_of(s);
    SelectCounts all{};
    for (const Part* part : parts) {
      all.at_low += part->counts.at_low;
      all.between += part->counts.between;
      all.at_high += part->counts.at_high;
      all.above += part->counts.above;
    }
    const int64_t rank = s.count - all.above;  // from the elements equal to `high` on
    if (rank < 0) {
      s.lowest = s.high + 1;
      return false;
    }
    if (rank > all.at_high + all.between + all.at_low) {
      s.highest = s.low - 1;
      return false;
    }
    if (rank <= all.at_high) {
      share_out(parts, Ties::kHigh, rank);
      return true;
    }
    const bool is_low = rank > all.at_high + all.between;
    if (!s.has_all_listed()) {
      s.lowest = is_low ? s.low : s.low + 1;
      s.highest = is_low ? s.low : s.high - 1;
      return false;
    }
    keep_listed(s, parts, std::min(rank - all.at_high, all.between));
    if (is_low) share_out(parts, Ties::kLow, rank - all.at_high - all.between);
    return true;
  }

  // The first `quota` of the elements that are equal to a bound are kept.
  static void share_out(const std::vector<Part*>& parts, Ties ties, int64_t quota) {
    for (Part* part : parts) {
      const int64_t count = ties == Ties::kHigh ? part->counts.at_high : part->counts.at_low;
      part->quota = std::min(quota, count);
      quota -= part->quota;
      // The pass has set the bits of those equal to `high`, and none of those equal to `low`.
      const int64_t now = ties == Ties::kHigh ? count : 0;
      if (part->quota != now) part->ties = ties;
    }
  }

  // Finds the last one of the `rank` largest of the listed elements, for `settle` to give them
  // bits.
  static void keep_listed(const Selection& s, const std::vector<Part*>& parts, int64_t rank) {
    if (rank == 0) return;
    uint64_t low = s.low, high = s.high;
    int64_t left = rank;
    if (s.listed > kSmall) {
      std::vector<int64_t> bins(kBins);
      const int shift = shift_for(low, high);
      for (const Part* part : parts) {
        for (uint64_t key : part->keys) ++bins[(key - s.low) >> shift];
      }
      low = s.low + ((uint64_t)bin_of(bins.data(), left) << shift);
      high = low + ((uint64_t(1) << shift) - 1);
    }
    std::vector<uint64_t> keys;
    for (const Part* part : parts) {
      for (uint64_t key : part->keys) {
        if (key >= low && key <= high) keys.push_back(key);
      }
    }
    std::nth_element(keys.begin(), keys.begin() + (left - 1), keys.end(), std::greater<uint64_t>());
    const uint64_t last = keys[(size_t)left - 1];
    int64_t equal = 0;
    for (uint64_t key : keys) {
      left -= key > last;
      equal += key == last;
    }
    for (Part* part : parts) {
      part->last = last;
      part->last_quota = left;
      if (left == equal) continue;
      const int64_t own = std::count(part->keys.begin(), part->keys.end(), last);
      part->last_quota = std::min(left, own);
      left -= part->last_quota;
      equal -= own;
    }
  }

  // ---- bits of what is listed, and of what is equal to a bound

  void settle(const std::vector<Selection*>& open) {
    std::vector<Part*> parts;
    for (Selection* s : open) {
      for (Part* part : parts_of(*s)) {
        if (part->ties != Ties::kNone || !part->keys.empty()) parts.push_back(part);
      }
    }
    each_part(parts, [&](Part& part, Scratch& scratch) {
      settle_listed(part);
      if (part.ties != Ties::kNone) settle_ties(part, scratch);
    });
  }

  void settle_listed(const Part& part) const {
    uint8_t* words = sources_[part.source].tensor.words + part.begin / 8;
    int64_t quota = part.last_quota;
    for (size_t k = 0; k < part.keys.size(); ++k) {
      const uint64_t key = part.keys[k];
      const uint32_t i = part.indices[k];
      // Without a branch: which keys are above is anybody's guess.
      words[i >> 3] |= uint8_t(uint32_t(key > part.last) << (i & 7));
      if (key == part.last && quota-- > 0) set_bit(words, i);
    }
  }

  void settle_ties(const Part& part, Scratch& scratch) const {
    const Source& source = sources_[part.source];
    const SelectTensor& t = source.tensor;
    const Selection& s = selections_[part.selection];
    const bool is_high = part.ties == Ties::kHigh;
    const SelectBounds& b = source.bounds;
    int64_t quota = part.quota;
    each_chunk(part, scratch, [&](const void* elements, int64_t begin, int64_t end) {
      const uint8_t* within = t.within ? t.within + begin / 8 : nullptr;
      uint8_t* words = t.words + begin / 8;
      if (!source.by_keys) {
        quota = kernels_.settle(t.type, elements, end - begin, within, is_high ? b.high : b.low,
                                is_high ? b.after_high : b.after_low, quota, words);
        return;
      }
      uint64_t* keys = scratch.keys.data();
      kernels_.keys(t.type, elements, end - begin, source.ranking, keys);
      for (int64_t i = 0; i < end - begin; ++i) {
        if (keys[i] != (is_high ? s.high : s.low) || (within && !bit(within, i))) continue;
        quota-- > 0 ? set_bit(words, i) : clear_bit(words, i);
      }
    });
  }

  // ---- where the sample has misled

  // Passes of histograms, until few enough keys are left, or one.
  void narrow(Selection& s) {
    s.low = s.lowest;
    s.high = s.highest;
    while (s.low < s.high) {
      std::vector<int64_t> bins(kBins);
      const int shift = shift_for(s.low, s.high);
      int64_t rank = s.count - count_keys(s, shift, bins.data());
      const int bin = bin_of(bins.data(), rank);
      const uint64_t low = s.low + ((uint64_t)bin << shift), width = (uint64_t(1) << shift) - 1;
      if (s.high - low > width) s.high = low + width;
      s.low = low;
      if (bins[(size_t)bin] <= budget(s.entries)) return;
    }
  }

  // Counts the keys of the range in bins, and returns how many lie above it.
  int64_t count_keys(const Selection& s, int shift, int64_t* bins) {
    std::mutex mutex;
    int64_t above = 0;
    each_part(parts_of(s), [&](const Part& part, Scratch& scratch) {
      const Source& source = sources_[part.source];
      std::vector<int64_t> own(kBins);
      int64_t own_above = 0;
      each_chunk(part, scratch, [&](const void* elements, int64_t begin, int64_t end) {
        const uint8_t* within = source.tensor.within;
        uint64_t* keys = scratch.keys.data();
        kernels_.keys(source.tensor.type, elements, end - begin, source.ranking, keys);
        for (int64_t i = 0; i < end - begin; ++i) {
          if (within && !bit(within, begin + i)) continue;
          if (keys[i] > s.high) {
            ++own_above;
          } else if (keys[i] >= s.low) {
            ++own[(keys[i] - s.low) >> shift];
          }
        }
      });
      const std::lock_guard<std::mutex> lock(mutex);
      above += own_above;
      for (int k = 0; k < kBins; ++k) bins[k] += own[(size_t)k];
    });
    return above;
  }

  const SelectKernels& kernels_;
  const ParallelFor& parallel_for_;
  std::vector<Source> sources_;
  std::vector<Selection> selections_;
  std::vector<Part> parts_;
};

}  // namespace

int64_t select_largest(const SelectKernels& kernels, const std::vector<SelectTensor>& tensors,
                       const std::vector<int64_t>& counts, const ParallelFor& parallel_for) {
  return Search(kernels, tensors, counts, parallel_for).run();
}

}  // namespace ppkernels
