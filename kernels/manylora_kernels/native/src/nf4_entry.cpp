// nf4_linear as Python calls it through ctypes: how the work is cut up and shared among threads.
#include "nf4.h"
#include "runtime.h"

namespace manylora {
namespace {

// Tokens whose x is packed at once; bounds the memory beside the result.
constexpr int64_t kChunkTokens = 264;
constexpr int64_t kItemPanels = 8;
// Most panels that `few` is handed at once, and a multiple of those that it takes side by side.
constexpr int64_t kMostFewPanels = 16;
constexpr int64_t kSharedPanels = 4;
// Below this many floats waking a thread costs more than it brings.
constexpr int64_t kSerialFloats = 32768;

void pack(const Nf4Kernels& kernels, const Nf4Job& job, int64_t tile_tokens, int threads,
          float* packed) {
  const int packers = job.tokens * job.w.in > kSerialFloats ? threads : 1;
  const int64_t blocks = quotient_up(job.w.in, kernels.block_columns);
  parallel(packers, blocks, quotient_up(blocks, int64_t{packers} * 4),
           [&](int, int64_t first, int64_t last) {
             kernels.pack(job, tile_tokens, first, last, packed);
           });
}

bool run_few(const Nf4Kernels& kernels, const Nf4Job& job, int threads) {
  const int64_t panels = quotient_up(job.w.out, kPanelRows);
  const Scratch packed(job.tokens == 1 ? 0 : job.tokens * job.w.in);
  if (packed.data() == nullptr) return false;
  if (job.tokens > 1) pack(kernels, job, job.tokens, threads, packed.data());
  const float* x = job.tokens == 1 ? job.x : packed.data();
  // A multiple of the panels that share a pass over x; large, since each item's first bytes are
  // prefetched only by the item before, in the same thread.
  const int64_t share = quotient_up(panels, int64_t{threads} * 8);
  const int64_t size = quotient_up(least(share, kMostFewPanels), kSharedPanels) * kSharedPanels;
  parallel(threads, panels, size, [&](int, int64_t first, int64_t last) {
    kernels.few(job, first, last, x);
  });
  return true;
}

bool run_many(const Nf4Kernels& kernels, const Nf4Job& job, int threads) {
  const int64_t panels = quotient_up(job.w.out, kPanelRows);
  const int64_t chunks = quotient_up(job.tokens, kChunkTokens);
  const int64_t chunk = quotient_up(quotient_up(job.tokens, chunks), kernels.tile_tokens) *
                        kernels.tile_tokens;
  const int64_t share = quotient_up(panels, int64_t{threads} * 4);
  const int64_t size = quotient_up(least(share, kItemPanels), kernels.panels_at_once) *
                       kernels.panels_at_once;
  const int64_t floats = many_scratch(kernels, size, least(chunk, job.tokens));
  const Scratch scratch(floats * threads);
  const Scratch packed(least(chunk, job.tokens) * job.w.in);
  if (scratch.data() == nullptr || packed.data() == nullptr) return false;
  for (int64_t token = 0; token < job.tokens; token += chunk) {
    Nf4Job part = job;
    part.tokens = least(chunk, job.tokens - token);
    part.x += token * job.w.in;
    part.y += token * job.stride;
    pack(kernels, part, kernels.tile_tokens, threads, packed.data());
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
