// y[t] += weight * B^T (A x[t]) for the tokens of each segment: the data, and what each
// instruction set provides.
#pragma once

#include <cstdint>

#include "sixteen_bits.h"

namespace manylora {

enum FactorType : int64_t { kFactorFloat = 0, kFactorBf16 = 1, kFactorFp16 = 2 };

constexpr int64_t factor_bytes(int64_t type) { return type == kFactorFloat ? 4 : 2; }

// Tokens [start, end) of one adapter, whose factors lie rank row by rank row.
struct LoraSegment {
  int64_t start;
  int64_t end;
  int64_t rank;
  int64_t type;   // of the factors, a FactorType
  const void* a;  // [rank][in]
  const void* b;  // [rank][out]
  float weight;
};

// The segment of a run {token start, token end, rank row start, rank row end} over pools of `type`.
inline LoraSegment lora_segment(const int32_t* run, float weight, int64_t type, const void* a,
                                const void* b, int64_t in, int64_t out) {
  const int64_t bytes = factor_bytes(type);
  return {run[0],
          run[1],
          run[3] - run[2],
          type,
          static_cast<const char*>(a) + run[2] * in * bytes,
          static_cast<const char*>(b) + run[2] * out * bytes,
          weight};
}

struct LoraJob {
  const LoraSegment* segments;
  int64_t count;
  const float* x;  // [tokens][x_stride]
  float* y;        // [tokens][y_stride]
  int64_t in;
  int64_t out;
  int64_t x_stride;
  int64_t y_stride;
};

// Every kernel computes, for a token t, rank row r and output o of a segment,
//   p[r] = weight * sum over i of x[t][i] a[r][i]     one accumulator of kLanes lanes, i ascending,
//                                                     then the lanes by halves
//   y[t][o] = ((y[t][o] + p[0] b[0][o]) + p[1] b[1][o]) + ...
// whatever tile it works in, so a token's result does not depend on its neighbours.
struct LoraKernels {
  // Rank rows [first, last) for tokens [begin, end): projected[(t - start) * rank + r].
  void (*shrink)(const LoraJob& job, const LoraSegment& segment, int64_t begin, int64_t end,
                 int64_t first, int64_t last, float* projected);
  // Outputs [first, last) of all the segment's tokens.
  void (*expand)(const LoraJob& job, const LoraSegment& segment, const float* projected,
                 int64_t first, int64_t last);
};

extern const LoraKernels kLoraPortable;
#if defined(__x86_64__)
extern const LoraKernels kLoraAvx2;
extern const LoraKernels kLoraAvx512;
#endif

const LoraKernels& lora_kernels(int isa);

// Tokens may be in several segments: they are added in the segments' order. False: no memory.
bool lora_delta(const LoraJob& job, int isa, int threads);

}  // namespace manylora
