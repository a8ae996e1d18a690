// AVX-512F. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx2,fma")
#endif
#include <immintrin.h>

#include "attention.h"

namespace manylora {
namespace {

constexpr int kRowTile = 12;  // 12 by 32 scores in 24 of the 32 registers
constexpr int kSums = 24;
constexpr int kValueColumns = 4;

#include "vector_avx512.h"
#include "vector_math.h"

#include "attention_tile.h"

#include "attention_kernels.h"

}  // namespace

const AttentionKernels kAttentionAvx512 = {scratch_floats, attend, attend_part, combine};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
