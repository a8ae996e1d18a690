// nf4_linear as Python calls it through ctypes: how the work is cut up and shared among threads.
#include "nf4.h"
#include "runtime.h"

namespace manylora {
namespace {

// Tokens whose x is packed at once; bounds the memory beside the result.
constexpr int64_t kChunkTokens = 264;
constexpr int64_t kItemPanels = 8;
// Below this many floats waking a thread costs more than it brings.
constexpr int64_t kSerialFloats = 32768;

bool run_few(const Nf4Kernels& kernels, const Nf4Job& job, int threads) {
  const int64_t panels = quotient_up(job.w.out, kPanelRows);
  const int64_t floats = 2 * kPanelRows * (job.w.in / job.w.segment);
  const Scratch scratch(floats * threads);
  if (scratch.data() == nullptr) return false;
  // Even, since two panels share a pass over x.
  const int64_t size = 2 * least(quotient_up(panels, int64_t{threads} * 8), 2);
  parallel(threads, panels, size, [&](int thread, int64_t first, int64_t last) {
    kernels.few(job, first, last, scratch.data() + thread * floats);
  });
  return true;
}

bool run_many(const Nf4Kernels& kernels, const Nf4Job& job, int threads) {
  const int64_t panels = quotient_up(job.w.out, kPanelRows);
  const int64_t floats = kernels.panels_at_once * kPanelRows *
                         (kernels.block_columns + kernels.block_columns / kTileColumns);
  const int64_t chunks = quotient_up(job.tokens, kChunkTokens);
  const int64_t chunk = quotient_up(quotient_up(job.tokens, chunks), kernels.tile_tokens) *
                        kernels.tile_tokens;
  const Scratch scratch(floats * threads);
  const Scratch packed(least(chunk, job.tokens) * job.w.in);
  if (scratch.data() == nullptr || packed.data() == nullptr) return false;
  const int64_t share = quotient_up(panels, int64_t{threads} * 4);
  const int64_t size = quotient_up(least(share, kItemPanels), kernels.panels_at_once) *
                       kernels.panels_at_once;
  for (int64_t token = 0; token < job.tokens; token += chunk) {
    Nf4Job part = job;
    part.tokens = least(chunk, job.tokens - token);
    part.x += token * job.w.in;
    part.y += token * job.stride;
    const int64_t tiles = quotient_up(part.tokens, kernels.tile_tokens);
    const int packers = part.tokens * job.w.in > kSerialFloats ? threads : 1;
    parallel(packers, tiles, 1, [&](int, int64_t first, int64_t last) {
      kernels.pack(part, first, last, packed.data());
    });
    parallel(threads, panels, size, [&](int thread, int64_t first, int64_t last) {
      kernels.many(part, first, last, packed.data(), scratch.data() + thread * floats);
    });
  }
  return true;
}

const Nf4Kernels* kernels_of(int isa) {
  if (!runs(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == kAvx512) return &kNf4Avx512;
  if (isa == kAvx2) return &kNf4Avx2;
#endif
  return &kNf4Portable;
}

}  // namespace

bool nf4_linear(const Nf4Job& job, int isa, int threads) {
  const Nf4Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return false;
  if (job.tokens == 0 || job.w.out == 0) return true;
  return job.tokens <= kernels->few_tokens ? run_few(*kernels, job, threads)
                                           : run_many(*kernels, job, threads);
}

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" {

// Returns 0, 1 where `isa` does not run here, or 2 where memory is short.
int manylora_nf4_linear(const manylora::Nf4Matrix* w, const float* x, int64_t tokens,
                        const float* bias, float* y, int isa, int threads) {
  if (!manylora::runs(isa)) return 1;
  const int64_t stride = manylora::quotient_up(w->out, manylora::kPanelRows) * manylora::kPanelRows;
  const manylora::Nf4Job job{*w, x, y, bias, tokens, stride};
  return manylora::nf4_linear(job, isa, threads < 1 ? 1 : threads) ? 0 : 2;
}

}  // extern "C"
#pragma GCC visibility pop
