// AVX2 with FMA. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#include "attention.h"

namespace manylora {
namespace {

constexpr int kRowTile = 6;  // 6 by 16 scores in 12 of the 16 registers
constexpr int kSums = 12;
constexpr int kValueColumns = 2;

#include "vector_avx2.h"
#include "vector_math.h"

#include "attention_tile.h"

#include "attention_kernels.h"

}  // namespace

const AttentionKernels kAttentionAvx2 = {scratch_floats, attend, attend_part, combine};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
