// AVX-512 (F, BW) with VNNI. Compiled for it whatever the command line says, and called only where
// it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vnni,avx2,fma")
#endif
#include <immintrin.h>

#include "int8.h"

namespace manylora {
namespace {

#include "vector_avx512.h"
#include "panel_avx512.h"

constexpr int kTileTokens = 14;  // more, and GCC 12 keeps sums in memory
constexpr bool kBalanced = true;

// Panels side by side: enough independent sums to hide the latency of each.
constexpr int panels_at_once(int tokens) { return tokens == 1 ? 4 : tokens <= 3 ? 2 : 1; }

void round_code(const float* code, int8_t* book);

using I = __m512i;
using W = __m512i;
inline I broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
inline V to_float(I sum) { return _mm512_cvtepi32_ps(sum); }

inline I dot(I sum, W w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
}

// vpdpbusd multiplies unsigned with signed, so the code book is moved up by 128.
struct Book {
  __m512i book;

  explicit Book(const float* code) {
    alignas(16) int8_t bytes[16];
    round_code(code, bytes);
    const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
    book = _mm512_broadcast_i32x4(_mm_xor_si128(low, _mm_set1_epi8(-128)));
  }

  W unpack(const uint8_t* dwords, int half) const {
    __m512i q = _mm512_loadu_si512(dwords);
    if (half == 0) q = _mm512_srli_epi32(q, 4);
    return _mm512_shuffle_epi8(book, _mm512_and_si512(q, _mm512_set1_epi8(15)));
  }
};

#include "int8_kernels.h"

}  // namespace

const Int8Kernels kInt8Vnni = {kTileTokens, kPadded, kItemPanels, quantize, rows, scratch_bytes};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
