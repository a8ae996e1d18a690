// y[t] = W x[t] + bias for a 4-bit W that was tiled at load (native/tiles.py): the data, and what
// each instruction set provides.
#pragma once

#include <cstdint>

#include "ahead.h"

namespace manylora {

class Fusion;

// A panel is 16 rows of W. A tile is a panel's 8 neighbouring columns in 64 bytes: dword r holds
// row r, in bitsandbytes' order (column 2b in the high half of byte b, column 2b + 1 in the low).
constexpr int64_t kPanelRows = 16;
constexpr int64_t kTileColumns = 8;
constexpr int64_t kTileBytes = 64;
// The columns of a tile in the order in which every path adds them: the high halves, then the low.
constexpr int kOrder[kTileColumns] = {0, 2, 4, 6, 1, 3, 5, 7};
// Columns that are added before their sum is multiplied by the block maximum.
constexpr int64_t kMaxSegment = 128;

struct Nf4Matrix {
  const uint8_t* tiles;       // [panels][in / 8][64]
  const float* code;          // [16]
  const void* absmax;         // [panels][in / segment][16]: uint8 with absmax_code, else float
  const float* absmax_code;   // [256] or null
  const float* absmax_scale;  // [ceil(out * in / group)] or null
  int64_t out;
  int64_t in;
  int64_t segment;  // a multiple of 8 that divides `in`, at most kMaxSegment
  int64_t group;    // weights per absmax_scale, a multiple of `segment`
  float absmax_offset;
};

struct Nf4Job {
  Nf4Matrix w;
  const float* x;  // [tokens][in]
  float* y;        // [tokens][stride], stride = out rounded up to 16
  const float* bias;  // [out] or null
  int64_t tokens;
  int64_t stride;
};

// One instruction set's kernels. All of them compute, for every token t and row r,
//   y[t][r] = (((0 + s_0 m_0) + s_1 m_1) + ...) + bias[r],   s_i = sum of code * x over segment i
// with one accumulator for s_i, columns in kOrder, so a token's result depends neither on the
// number of tokens nor on the path.
struct Nf4Kernels {
  int64_t few_tokens;     // most tokens that `few` takes
  int64_t tile_tokens;    // tokens in a register tile of `many`
  int64_t panels_at_once;
  int64_t block_columns;  // columns that `many` unpacks at once, a multiple of kMaxSegment

  // Interleaves x as both read it, for the blocks of block_columns columns [first, last):
  // packed [block][tile of tile_tokens tokens][column in kOrder][token], tokens * in floats.
  void (*pack)(const Nf4Job& job, int64_t tile_tokens, int64_t first, int64_t last, float* packed);
  // Rows of panels [first, last) for at most few_tokens tokens, a single tile; weights are
  // unpacked in registers. Of `beside` a share is fetched for each panel's segment.
  void (*few)(const Nf4Job& job, int64_t first, int64_t last, const float* packed, Ahead& beside);
  // Rows of panels [first, last), from a multiple of panels_at_once on, for any number of tokens;
  // weights are unpacked into memory. scratch: many_scratch(kernels, last - first, tokens) floats.
  void (*many)(const Nf4Job& job, int64_t first, int64_t last, const float* packed, float* scratch);
};

// Unpacked weights and maxima of panels_at_once panels; sums of all panels and tokens.
constexpr int64_t many_scratch(const Nf4Kernels& kernels, int64_t panels, int64_t tokens) {
  return kPanelRows * (kernels.panels_at_once *
                           (kernels.block_columns + kernels.block_columns / kTileColumns) +
                       (panels + kernels.panels_at_once) * tokens);
}

extern const Nf4Kernels kNf4Portable;
#if defined(__x86_64__)
extern const Nf4Kernels kNf4Avx2;
extern const Nf4Kernels kNf4Avx512;
#endif

// At most kMostProducts jobs over the same x. False where `isa` does not run here or memory is
// short.
bool nf4_linear(const Nf4Job* jobs, int64_t count, const Fusion& fusion, int isa, int threads);

}  // namespace manylora
