// One forward pass as a list of kernel calls over an arena of memory, recorded once from the
// model's own code and replayed for any number of tokens.
#pragma once

#include <cstdint>

#include "half.h"
#include "nf4.h"

namespace manylora {

constexpr int64_t kMaxDims = 5;

// constant + per_token * tokens + per_output * outputs, where `outputs` counts the rows whose
// logits are wanted.
struct Affine {
  int64_t constant;
  int64_t per_token;
  int64_t per_output;

  int64_t at(int64_t tokens, int64_t outputs) const {
    return constant + per_token * tokens + per_output * outputs;
  }
};

enum Place : int64_t {
  kNowhere = 0,  // no operand
  kSlot,         // `base` numbers a slot of the arena
  kAddress,      // `base` is an address
  kScalar,       // the instruction's own scalar
};

// A float32 array; strides and offset in elements.
struct Operand {
  int64_t place;
  int64_t base;
  Affine offset;
  Affine stride[kMaxDims];
};

enum Code : int64_t {
  kUnary = 0,  // out = function(a)
  kBinary,     // out = a function (scalar * b); for multiply and divide without scalar
  kMean,       // out = mean of a over its last dimension, of `size[dims]` elements
  kNf4Linear,  // out [tokens, out] = W a + bias
  kLora,       // out += the hook's low-rank products of a
  kRescale,    // out = scale * out + shift by the hook's rows
  kForeign,    // computed by the caller between two runs
  kHalfLinear,  // out [tokens, out] = W a + bias
  kAttention,   // k = b and v = c are stored, then out = attention of the queries a
};

// One layer's attention; a, b and c are [.., heads, tokens, dim].
struct AttentionLayer {
  int64_t layer;  // index of its caches
  int64_t heads;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t window;
  const float* sinks;
  float scale;
  float softcap;
};

struct Instruction {
  int64_t code;
  int64_t function;  // of kUnary and kBinary
  int64_t hook;      // of kLora and kRescale
  int64_t dims;      // of the result, except for the mean's last
  Affine size[kMaxDims];
  Operand out;
  Operand a;
  Operand b;
  Operand c;
  float scalar;
  const void* weight;  // Nf4Matrix, HalfMatrix or AttentionLayer
  const float* bias;
};

struct HalfMatrix {
  const uint16_t* tiles;
  int64_t kind;
  int64_t out;
  int64_t in;
  const float* scale;
};

// Token runs {start, end, rank row start, rank row end} with their weights, as RankSegments.
struct LoraRuns {
  const int32_t* runs;
  const float* weights;
  int64_t count;
};

// Token runs {start, end, row, the bits of a float weight}.
struct RescaleRuns {
  const int32_t* runs;
  int64_t count;
};

// Rank rows of one type of factors.
struct HookPool {
  const void* a;  // [rank rows][in]
  const void* b;  // [rank rows][out]
  int64_t runs;   // index of its LoraRuns, -1: none
};

constexpr int64_t kHookPools = 3;

// What the adapters do to one module in this step. Pools are numbered as FactorType.
struct Hook {
  HookPool pools[kHookPools];
  const float* scale;  // [rows][out]
  const float* shift;  // [rows][out]
  int64_t rescale;     // index of its RescaleRuns, -1: none
};

enum Math : int64_t { kFloatMath = 0, kInt8Math, kInt8AmxMath };

struct LayerCache {
  float* k;
  float* v;
};

// What all layers' attention is given, as AttentionJob and StoreJob.
struct Pages {
  const LayerCache* layers;
  const int64_t* positions;
  const int32_t* block_tables;
  const int32_t* context_lens;
  const int32_t* query_starts;
  int64_t sequences;
  int64_t table_width;
  int64_t blocks;
  int64_t block_tokens;
};

struct Step {
  int64_t tokens;
  int64_t outputs;
  float* const* slots;  // where each slot of the arena begins in this step
  const Hook* hooks;
  const LoraRuns* lora;
  const RescaleRuns* rescale;
  Pages pages;
  int64_t math;  // of 4-bit layers, a Math
  int64_t isa;
  int64_t threads;
};

}  // namespace manylora
