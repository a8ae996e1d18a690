// half_linear as C++ and Python call it: how the work is cut up and shared among threads.
#include "arena.h"
#include "half.h"

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

int half_linear(const HalfJob& job, int isa, int threads) {
  const HalfKernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return 1;
  if (job.tokens == 0 || job.out == 0) return 0;
  threads = threads < 1 ? 1 : threads;
  const int64_t panels = quotient_up(job.out, kHalfRows);
  const int64_t chunks = quotient_up(job.tokens, kChunkTokens);
  const int64_t chunk = quotient_up(quotient_up(job.tokens, chunks), kernels->tile_tokens) *
                        kernels->tile_tokens;
  const int64_t columns = quotient_up(job.in, 2) * 2;
  static thread_local Arena arena;
  float* packed = reinterpret_cast<float*>(
      arena.reserve(least(chunk, job.tokens) * columns * int64_t{sizeof(float)}));
  if (packed == nullptr) return 2;
  const int64_t share = quotient_up(panels, int64_t{threads} * 8);
  const int64_t size = quotient_up(least(share, kItemPanels), kernels->panels_at_once) *
                       kernels->panels_at_once;
  for (int64_t token = 0; token < job.tokens; token += chunk) {
    HalfJob part = job;
    part.tokens = least(chunk, job.tokens - token);
    part.x += token * job.x_stride;
    part.y += token * job.out;
    const int64_t tiles = quotient_up(part.tokens, kernels->tile_tokens);
    const int packers = part.tokens * job.in > kSerialFloats ? threads : 1;
    parallel(packers, tiles, 1, [&](int, int64_t first, int64_t last) {
      kernels->pack(part, first, last, packed);
    });
    parallel(threads, panels, size, [&](int, int64_t first, int64_t last) {
      kernels->multiply(part, first, last, packed);
    });
  }
  return 0;
}

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" int manylora_half_linear(const manylora::HalfJob* job, int isa, int threads) {
  return manylora::half_linear(*job, isa, threads);
}
#pragma GCC visibility pop
