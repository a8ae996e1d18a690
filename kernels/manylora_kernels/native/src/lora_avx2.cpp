// AVX2 with FMA and F16C. Compiled for it whatever the command line says, and called only where it
// runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "lora.h"

namespace manylora {
namespace {

#include "vector_avx2.h"
#include "vector_math.h"
#include "widen_avx2.h"

constexpr int kShrinkTokens = 2;
constexpr int kShrinkRanks = 4;
constexpr int kExpandTokens = 2;
constexpr int kExpandVectors = 4;

#include "lora_kernels.h"

}  // namespace

const LoraKernels kLoraAvx2 = {shrink, expand};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
