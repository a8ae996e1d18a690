// AVX2 with FMA. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#include "nf4.h"

namespace manylora {
namespace {

#include "vector_avx2.h"
#include "panel_avx2.h"

constexpr int kFewTokens = 4;
constexpr int kTileTokens = 6;  // 6 by 16 sums in 12 of the 16 registers
constexpr int kPanelsAtOnce = 1;
constexpr int64_t kBlockColumns = 256;  // 16 KiB unpacked, half of a small L1

constexpr int few_panels_at_once(int tokens) { return tokens <= 2 ? 2 : 1; }

// No AVX2 instruction looks up 16 floats, but pshufb looks up 16 bytes, 32 times: the code book is
// held as its four byte planes, and the bytes found are woven into floats.
struct Code {
  __m256i plane[4];

  explicit Code(const float* code) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i)
      for (int b = 0; b < 4; ++b)
        bytes[b][i] = reinterpret_cast<const uint8_t*>(code)[4 * i + b];
    for (int b = 0; b < 4; ++b)
      plane[b] = _mm256_broadcastsi128_si256(
          _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b])));
  }

  void unpack(const uint8_t* dwords, int half, V out[4]) const {
    // Four rows to a 128-bit lane: byte b of each row first, then byte b + 1 of each.
    const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                             0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dwords));
    q = _mm256_shuffle_epi8(q, by_byte);
    if (half == 0) q = _mm256_srli_epi32(q, 4);
    q = _mm256_and_si256(q, _mm256_set1_epi8(15));
    const __m256i b0 = _mm256_shuffle_epi8(plane[0], q);
    const __m256i b1 = _mm256_shuffle_epi8(plane[1], q);
    const __m256i b2 = _mm256_shuffle_epi8(plane[2], q);
    const __m256i b3 = _mm256_shuffle_epi8(plane[3], q);
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1);
    const __m256i low23 = _mm256_unpacklo_epi8(b2, b3);
    const __m256i high01 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i high23 = _mm256_unpackhi_epi8(b2, b3);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
  }
};

#include "nf4_kernels.h"

}  // namespace

const Nf4Kernels kNf4Avx2 = {kFewTokens, kTileTokens, kPanelsAtOnce, kBlockColumns,
                             pack,       few,         many};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
