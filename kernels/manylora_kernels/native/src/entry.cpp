// What Python calls through ctypes: the choice of instruction set, threads and scratch memory.
#include <atomic>
#include <cstdlib>

#include "nf4.h"

namespace manylora {
namespace {

// The GNU OpenMP entry point that torch itself uses, so that no second team of threads exists.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<GompParallel> gomp_parallel{nullptr};
// The tests set it to NaN: nothing may be read that was not written.
std::atomic<float> scratch_fill{0.0f};
std::atomic<bool> fill_scratch{false};

// Tokens whose x is packed at once; bounds the memory beside the result.
constexpr int64_t kChunkTokens = 264;
constexpr int64_t kItemPanels = 8;
constexpr size_t kAlignment = 64;
// Below this many floats waking a thread costs more than it brings.
constexpr int64_t kSerialFloats = 32768;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const size_t bytes = quotient_up(floats * int64_t{sizeof(float)}, kAlignment) * kAlignment;
    data_ = static_cast<float*>(std::aligned_alloc(kAlignment, bytes == 0 ? kAlignment : bytes));
    if (data_ != nullptr && fill_scratch.load())
      for (int64_t i = 0; i < floats; ++i) data_[i] = scratch_fill.load();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Items [0, count) of `size` units each, taken by whichever thread is free. Which thread takes
// which item, or how many there are, changes no result.
template <typename Work>
struct Region {
  const Work& work;
  int64_t units;
  int64_t size;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};

  static void run(void* self) {
    auto& region = *static_cast<Region*>(self);
    const int thread = region.threads.fetch_add(1);
    for (;;) {
      const int64_t first = region.next.fetch_add(1) * region.size;
      if (first >= region.units) return;
      region.work(thread, first, least(first + region.size, region.units));
    }
  }
};

template <typename Work>
void parallel(int threads, int64_t units, int64_t size, const Work& work) {
  Region<Work> region{work, units, size};
  const GompParallel start = gomp_parallel.load();
  if (threads > 1 && start != nullptr && units > size) {
    start(Region<Work>::run, &region, static_cast<unsigned>(threads), 0);
  } else {
    Region<Work>::run(&region);
  }
}

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
  switch (isa) {
    case 0:
      return &kNf4Portable;
#if defined(__x86_64__)
    case 1:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kNf4Avx2 : nullptr;
    case 2:
      return __builtin_cpu_supports("avx512f") ? &kNf4Avx512 : nullptr;
#endif
    default:
      return nullptr;
  }
}

}  // namespace
}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" {

// Raised with every change of this interface: a stale build is refused, not called.
int manylora_interface() { return 1; }

// Whether this processor runs instruction set `isa`: 0 portable, 1 AVX2 with FMA, 2 AVX-512F.
int manylora_supports(int isa) { return manylora::kernels_of(isa) != nullptr; }

void manylora_use_gomp_parallel(void* entry) {
  manylora::gomp_parallel.store(reinterpret_cast<manylora::GompParallel>(entry));
}

void manylora_fill_scratch(int on, float value) {
  manylora::scratch_fill.store(value);
  manylora::fill_scratch.store(on != 0);
}

// Returns 0, 1 where `isa` does not run here, or 2 where memory is short.
int manylora_nf4_linear(const manylora::Nf4Matrix* w, const float* x, int64_t tokens,
                        const float* bias, float* y, int isa, int threads) {
  const manylora::Nf4Kernels* kernels = manylora::kernels_of(isa);
  if (kernels == nullptr) return 1;
  if (tokens == 0 || w->out == 0) return 0;
  const int64_t stride = manylora::quotient_up(w->out, manylora::kPanelRows) * manylora::kPanelRows;
  const manylora::Nf4Job job{*w, x, y, bias, tokens, stride};
  threads = threads < 1 ? 1 : threads;
  const bool done = tokens <= kernels->few_tokens ? manylora::run_few(*kernels, job, threads)
                                                  : manylora::run_many(*kernels, job, threads);
  return done ? 0 : 2;
}

}  // extern "C"
#pragma GCC visibility pop
