// AVX2 with FMA and F16C, which every processor with AVX2 has. Compiled for it whatever the command
// line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "half.h"

namespace manylora {
namespace {

constexpr int kTileTokens = 6;  // 6 by 16 sums in 12 of the 16 registers
constexpr int kSums = 12;
constexpr int64_t kPanelsAtOnce = 4;

#include "vector_avx2.h"

struct Bfloat16 {
  static constexpr int64_t kTile = kTileHalves;
  static V column(const uint16_t* tile, int row, int which) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 2 * row));
    return _mm256_castsi256_ps(which == 0
                                   ? _mm256_slli_epi32(both, 16)
                                   : _mm256_and_si256(both, _mm256_set1_epi32(-65536)));
  }
};

struct Float16 {
  static constexpr int64_t kTile = kTileHalves;
  static V column(const uint16_t* tile, int row, int which) {
    return _mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + which * kHalfRows + row)));
  }
};

struct Int8 {
  static constexpr int64_t kTile = kInt8TileHalves;
  static V column(const uint16_t* tile, int row, int which) {
    const auto* bytes = reinterpret_cast<const int8_t*>(tile) + which * kHalfRows + row;
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
  }
};

#include "half_kernels.h"

}  // namespace

const HalfKernels kHalfAvx2 = {kTileTokens, kPanelsAtOnce, pack, multiply};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
