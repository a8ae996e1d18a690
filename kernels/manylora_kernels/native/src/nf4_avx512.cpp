// AVX-512F. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma")
#endif
#include <immintrin.h>

#include "nf4.h"

namespace manylora {
namespace {

#include "vector_avx512.h"
#include "panel_avx512.h"

constexpr int kFewTokens = 24;  // 24 sums, and the totals in memory
constexpr int kTileTokens = 12;  // 12 by 32 sums in 24 of the 32 registers
constexpr int kPanelsAtOnce = 2;
constexpr int64_t kBlockColumns = 128;  // 16 KiB unpacked, half of a small L1

// Panels side by side: enough independent sums to hide the latency of each.
constexpr int few_panels_at_once(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }

// One register holds the code book, and vpermps looks at the low four bits of an index only.
struct Code {
  __m512 book;

  explicit Code(const float* code) : book(_mm512_loadu_ps(code)) {}

  void unpack(const uint8_t* dwords, int half, V out[4]) const {
    const __m512i q = _mm512_loadu_si512(dwords);
    const int first = half == 0 ? 4 : 0;
    out[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, first), book);
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, first + 8), book);
    out[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, first + 16), book);
    out[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, first + 24), book);
  }
};

#include "nf4_kernels.h"

}  // namespace

const Nf4Kernels kNf4Avx512 = {kFewTokens, kTileTokens, kPanelsAtOnce, kBlockColumns,
                               pack,       few,         many};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
