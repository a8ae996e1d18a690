// The library's own state, and what Python asks it first.
#include "runtime.h"

namespace manylora {

std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<float> scratch_fill{0.0f};
std::atomic<bool> fill_scratch{false};

bool runs(int isa) {
  switch (isa) {
    case kPortable:
      return true;
#if defined(__x86_64__)
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#endif
    default:
      return false;
  }
}

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" {

// Raised with every change of this interface: a stale build is refused, not called.
int manylora_interface() { return 7; }

// Whether this processor runs instruction set `isa`: 0 portable, 1 AVX2 with FMA, 2 AVX-512 (F, BW).
int manylora_supports(int isa) { return manylora::runs(isa); }

void manylora_use_gomp_parallel(void* entry) {
  manylora::gomp_parallel.store(reinterpret_cast<manylora::GompParallel>(entry));
}

void manylora_fill_scratch(int on, float value) {
  manylora::scratch_fill.store(value);
  manylora::fill_scratch.store(on != 0);
}

}  // extern "C"
#pragma GCC visibility pop
