// y[t] = W x[t] + bias for a W of bfloat16 or float16 (half.py), or of int8 with a scale for each
// row (int8_rows.py), tiled at load: the data, what a C++ caller calls, and what each instruction set
// provides.
#pragma once

#include <cstdint>

namespace manylora {

class Fusion;

enum HalfKind : int64_t { kBfloat16 = 0, kFloat16 = 1, kInt8 = 2 };

// A panel is 16 rows of W. A tile is a panel's two neighbouring columns in 64 bytes. bfloat16: dword
// r holds row r, the first column in its low half, so that a shift or a mask widens 16 weights.
// float16: 16 rows of the first column, then 16 of the second. int8: the same, in
// 32 bytes.
constexpr int64_t kHalfRows = 16;
constexpr int64_t kTileHalves = 32;
constexpr int64_t kInt8TileHalves = 16;
// Columns that are summed in one accumulator before their sum is added to the others'.
constexpr int64_t kHalfSegment = 256;

struct HalfJob {
  const uint16_t* tiles;  // [ceil(out / 16)][ceil(in / 2)][32]
  const float* x;         // [tokens][in], rows `x_stride` floats apart
  const float* bias;      // [out] or null
  float* y;               // [tokens][out]
  int64_t kind;
  int64_t out;
  int64_t in;
  int64_t tokens;
  int64_t x_stride;
  const float* scale = nullptr;  // [out]; of int8 only
};

// At most kMostProducts jobs over the same x. Returns 0, 1 where `isa` does not run here, or 2 where
// memory is short.
int half_linear(const HalfJob* jobs, int64_t count, const Fusion& fusion, int isa, int threads);

// One instruction set's kernels. All of them compute, for every token t and row r,
//   y[t][r] = (((s_0 + s_1) + s_2) + ...) * scale[r] + bias[r],   s_i = sum of w * x over segment i
// with one accumulator for s_i and columns in their order, so a token's result does not depend on
// the number of tokens. Lanes are rows.
struct HalfKernels {
  int64_t tile_tokens;  // tokens in a register tile
  int64_t panels_at_once;
  // Interleaves x of all tokens as `multiply` reads it; packed: tokens * (in rounded up to even).
  void (*pack)(const HalfJob& job, int64_t first_tile, int64_t last_tile, float* packed);
  // Rows of panels [first, last) for all tokens.
  void (*multiply)(const HalfJob& job, int64_t first, int64_t last, const float* packed);
};

extern const HalfKernels kHalfPortable;
#if defined(__x86_64__)
extern const HalfKernels kHalfAvx2;
extern const HalfKernels kHalfAvx512;
#endif

}  // namespace manylora
