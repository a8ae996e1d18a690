// Causal attention over a paged cache, and the write to that cache: the data, what a C++ caller
// calls, and what each instruction set provides. ops.paged_attention gives the equation.
#pragma once

#include <cstdint>

namespace manylora {

// Strides are in floats; the last dimension of every array is dense.
struct AttentionJob {
  const float* q;  // [queries][heads][key_dim], by the strides below
  const float* k_cache;  // [blocks][block_tokens][kv_heads][key_dim]
  const float* v_cache;  // [blocks][block_tokens][kv_heads][value_dim]
  const int32_t* block_tables;  // [sequences][table_width]
  const int32_t* context_lens;  // [sequences]
  const int32_t* query_starts;  // [sequences + 1]
  const float* sinks;  // [heads] or null
  float* out;  // [queries][heads][value_dim]
  int64_t q_token_stride;
  int64_t q_head_stride;
  int64_t queries;
  int64_t sequences;
  int64_t table_width;
  int64_t heads;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t blocks;
  int64_t block_tokens;
  int64_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
};

// Copies k and v of each token to its place in the caches; any type of `item_bytes` bytes.
struct StoreJob {
  const char* k;  // [tokens][kv_heads][key_dim], by the strides below, in items
  const char* v;
  char* k_cache;  // [places][kv_heads][key_dim]
  char* v_cache;
  const int64_t* positions;  // [tokens], each below `places`
  int64_t k_token_stride;
  int64_t k_head_stride;
  int64_t v_token_stride;
  int64_t v_head_stride;
  int64_t tokens;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t places;
  int64_t item_bytes;
};

enum AttentionStatus : int {
  kDone = 0,
  kUnknownIsa = 1,
  kNoMemory = 2,
  kBadIndex = 3,  // a table, length, start or position points outside: nothing was read or written
};

AttentionStatus paged_attention(const AttentionJob& job, int isa, int threads);
AttentionStatus store_kv(const StoreJob& job, int threads);

// Keys are taken in tiles of kTileKeys and summed up in parts of kPartKeys, both counted from
// position 0 of the sequence. So what a query gets depends on its position only, and not on the
// chunk of the prompt that it came in, the other queries, or who computed which part.
constexpr int64_t kTileKeys = 64;
constexpr int64_t kPartKeys = 512;

// Everything here that is not data has internal linkage: it is compiled for every instruction set,
// and the linker must not keep one copy for all.

// Neighbouring queries of one sequence, for all query heads of one kv head.
struct AttentionUnit {
  int64_t sequence;
  int64_t kv_head;
  int64_t first;  // positions [first, last)
  int64_t last;
};

// The first key that a query at `position` sees.
static inline int64_t first_key(const AttentionJob& job, int64_t position) {
  const int64_t first = position - job.window + 1;
  return job.window == 0 || first < 0 ? 0 : first;
}
static inline int64_t first_part(const AttentionJob& job, const AttentionUnit& unit) {
  return first_key(job, unit.first) / kPartKeys;
}
static inline int64_t end_part(const AttentionUnit& unit) {
  return (unit.last - 1) / kPartKeys + 1;
}

static inline int64_t rows_of(const AttentionJob& job, const AttentionUnit& unit) {
  return (unit.last - unit.first) * (job.heads / job.kv_heads);
}
static inline int64_t cache_line_up(int64_t floats) { return (floats + 15) / 16 * 16; }

// Sums over some of the keys: per row the outputs, the largest score and the sum of weights.
static inline int64_t state_floats(const AttentionJob& job, int64_t rows) {
  return rows * cache_line_up(job.value_dim) + 2 * cache_line_up(rows);
}

struct AttentionKernels {
  // Floats of scratch that a unit of `rows` rows needs.
  int64_t (*scratch_floats)(const AttentionJob& job, int64_t rows);
  // A unit over all of its keys, to job.out.
  void (*attend)(const AttentionJob& job, const AttentionUnit& unit, float* scratch);
  // The same in two steps: one part of the keys to `state`; then all parts' states, one behind
  // another, to job.out.
  void (*attend_part)(const AttentionJob& job, const AttentionUnit& unit, int64_t part,
                      float* state, float* scratch);
  void (*combine)(const AttentionJob& job, const AttentionUnit& unit, const float* states,
                  float* scratch);
};

extern const AttentionKernels kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
#endif

}  // namespace manylora
