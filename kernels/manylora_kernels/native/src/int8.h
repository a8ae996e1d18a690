// The product of nf4.h with x and the code book rounded to eight bits: integers inside a segment,
// float32 between segments.
//
//   a_i = max |x| over segment i of the token's row
//   q   = round(x * (127 / a_i)), to even; 0 where a_i < 2^-100
//   n_i = sum of round(127 code) * q over segment i, exact in int32
//   y[t][r] = (((0 + (n_0 m_0) c_0) + (n_1 m_1) c_1) + ...) + bias[r],   c_i = a_i / 127^2
//
// Every product and sum is rounded by itself, never fused: all instruction sets, and the reference
// in Python, give the same bits. A segment of x that is not finite has c_i = NaN.
#pragma once

#include "nf4.h"

// Compilers that know AMX.
#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 11)
#define MANYLORA_AMX 1
#else
#define MANYLORA_AMX 0
#endif

namespace manylora {

constexpr float kInt8Steps = 127.0f;

// x in eight bits, tile after tile of tile_tokens tokens. Of each eight columns, the four of even
// number come first.
struct Int8Activations {
  int64_t tile_tokens;
  // [tile][in / 4][token][4], the last tile smaller than the others if need be; or, where
  // Int8Kernels::padded, [tile][segment][token][column], all tiles of one size.
  int8_t* q;
  float* scale;      // [tile][segment][token]: c_i
  int32_t* balance;  // [tile][segment][token]: -128 * sum of q, for code books moved up by 128
};

// One instruction set's kernels.
struct Int8Kernels {
  int64_t tile_tokens;    // most tokens of a tile of Int8Activations
  bool padded;            // all tiles of Int8Activations are of that size
  int64_t item_panels;    // panels to hand out at once at most, a multiple of 4

  // Fills `to` for all tokens and segments [first, last).
  void (*quantize)(const Nf4Job& job, int64_t first, int64_t last, const Int8Activations& to);
  // Rows of panels [first, last). scratch: as many bytes as scratch_bytes says, aligned to 64.
  void (*rows)(const Nf4Job& job, const Int8Activations& x, int64_t first, int64_t last,
               void* scratch);
  int64_t (*scratch_bytes)(const Nf4Matrix& w);
};

extern const Int8Kernels kInt8Portable;
#if defined(__x86_64__)
extern const Int8Kernels kInt8Avx2;
extern const Int8Kernels kInt8Vnni;  // AVX-512 with VNNI
#endif
#if MANYLORA_AMX
extern const Int8Kernels kInt8Amx;  // AVX-512, and AMX for the products
#endif

// At most kMostProducts jobs over the same x, cut into segments alike. False where `isa` does not
// run here or memory is short. `amx`: whether AVX-512 may use it.
bool nf4_linear_int8(const Nf4Job* jobs, int64_t count, const Fusion& fusion, int isa, bool amx,
                     int threads);

}  // namespace manylora
