// AMX: a matrix register of 16 tokens times one of 16 rows of W, 64 columns at once. The rest in
// AVX-512. Compiled for them whatever the command line says, and called only where they run.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx2,fma")
#endif
#include <immintrin.h>

#include "int8.h"

namespace manylora {
namespace {

#include "vector_avx512.h"
#include "panel_avx512.h"

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr bool kPadded = true;
#include "int8_quantize.h"
#include "nf4_rows.h"

constexpr int kTokens = 16;
constexpr int64_t kStep = 64;  // columns of one product
constexpr int64_t kSums = kTokens * kPanelRows;
// Segments that are multiplied before the sums of as many before them are read: what a matrix
// register stores can be loaded only when it has reached the cache.
constexpr int64_t kBatch = 4;
// Panels that are unpacked together: a tile of tokens is fetched once for all of them.
constexpr int64_t kItemPanels = 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // 0 to 3: sums. 4 and 5: tokens. 6 and 7: weights, four columns to a row.
  explicit TileConfig(int64_t columns) {
    for (int i = 0; i < 8; ++i) {
      rows[i] = i < 6 ? kTokens : static_cast<uint8_t>(columns / 4);
      row_bytes[i] = i == 4 || i == 5 ? static_cast<uint16_t>(columns) : 64;
    }
  }
};

// One panel in eight bits, [in / 4][row][4], and its maxima, [segment][row].
void unpack(const Nf4Matrix& w, int64_t panel, uint8_t* weights, float* maxima) {
  alignas(16) int8_t bytes[16];
  round_code(w.code, bytes);
  const __m512i book =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* tile = w.tiles + panel * w.in / kTileColumns * kTileBytes;
  for (int64_t column = 0; column < w.in; column += kTileColumns) {
    __builtin_prefetch(tile + 2048);
    const __m512i q = _mm512_loadu_si512(tile);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi32(q, 4), low);
    _mm512_store_si512(weights, _mm512_shuffle_epi8(book, high));
    _mm512_store_si512(weights + 64, _mm512_shuffle_epi8(book, _mm512_and_si512(q, low)));
    tile += kTileBytes;
    weights += 128;
  }
  Maxima reader;
  reader.begin(w, panel, 0);
  for (int64_t s = 0; s < w.in / w.segment; ++s) reader.read(s, maxima + s * kPanelRows);
}

// One segment's sums in matrix register `sum`. The registers' numbers are part of the instructions.
#define MANYLORA_MULTIPLY(sum, tokens, columns, x, weights)        \
  _tile_zero(sum);                                                 \
  for (int64_t column = 0; column < segment; column += step) {     \
    _tile_loadd(tokens, (x) + column, segment);                    \
    _tile_loadd(columns, (weights) + column * kPanelRows, 64);     \
    _tile_dpbssd(sum, tokens, columns);                            \
  }

// Sums of `count` segments, at most kBatch, to memory.
inline void multiply(const int8_t* x, const uint8_t* weights, int64_t segment, int64_t count,
                     int32_t* sums) {
  const int64_t step = least(segment, kStep);
  const int64_t bytes = segment * kTokens;  // of x and of the weights alike
  MANYLORA_MULTIPLY(0, 4, 6, x, weights)
  if (count > 1) {
    MANYLORA_MULTIPLY(1, 5, 7, x + bytes, weights + bytes)
  }
  if (count > 2) {
    MANYLORA_MULTIPLY(2, 4, 6, x + 2 * bytes, weights + 2 * bytes)
  }
  if (count > 3) {
    MANYLORA_MULTIPLY(3, 5, 7, x + 3 * bytes, weights + 3 * bytes)
  }
  _tile_stored(0, sums, 64);
  if (count > 1) _tile_stored(1, sums + kSums, 64);
  if (count > 2) _tile_stored(2, sums + 2 * kSums, 64);
  if (count > 3) _tile_stored(3, sums + 3 * kSums, 64);
}
#undef MANYLORA_MULTIPLY

inline void add_segment(const int32_t* sums, const float* maxima, const float* scale, V* total) {
  const V maximum = load(maxima);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    const V part = mul(_mm512_cvtepi32_ps(_mm512_load_si512(sums + kPanelRows * t)), maximum);
    total[t] = add(total[t], mul(part, broadcast(scale[t])));
  }
}

// One panel by 16 tokens, of which `count` are stored. Not to be inlined, so that all totals stay
// in registers.
__attribute__((noinline)) void tile_rows(const Nf4Job& job, const int8_t* x, const float* scale,
                                         const uint8_t* weights, const float* maxima, int64_t row,
                                         int64_t count, float* y) {
  const int64_t segment = job.w.segment, segments = job.w.in / segment;
  const int64_t bytes = segment * kTokens;
  alignas(64) int32_t sums[2][kBatch * kSums];
  V total[kTokens];
#pragma GCC unroll 16
  for (V& value : total) value = zero();
  multiply(x, weights, segment, least(kBatch, segments), sums[0]);
  for (int64_t s = 0; s < segments; s += kBatch) {
    const int64_t next = s + kBatch;
    if (next < segments)
      multiply(x + next * bytes, weights + next * bytes, segment, least(kBatch, segments - next),
               sums[next / kBatch % 2]);
    const int32_t* ready = sums[s / kBatch % 2];
    for (int64_t i = s; i < least(next, segments); ++i, ready += kSums)
      add_segment(ready, maxima + i * kPanelRows, scale + i * kTokens, total);
  }
  const V bias = job.bias == nullptr ? zero() : bias_of(job, row);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t)
    if (t < count) store(y + t * job.stride, job.bias == nullptr ? total[t] : add(total[t], bias));
}

int64_t scratch_bytes(const Nf4Matrix& w) {
  return kItemPanels * kPanelRows * (w.in + w.in / w.segment * 4);
}

void rows(const Nf4Job& job, const Int8Activations& x, int64_t first, int64_t last, void* scratch) {
  const Nf4Matrix& w = job.w;
  const int64_t segments = w.in / w.segment;
  auto* weights = static_cast<uint8_t*>(scratch);
  auto* maxima = reinterpret_cast<float*>(weights + kItemPanels * kPanelRows * w.in);
  for (int64_t panel = first; panel < last; ++panel)
    unpack(w, panel, weights + (panel - first) * kPanelRows * w.in,
           maxima + (panel - first) * kPanelRows * segments);
  // The loads of matrix registers do not tell the compiler that they read memory.
  asm volatile("" ::: "memory");
  const TileConfig config(least(w.segment, kStep));
  _tile_loadconfig(&config);
  for (int64_t token = 0; token < job.tokens; token += kTokens)
    for (int64_t panel = first; panel < last; ++panel)
      tile_rows(job, x.q + token * w.in, x.scale + token * segments,
                weights + (panel - first) * kPanelRows * w.in,
                maxima + (panel - first) * kPanelRows * segments, panel * kPanelRows,
                least(kTokens, job.tokens - token),
                job.y + token * job.stride + panel * kPanelRows);
  _tile_release();
}

}  // namespace

const Int8Kernels kInt8Amx = {kTokens, kPadded, kItemPanels, quantize, rows, scratch_bytes};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
