// AVX2 with FMA. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#include "int8.h"

namespace manylora {
namespace {

#include "vector_avx2.h"
#include "panel_avx2.h"

constexpr int kTileTokens = 4;
constexpr bool kBalanced = false;

constexpr int panels_at_once(int tokens) { return tokens == 1 ? 2 : 1; }

void round_code(const float* code, int8_t* book);

using I = __m256i;
inline I broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }
inline V to_float(I sum) { return _mm256_cvtepi32_ps(sum); }

struct W {
  __m256i value;
  __m256i size;  // |value|
};

// vpmaddubsw multiplies unsigned with signed: |w| with x of w's sign. Two products of at most 127
// by 127 fit sixteen bits.
inline I dot(I sum, const W& w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(four), w.value);
  const __m256i pairs = _mm256_maddubs_epi16(w.size, turned);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

struct Book {
  __m256i book;

  explicit Book(const float* code) {
    alignas(16) int8_t bytes[16];
    round_code(code, bytes);
    book = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }

  W unpack(const uint8_t* dwords, int half) const {
    __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dwords));
    if (half == 0) q = _mm256_srli_epi32(q, 4);
    const __m256i value = _mm256_shuffle_epi8(book, _mm256_and_si256(q, _mm256_set1_epi8(15)));
    return {value, _mm256_abs_epi8(value)};
  }
};

#include "int8_kernels.h"

}  // namespace

const Int8Kernels kInt8Avx2 = {kTileTokens, kPadded, kItemPanels, quantize, rows, scratch_bytes};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
