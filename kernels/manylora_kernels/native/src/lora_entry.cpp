// lora_delta_ as Python calls it through ctypes: how the work is cut up and shared among threads.
#include <algorithm>

#include "lora.h"
#include "runtime.h"

namespace manylora {
namespace {

// Shrink: an item is some rank rows of some tokens of one segment.
constexpr int64_t kItemRanks = 8;
constexpr int64_t kItemTokens = 64;
// Expand: an item is some outputs of all segments, so few that many tokens find their part of B in
// the cache; for few tokens, so many that B is read in long runs.
constexpr int64_t kItemOutputs = 256;
constexpr int64_t kManyTokens = 8;
// Below this many multiply-adds waking a thread costs more than it brings.
constexpr int64_t kSerialWork = 1 << 16;

struct Item {
  int64_t segment;
  int64_t begin;
  int64_t end;
  int64_t first;
  int64_t last;
};

// Shrink items in order, as item(number) -> Item; `count()` of them.
class ShrinkItems {
 public:
  explicit ShrinkItems(const LoraJob& job) : job_(job) {}
  static int64_t of(const LoraSegment& s) {
    if (s.end <= s.start || s.rank <= 0) return 0;
    return quotient_up(s.end - s.start, kItemTokens) * quotient_up(s.rank, kItemRanks);
  }
  int64_t count() const {
    int64_t total = 0;
    for (int64_t i = 0; i < job_.count; ++i) total += of(job_.segments[i]);
    return total;
  }
  Item item(int64_t number) const {
    int64_t i = 0;
    for (; number >= of(job_.segments[i]); ++i) number -= of(job_.segments[i]);
    const LoraSegment& s = job_.segments[i];
    const int64_t across = quotient_up(s.rank, kItemRanks);
    const int64_t begin = s.start + number / across * kItemTokens;
    const int64_t first = number % across * kItemRanks;
    return {i, begin, least(begin + kItemTokens, s.end), first, least(first + kItemRanks, s.rank)};
  }

 private:
  const LoraJob& job_;
};

}  // namespace

const LoraKernels& lora_kernels(int isa) {
#if defined(__x86_64__)
  if (isa == kAvx512) return kLoraAvx512;
  if (isa == kAvx2) return kLoraAvx2;
#endif
  (void)isa;
  return kLoraPortable;
}

bool lora_delta(const LoraJob& job, int isa, int threads) {
  const LoraKernels& kernels = lora_kernels(isa);
  int64_t floats = 0;
  for (int64_t i = 0; i < job.count; ++i)
    floats += (job.segments[i].end - job.segments[i].start) * job.segments[i].rank;
  if (floats == 0) return true;
  const Scratch projected(floats);
  const Scratch offsets_memory(2 * job.count);
  if (projected.data() == nullptr || offsets_memory.data() == nullptr) return false;
  auto* offsets = reinterpret_cast<int64_t*>(offsets_memory.data());
  int64_t offset = 0;
  for (int64_t i = 0; i < job.count; ++i) {
    offsets[i] = offset;
    offset += (job.segments[i].end - job.segments[i].start) * job.segments[i].rank;
  }
  const ShrinkItems shrinks(job);
  const int64_t first_expand = shrinks.count();
  int64_t longest = 0;
  for (int64_t i = 0; i < job.count; ++i)
    longest = std::max(longest, job.segments[i].end - job.segments[i].start);
  const int64_t share = quotient_up(job.out, 2 * threads * kItemOutputs) * kItemOutputs;
  const int64_t outputs = longest < kManyTokens ? share : kItemOutputs;
  const int64_t items = first_expand + quotient_up(job.out, outputs);
  if (floats * (job.in + job.out) < kSerialWork) threads = 1;
  std::atomic<int64_t> shrunk{0};
  // Items are handed out in order, so whoever waits below waits for threads that are at work.
  parallel(threads, items, 1, [&](int, int64_t number, int64_t) {
    if (number < first_expand) {
      const Item item = shrinks.item(number);
      kernels.shrink(job, job.segments[item.segment], item.begin, item.end, item.first, item.last,
                     projected.data() + offsets[item.segment]);
      shrunk.fetch_add(1);
      return;
    }
    while (shrunk.load() < first_expand) {
    }
    const int64_t output = (number - first_expand) * outputs;
    for (int64_t i = 0; i < job.count; ++i)
      if (job.segments[i].rank > 0)
        kernels.expand(job, job.segments[i], projected.data() + offsets[i], output,
                       least(output + outputs, job.out));
  });
  return true;
}

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" {

// y += ... for `count` runs {token start, token end, rank row start, rank row end} over pools of
// rank rows of `type`. Returns 0, 1 where `isa` does not run here, or 2 where memory is short.
int manylora_lora_delta(float* y, int64_t y_stride, const float* x, int64_t x_stride,
                        const void* a, const void* b, int64_t type, int64_t in, int64_t out,
                        const int32_t* runs, const float* weights, int64_t count, int isa,
                        int threads) {
  if (!manylora::runs(isa)) return 1;
  constexpr int64_t kOnStack = 32;
  manylora::LoraSegment some[kOnStack];
  manylora::LoraSegment* segments = some;
  if (count > kOnStack) {
    segments = static_cast<manylora::LoraSegment*>(std::malloc(count * sizeof *segments));
    if (segments == nullptr) return 2;
  }
  for (int64_t i = 0; i < count; ++i)
    segments[i] = manylora::lora_segment(runs + 4 * i, weights[i], type, a, b, in, out);
  const manylora::LoraJob job{segments, count, x, y, in, out, x_stride, y_stride};
  const bool done = manylora::lora_delta(job, isa, threads < 1 ? 1 : threads);
  if (segments != some) std::free(segments);
  return done ? 0 : 2;
}

}  // extern "C"
#pragma GCC visibility pop
