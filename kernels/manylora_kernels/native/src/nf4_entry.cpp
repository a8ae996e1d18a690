// nf4_linear as Python calls it through ctypes: how the work is cut up and shared among threads.
#include "nf4.h"
#include "run_items.h"

namespace manylora {
namespace {

// Tokens whose x is packed at once; bounds the memory beside the result.
constexpr int64_t kChunkTokens = 264;
constexpr int64_t kItemPanels = 8;
// Reading the weights again for a second pass costs less than unpacking them into memory.
constexpr int64_t kFewPasses = 2;
// Most panels that `few` is handed at once, and a multiple of those that it takes side by side.
constexpr int64_t kMostFewPanels = 16;
constexpr int64_t kSharedPanels = 4;
// Below this many floats waking a thread costs more than it brings.
constexpr int64_t kSerialFloats = 32768;

// Jobs over the same x; only their weights, outputs and biases differ.
struct Jobs {
  const Nf4Job* jobs;
  int64_t count;

  const Nf4Job& first() const { return jobs[0]; }
  // At most `tokens` tokens from `token` on.
  Nf4Job part(int64_t number, int64_t token, int64_t tokens) const {
    Nf4Job part = jobs[number];
    part.tokens = least(tokens, part.tokens - token);
    part.x += token * part.w.in;
    part.y += token * part.stride;
    return part;
  }
  PanelItems panels() const {
    PanelItems items(kPanelRows);
    for (int64_t i = 0; i < count; ++i) items.add(jobs[i].w.out);
    return items;
  }
};

// Packs x of a part, beside what is fused.
void pack(const Nf4Kernels& kernels, const Nf4Job& part, int64_t tile_tokens, int threads,
          const Fusion& fusion, float* packed) {
  const int packers = part.tokens * part.w.in > kSerialFloats ? threads : 1;
  const int64_t blocks = quotient_up(part.w.in, kernels.block_columns);
  prepare(packers, blocks, quotient_up(blocks, int64_t{packers} * 4), threads, fusion,
          [&](int64_t first, int64_t last) {
            kernels.pack(part, tile_tokens, first, last, packed);
          });
}

bool run_few(const Nf4Kernels& kernels, const Jobs& all, const Fusion& fusion, int threads) {
  const Nf4Job& job = all.first();
  const int64_t passes = quotient_up(job.tokens, kernels.few_tokens);
  const int64_t most = quotient_up(job.tokens, passes);
  const Scratch packed(most == 1 ? 0 : most * job.w.in);
  if (packed.data() == nullptr) return false;
  PanelItems panels = all.panels();
  // A multiple of the panels that share a pass over x; large, since each item's first bytes are
  // prefetched only by the item before, in the same thread.
  const int64_t share = quotient_up(panels.panels(), int64_t{threads} * 8);
  panels.cut(quotient_up(least(share, kMostFewPanels), kSharedPanels) * kSharedPanels);
  for (int64_t token = 0; token < job.tokens; token += most) {
    const Nf4Job x = all.part(0, token, most);
    const Fusion& now = token == 0 ? fusion : nothing_fused();
    if (x.tokens > 1)
      pack(kernels, x, x.tokens, threads, now, packed.data());
    else
      prepare(1, 0, 1, threads, now, [](int64_t, int64_t) {});
    run_items(threads, panels, token, x.tokens, job.w.in / job.w.segment, fusion,
              [&](int, const PanelItems::Item& item, Ahead& beside) {
                const Nf4Job part = all.part(item.product, token, most);
                kernels.few(part, item.first, item.last,
                            part.tokens > 1 ? packed.data() : part.x, beside);
              });
  }
  return true;
}

bool run_many(const Nf4Kernels& kernels, const Jobs& all, const Fusion& fusion, int threads) {
  const Nf4Job& job = all.first();
  const int64_t chunks = quotient_up(job.tokens, kChunkTokens);
  const int64_t chunk = quotient_up(quotient_up(job.tokens, chunks), kernels.tile_tokens) *
                        kernels.tile_tokens;
  PanelItems panels = all.panels();
  const int64_t share = quotient_up(panels.panels(), int64_t{threads} * 4);
  const int64_t size = quotient_up(least(share, kItemPanels), kernels.panels_at_once) *
                       kernels.panels_at_once;
  panels.cut(size);
  const int64_t floats = many_scratch(kernels, size, least(chunk, job.tokens));
  const Scratch scratch(floats * threads);
  const Scratch packed(least(chunk, job.tokens) * job.w.in);
  if (scratch.data() == nullptr || packed.data() == nullptr) return false;
  for (int64_t token = 0; token < job.tokens; token += chunk) {
    const Nf4Job x = all.part(0, token, chunk);
    pack(kernels, x, kernels.tile_tokens, threads, token == 0 ? fusion : nothing_fused(),
         packed.data());
    run_items(threads, panels, token, x.tokens, 0, fusion,
              [&](int thread, const PanelItems::Item& item, Ahead&) {
                kernels.many(all.part(item.product, token, chunk), item.first, item.last,
                             packed.data(), scratch.data() + thread * floats);
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

bool nf4_linear(const Nf4Job* jobs, int64_t count, const Fusion& fusion, int isa, int threads) {
  const Nf4Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return false;
  if (jobs[0].tokens == 0) return true;
  const Jobs all{jobs, count};
  return jobs[0].tokens <= kFewPasses * kernels->few_tokens
             ? run_few(*kernels, all, fusion, threads)
             : run_many(*kernels, all, fusion, threads);
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
  const bool done =
      manylora::nf4_linear(&job, 1, manylora::nothing_fused(), isa, threads < 1 ? 1 : threads);
  return done ? 0 : 2;
}

}  // extern "C"
#pragma GCC visibility pop
