// See lora_fusion.h.
#include "lora_fusion.h"

#include <algorithm>

namespace manylora {
namespace {

// An item of shrinking is some rank rows of some tokens of one segment.
constexpr int64_t kItemRanks = 8;
constexpr int64_t kItemTokens = 64;
// With fewer tokens to a segment the time is that of reading B, which is slow in short runs: outputs
// that share a row of B are expanded together, from this many on. y is small then.
constexpr int64_t kManyTokens = 8;
constexpr int64_t kLongRun = 256;

int64_t projections_of(const LoraSegment& segment) {
  return std::max<int64_t>(0, segment.end - segment.start) * std::max<int64_t>(0, segment.rank);
}

int64_t items_of(const LoraSegment& segment) {
  if (projections_of(segment) == 0) return 0;
  return quotient_up(segment.end - segment.start, kItemTokens) *
         quotient_up(segment.rank, kItemRanks);
}

template <typename Count>
int64_t sum(const LoraJob* jobs, int64_t count, const Count& of) {
  int64_t total = 0;
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < jobs[j].count; ++i) total += of(jobs[j].segments[i]);
  return total;
}

}  // namespace

LoraFusion::LoraFusion(const LoraJob* jobs, int64_t count, int isa)
    : jobs_(jobs),
      count_(count),
      kernels_(lora_kernels(isa)),
      projections_(sum(jobs, count, projections_of)),
      items_(sum(jobs, count, items_of)),
      projected_(projections_) {}

void LoraFusion::before(int64_t item) const {
  float* projected = projected_.data();
  for (int64_t j = 0; j < count_; ++j)
    for (int64_t i = 0; i < jobs_[j].count; ++i) {
      const LoraSegment& s = jobs_[j].segments[i];
      const int64_t items = items_of(s);
      if (item >= items) {
        item -= items;
        projected += projections_of(s);
        continue;
      }
      const int64_t across = quotient_up(s.rank, kItemRanks);
      const int64_t begin = s.start + item / across * kItemTokens;
      const int64_t first = item % across * kItemRanks;
      kernels_.shrink(jobs_[j], s, begin, least(begin + kItemTokens, s.end), first,
                      least(first + kItemRanks, s.rank), projected);
      return;
    }
}

void LoraFusion::after(const Outputs& outputs) const {
  const float* projected = projected_.data();
  for (int64_t j = 0; j <= outputs.product && j < count_; ++j)
    for (int64_t i = 0; i < jobs_[j].count; ++i) {
      const LoraSegment& s = jobs_[j].segments[i];
      const int64_t start = std::max(s.start, outputs.token);
      const int64_t end = outputs.tokens < s.end - outputs.token ? outputs.token + outputs.tokens
                                                                  : s.end;
      if (j == outputs.product && start < end && s.rank > 0) {
        LoraSegment part = s;
        part.start = start;
        part.end = end;
        kernels_.expand(jobs_[j], part, projected + (start - s.start) * s.rank, outputs.first,
                        outputs.last);
      }
      projected += projections_of(s);
    }
}

int64_t LoraFusion::outputs_at_once() const {
  int64_t longest = 0;
  for (int64_t j = 0; j < count_; ++j)
    for (int64_t i = 0; i < jobs_[j].count; ++i)
      longest = std::max(longest, jobs_[j].segments[i].end - jobs_[j].segments[i].start);
  return longest < kManyTokens ? kLongRun : 0;
}

int64_t LoraFusion::reads(const Outputs& outputs, LineRun* runs) const {
  int64_t count = 0;
  const LoraJob& job = jobs_[outputs.product];
  for (int64_t i = 0; i < job.count && count < kMostReads; ++i) {
    const LoraSegment& s = job.segments[i];
    if (s.rank <= 0 || s.start >= outputs.token + outputs.tokens || s.end <= outputs.token)
      continue;
    const int64_t bytes = factor_bytes(s.type);
    runs[count++] = lines_of(static_cast<const char*>(s.b) + outputs.first * bytes,
                             (outputs.last - outputs.first) * bytes, s.rank, job.out * bytes);
  }
  return count;
}

}  // namespace manylora
