// The kernels of nf4.h over a vector type `V`, included once by each instruction set's source
// file, inside an anonymous namespace: nothing here may be shared between these files, or the
// linker could keep the AVX-512 copy for all of them. For the same reason no std templates.
//
// The including file defines, before:
//   V, kLanes (8 or 16), zero(), load(p), store(p, v), broadcast(f), fma(a, b, c), mul, add,
//   look_up (see nf4_rows.h), prefetch(p), which may do nothing,
//   struct Code (from the code book) with unpack(tile dwords of kLanes rows, half, V w[4]):
//     half 0 gives columns kOrder[0..3], half 1 columns kOrder[4..7];
//   kFewTokens, few_panels_at_once(tokens), kTileTokens, kPanelsAtOnce, kBlockColumns.

constexpr int kVectors = kPanelRows / kLanes;  // in a panel

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#include "nf4_rows.h"

// Reads each token by itself: whole lines, and tokens a power of two apart do not evict each
// other from the first-level cache.
void pack(const Nf4Job& job, int64_t tile_tokens, int64_t first, int64_t last, float* packed) {
  const int64_t in = job.w.in;
  for (int64_t block = first * kBlockColumns; block < least(last * kBlockColumns, in);
       block += kBlockColumns) {
    const int64_t columns = least(kBlockColumns, in - block);
    for (int64_t token = 0; token < job.tokens; token += tile_tokens) {
      const int64_t count = least(tile_tokens, job.tokens - token);
      for (int64_t t = 0; t < count; ++t) {
        const float* from = job.x + (token + t) * in + block;
        float* to = packed + block * job.tokens + token * columns + t;
        for (int64_t column = 0; column < columns; column += kTileColumns, from += kTileColumns)
          for (int i = 0; i < kTileColumns; ++i, to += count) *to = from[kOrder[i]];
      }
    }
  }
}

#include "nf4_few.h"
#include "nf4_many.h"
