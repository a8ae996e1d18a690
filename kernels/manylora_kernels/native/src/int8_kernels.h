// The kernels of int8.h over vector types, included once by each instruction set's source file
// inside an anonymous namespace (why: nf4_kernels.h). Weights are unpacked in registers, for each
// tile of tokens anew: it costs little beside the products.
//
// The including file defines, before:
//   the float vectors of vector_*.h;
//   I, kLanes int32, with broadcast_int(i) and to_float(I);
//   W, four columns of kLanes rows, and dot(I sum, W w, const int8_t x[4]);
//   struct Book (from the code book) with unpack(tile dwords of kLanes rows, half, w):
//     half 0 gives columns kOrder[0..3], half 1 columns kOrder[4..7];
//   kBalanced: whether Book adds 128, so that sums begin at Int8Activations::balance;
//   kTileTokens, panels_at_once(tokens).

constexpr int kVectors = kPanelRows / kLanes;  // in a panel
constexpr int64_t kItemPanels = 16;
constexpr int64_t kPrefetchBytes = 2048;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr bool kPadded = false;
#include "int8_quantize.h"
#include "nf4_rows.h"

// kPanels panels by one tile of kTokens tokens. x: the tile's part of Int8Activations.
// Not to be inlined: a compiler that allocates registers for several of these at once keeps sums
// in memory.
template <int kTokens, int kPanels>
__attribute__((noinline)) void tile_rows(const Nf4Job& job, int64_t panel, Int8Activations x,
                                         float* y) {
  const Nf4Matrix& w = job.w;
  const Book book(w.code);
  const int64_t segments = w.in / w.segment;
  const int64_t panel_bytes = w.in / kTileColumns * kTileBytes;
  Maxima maxima[kPanels];
  for (int p = 0; p < kPanels; ++p) maxima[p].begin(w, panel + p, 0);
  alignas(64) float maximum[kPanels][kPanelRows];
  V total[kPanels][kVectors][kTokens];
  for (auto& of_panel : total)
    for (auto& of_vector : of_panel)
      for (V& value : of_vector) value = zero();
  const uint8_t* tile = w.tiles + panel * panel_bytes;
  for (int64_t s = 0; s < segments; ++s) {
    for (int p = 0; p < kPanels; ++p) maxima[p].read(s, maximum[p]);
    I sum[kPanels][kVectors][kTokens];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 32
        for (int t = 0; t < kTokens; ++t)
          sum[p][v][t] = broadcast_int(kBalanced ? x.balance[t] : 0);
    const uint8_t* ahead = tile + kPrefetchBytes;
    if (ahead >= w.tiles + (panel + 1) * panel_bytes) ahead += (kPanels - 1) * panel_bytes;
    for (int64_t column = 0; column < w.segment; column += kTileColumns) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * panel_bytes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            const W weights = book.unpack(tile + p * panel_bytes + v * kLanes * 4, half);
#pragma GCC unroll 32
            for (int t = 0; t < kTokens; ++t)
              sum[p][v][t] = dot(sum[p][v][t], weights, x.q + (half * kTokens + t) * 4);
          }
      tile += kTileBytes;
      ahead += kTileBytes;
      x.q += kTileColumns * kTokens;
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 32
        for (int t = 0; t < kTokens; ++t) {
          const V part = mul(to_float(sum[p][v][t]), load(maximum[p] + v * kLanes));
          total[p][v][t] = add(total[p][v][t], mul(part, broadcast(x.scale[t])));
        }
    x.scale += kTokens;
    x.balance += kTokens;
  }
  for (int p = 0; p < kPanels; ++p)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t row = (panel + p) * kPanelRows + v * kLanes;
      for (int t = 0; t < kTokens; ++t) {
        V value = total[p][v][t];
        if (job.bias != nullptr) value = add(value, bias_of(job, row));
        store(y + t * job.stride + row, value);
      }
    }
}

template <int kTokens>
void tile_dispatch(int64_t tokens, const Nf4Job& job, int64_t first, int64_t last,
                   const Int8Activations& x, float* y) {
  if (tokens == kTokens) {
    constexpr int kPanels = panels_at_once(kTokens);
    int64_t panel = first;
    for (; panel + kPanels <= last; panel += kPanels) tile_rows<kTokens, kPanels>(job, panel, x, y);
    for (; panel < last; ++panel) tile_rows<kTokens, 1>(job, panel, x, y);
  } else if constexpr (kTokens > 1) {
    tile_dispatch<kTokens - 1>(tokens, job, first, last, x, y);
  }
}

void rows(const Nf4Job& job, const Int8Activations& x, int64_t first, int64_t last, void*) {
  const int64_t in = job.w.in, segments = in / job.w.segment;
  for (int64_t token = 0; token < job.tokens; token += x.tile_tokens) {
    const int64_t at = token * segments;
    const int64_t count = least(x.tile_tokens, job.tokens - token);
    const Int8Activations part = {count, x.q + token * in, x.scale + at, x.balance + at};
    tile_dispatch<kTileTokens>(count, job, first, last, part, job.y + token * job.stride);
  }
}

int64_t scratch_bytes(const Nf4Matrix&) { return 0; }
