// nf4_linear in eight bits as Python calls it through ctypes: which kernels, and how the work is
// shared among threads.
#include <algorithm>

#include "int8.h"
#include "run_items.h"

#if MANYLORA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace manylora {
namespace {

// Below this many floats waking a thread costs more than it brings.
constexpr int64_t kSerialFloats = 32768;
// From here on AMX is faster: it computes 16 tokens as fast as one.
constexpr int64_t kAmxTokens = 15;

const Int8Kernels* kernels_of(int isa, [[maybe_unused]] bool amx) {
  if (!runs(isa)) return nullptr;
#if MANYLORA_AMX
  if (isa == kAvx512 && amx) return &kInt8Amx;
#endif
#if defined(__x86_64__)
  if (isa == kAvx512 && __builtin_cpu_supports("avx512vnni")) return &kInt8Vnni;
  if (isa == kAvx512 || isa == kAvx2) return &kInt8Avx2;
#endif
  return &kInt8Portable;
}

bool run(const Int8Kernels& kernels, const Nf4Job* jobs, int64_t count, const Fusion& fusion,
         int threads) {
  const Nf4Job& job = jobs[0];
  const int64_t in = job.w.in, segments = in / job.w.segment;
  // Tiles of even sizes, except where they are padded.
  const int64_t tiles = quotient_up(job.tokens, kernels.tile_tokens);
  const int64_t size = kernels.padded ? kernels.tile_tokens : quotient_up(job.tokens, tiles);
  const int64_t tokens = kernels.padded ? tiles * size : job.tokens;
  int64_t scratch_floats = 0;
  PanelItems panels(kPanelRows);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bytes = kernels.scratch_bytes(jobs[i].w);
    scratch_floats = std::max(scratch_floats, quotient_up(bytes, 64) * 16);
    panels.add(jobs[i].w.out);
  }
  const Scratch q(quotient_up(tokens * in, 4)), scale(tokens * segments);
  const Scratch balance(tokens * segments), scratch(scratch_floats * threads);
  if (q.data() == nullptr || scale.data() == nullptr || balance.data() == nullptr ||
      scratch.data() == nullptr)
    return false;
  const Int8Activations x = {size, reinterpret_cast<int8_t*>(q.data()), scale.data(),
                             reinterpret_cast<int32_t*>(balance.data())};
  const int sharers = job.tokens * in > kSerialFloats ? threads : 1;
  prepare(sharers, segments, quotient_up(segments, int64_t{sharers} * 2), threads, fusion,
          [&](int64_t first, int64_t last) { kernels.quantize(job, first, last, x); });
  // A multiple of the panels that share a pass over x.
  constexpr int64_t kShared = 4;
  const int64_t share = quotient_up(panels.panels(), int64_t{threads} * 8);
  panels.cut(quotient_up(least(share, kernels.item_panels), kShared) * kShared);
  run_items(threads, panels, 0, job.tokens, 0, fusion,
            [&](int thread, const PanelItems::Item& item, Ahead&) {
              kernels.rows(jobs[item.product], x, item.first, item.last,
                           scratch.data() + thread * scratch_floats);
            });
  return true;
}

}  // namespace

bool nf4_linear_int8(const Nf4Job* jobs, int64_t count, const Fusion& fusion, int isa, bool amx,
                     int threads) {
  const Int8Kernels* kernels = kernels_of(isa, amx && jobs[0].tokens >= kAmxTokens);
  if (kernels == nullptr) return false;
  return jobs[0].tokens == 0 || run(*kernels, jobs, count, fusion, threads);
}

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" {

// Whether this process may use AMX's eight-bit products; asks the system for it.
int manylora_amx() {
#if MANYLORA_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return manylora::runs(manylora::kAvx512) && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-tile") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

// Returns 0, 1 where `isa` does not run here, or 2 where memory is short. `amx`: what manylora_amx
// said, or 0; used with AVX-512 only.
int manylora_nf4_linear_int8(const manylora::Nf4Matrix* w, const float* x, int64_t tokens,
                             const float* bias, float* y, int isa, int amx, int threads) {
  if (!manylora::runs(isa)) return 1;
  const int64_t stride = manylora::quotient_up(w->out, manylora::kPanelRows) * manylora::kPanelRows;
  const manylora::Nf4Job job{*w, x, y, bias, tokens, stride};
  const bool done = manylora::nf4_linear_int8(&job, 1, manylora::nothing_fused(), isa, amx != 0,
                                              threads < 1 ? 1 : threads);
  return done ? 0 : 2;
}

}  // extern "C"
#pragma GCC visibility pop
