// lora_delta_ as Python calls it through ctypes: how the work is cut up and shared among threads.
#include <algorithm>

#include "lora_fusion.h"

namespace manylora {
namespace {

// An item is some outputs of all segments, so few that many tokens find their part of B in the
// cache; for few tokens, so many that B is read in long runs.
constexpr int64_t kItemOutputs = 256;
constexpr int64_t kManyTokens = 8;
// Below this many multiply-adds waking a thread costs more than it brings.
constexpr int64_t kSerialWork = 1 << 16;

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
  const LoraFusion work(&job, 1, isa);
  if (!work.has_memory()) return false;
  const int64_t shrinks = work.items_before();
  if (shrinks == 0) return true;
  int64_t longest = 0;
  for (int64_t i = 0; i < job.count; ++i)
    longest = std::max(longest, job.segments[i].end - job.segments[i].start);
  const int64_t share = quotient_up(job.out, 2 * threads * kItemOutputs) * kItemOutputs;
  const int64_t outputs = longest < kManyTokens ? share : kItemOutputs;
  const int64_t items = shrinks + quotient_up(job.out, outputs);
  if (work.projections() * (job.in + job.out) < kSerialWork) threads = 1;
  std::atomic<int64_t> shrunk{0};
  // Items are handed out in order, so whoever waits below waits for threads that are at work.
  parallel(threads, items, 1, [&](int, int64_t number, int64_t) {
    if (number < shrinks) {
      work.before(number);
      shrunk.fetch_add(1);
      return;
    }
    while (shrunk.load() < shrinks) {
    }
    const int64_t output = (number - shrinks) * outputs;
    work.after({0, 0, INT64_MAX, output, least(output + outputs, job.out)});
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
