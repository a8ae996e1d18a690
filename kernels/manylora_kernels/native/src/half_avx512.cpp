// AVX-512F. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx2,fma")
#endif
#include <immintrin.h>

#include "half.h"

namespace manylora {
namespace {

constexpr int kTileTokens = 12;  // 12 by 32 sums in 24 of the 32 registers
constexpr int kSums = 24;
constexpr int64_t kPanelsAtOnce = 4;

#include "vector_avx512.h"

struct Bfloat16 {
  static constexpr int64_t kTile = kTileHalves;
  static V column(const uint16_t* tile, int, int which) {
    const __m512i both = _mm512_loadu_si512(tile);
    return _mm512_castsi512_ps(which == 0
                                   ? _mm512_slli_epi32(both, 16)
                                   : _mm512_and_si512(both, _mm512_set1_epi32(-65536)));
  }
};

struct Float16 {
  static constexpr int64_t kTile = kTileHalves;
  static V column(const uint16_t* tile, int, int which) {
    return _mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + which * kHalfRows)));
  }
};

struct Int8 {
  static constexpr int64_t kTile = kInt8TileHalves;
  static V column(const uint16_t* tile, int, int which) {
    const auto* bytes = reinterpret_cast<const int8_t*>(tile) + which * kHalfRows;
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
  }
};

#include "half_kernels.h"

}  // namespace

const HalfKernels kHalfAvx512 = {kTileTokens, kPanelsAtOnce, pack, multiply};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
