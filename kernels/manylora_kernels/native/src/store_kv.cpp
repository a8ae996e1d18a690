// The write to the paged cache.
#include <cstring>

#include "attention.h"
#include "runtime.h"

namespace manylora {
namespace {

// Tokens that a thread copies at once; fewer are not worth waking another.
constexpr int64_t kTokensAtOnce = 32;

}  // namespace

AttentionStatus store_kv(const StoreJob& job, int threads) {
  for (int64_t t = 0; t < job.tokens; ++t)
    if (job.positions[t] < 0 || job.positions[t] >= job.places) return kBadIndex;
  const int64_t k_bytes = job.key_dim * job.item_bytes;
  const int64_t v_bytes = job.value_dim * job.item_bytes;
  parallel(threads, job.tokens, kTokensAtOnce, [&](int, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t head = 0; head < job.kv_heads; ++head) {
        const int64_t at = job.positions[t] * job.kv_heads + head;
        std::memcpy(job.k_cache + at * k_bytes,
                    job.k + (t * job.k_token_stride + head * job.k_head_stride) * job.item_bytes,
                    static_cast<size_t>(k_bytes));
        std::memcpy(job.v_cache + at * v_bytes,
                    job.v + (t * job.v_token_stride + head * job.v_head_stride) * job.item_bytes,
                    static_cast<size_t>(v_bytes));
      }
  });
  return kDone;
}

}  // namespace manylora
