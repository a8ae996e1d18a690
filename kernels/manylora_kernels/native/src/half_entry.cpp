// half_linear as C++ and Python call it: how the work is cut up and shared among threads.
#include "arena.h"
#include "half.h"
#include "run_items.h"

namespace manylora {
namespace {

// Tokens whose x is packed at once: a segment of them stays in the second-level cache.
constexpr int64_t kChunkTokens = 264;
constexpr int64_t kItemPanels = 16;
// Below this many floats waking a thread costs more than it brings.
constexpr int64_t kSerialFloats = 32768;

const HalfKernels* kernels_of(int isa) {
  if (!runs(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == kAvx512) return &kHalfAvx512;
  if (isa == kAvx2) return &kHalfAvx2;
#endif
  return &kHalfPortable;
}

}  // namespace

int half_linear(const HalfJob* jobs, int64_t count, const Fusion& fusion, int isa, int threads) {
  const HalfKernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return 1;
  const HalfJob& job = jobs[0];
  if (job.tokens == 0) return 0;
  threads = threads < 1 ? 1 : threads;
  const int64_t chunks = quotient_up(job.tokens, kChunkTokens);
  const int64_t chunk = quotient_up(quotient_up(job.tokens, chunks), kernels->tile_tokens) *
                        kernels->tile_tokens;
  const int64_t columns = quotient_up(job.in, 2) * 2;
  static thread_local Arena arena;
  float* packed = reinterpret_cast<float*>(
      arena.reserve(least(chunk, job.tokens) * columns * int64_t{sizeof(float)}));
  if (packed == nullptr) return 2;
  PanelItems panels(kHalfRows);
  for (int64_t i = 0; i < count; ++i) panels.add(jobs[i].out);
  const int64_t share = quotient_up(panels.panels(), int64_t{threads} * 8);
  panels.cut(quotient_up(least(share, kItemPanels), kernels->panels_at_once) *
             kernels->panels_at_once);
  const auto part_of = [&](int64_t number, int64_t token) {
    HalfJob part = jobs[number];
    part.tokens = least(chunk, part.tokens - token);
    part.x += token * part.x_stride;
    part.y += token * part.out;
    return part;
  };
  for (int64_t token = 0; token < job.tokens; token += chunk) {
    const HalfJob x = part_of(0, token);
    const int packers = x.tokens * job.in > kSerialFloats ? threads : 1;
    prepare(packers, quotient_up(x.tokens, kernels->tile_tokens), 1, threads,
            token == 0 ? fusion : nothing_fused(),
            [&](int64_t first, int64_t last) { kernels->pack(x, first, last, packed); });
    run_items(threads, panels, token, x.tokens, 0, fusion,
              [&](int, const PanelItems::Item& item, Ahead&) {
                kernels->multiply(part_of(item.product, token), item.first, item.last, packed);
              });
  }
  return 0;
}

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" int manylora_half_linear(const manylora::HalfJob* job, int isa, int threads) {
  return manylora::half_linear(job, 1, manylora::nothing_fused(), isa, threads);
}
#pragma GCC visibility pop
