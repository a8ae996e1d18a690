// The kernels of nf4.h over a vector type `V`, included once by each instruction set's source
// file, inside an anonymous namespace: nothing here may be shared between these files, or the
// linker could keep the AVX-512 copy for all of them. For the same reason no std templates.
//
// The including file defines, before:
//   V, kLanes (8 or 16), zero(), load(p), store(p, v), broadcast(f), fma(a, b, c), mul, add,
//   struct Code (from the code book) with unpack(tile dwords of kLanes rows, half, V w[4]):
//     half 0 gives columns kOrder[0..3], half 1 columns kOrder[4..7];
//   kFewTokens, kTileTokens, kPanelsAtOnce, kBlockColumns.

constexpr int kVectors = kPanelRows / kLanes;  // in a panel
constexpr int64_t kPrefetchBytes = 1024;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Block maxima of segments [first, last) of one panel, as floats [last - first][16].
// absmax = code[q] * scale + offset, rounded as bitsandbytes rounds it: no fused multiply-add.
void expand_maxima(const Nf4Matrix& w, int64_t panel, int64_t first, int64_t last, float* out,
                   int64_t out_stride) {
  const int64_t segments = w.in / w.segment;
  const int64_t at = (panel * segments + first) * kPanelRows;
  if (w.absmax_code == nullptr) {
    const float* maxima = static_cast<const float*>(w.absmax) + at;
    for (int64_t s = first; s < last; ++s, maxima += kPanelRows, out += out_stride)
      for (int r = 0; r < kPanelRows; ++r) out[r] = maxima[r];
    return;
  }
  const uint8_t* q = static_cast<const uint8_t*>(w.absmax) + at;
  float scale[kPanelRows];
  int64_t fresh_until = first;
  for (int64_t s = first; s < last; ++s, q += kPanelRows, out += out_stride) {
    if (s == fresh_until) {
      fresh_until = last;
      for (int64_t r = 0; r < kPanelRows; ++r) {
        const int64_t row = panel * kPanelRows + r;
        scale[r] = 0.0f;
        if (row >= w.out) continue;  // a row of padding has no group
        const int64_t flat = row * w.in + s * w.segment;
        const int64_t group = flat / w.group;
        scale[r] = w.absmax_scale[group];
        fresh_until = least(fresh_until, s + ((group + 1) * w.group - flat) / w.segment);
      }
    }
    float looked_up[kPanelRows];
    for (int r = 0; r < kPanelRows; ++r) looked_up[r] = w.absmax_code[q[r]];
    const V offset = broadcast(w.absmax_offset);
    for (int v = 0; v < kPanelRows; v += kLanes)
      store(out + v, add(mul(load(looked_up + v), load(scale + v)), offset));
  }
}

// The bias of a panel's rows; rows beyond `out` read nothing.
V bias_of(const Nf4Job& job, int64_t row) {
  if (row + kLanes <= job.w.out) return load(job.bias + row);
  float values[kLanes] = {};
  for (int64_t r = row; r < job.w.out; ++r) values[r - row] = job.bias[r];
  return load(values);
}

// ---- few tokens ----------------------------------------------------------------------------

template <int kTokens, int kPanels>
void few_panels(const Nf4Job& job, int64_t panel, float* maxima) {
  const Nf4Matrix& w = job.w;
  const Code code(w.code);
  const int64_t segments = w.in / w.segment;
  const int64_t panel_bytes = w.in / kTileColumns * kTileBytes;
  constexpr int64_t kWidth = kPanels * kPanelRows;
  for (int p = 0; p < kPanels; ++p)
    expand_maxima(w, panel + p, 0, segments, maxima + p * kPanelRows, kWidth);
  V total[kPanels][kVectors][kTokens];
  for (auto& of_panel : total)
    for (auto& of_vector : of_panel)
      for (V& value : of_vector) value = zero();
  const uint8_t* tile = w.tiles + panel * panel_bytes;
  const float* x = job.x;
  for (int64_t s = 0; s < segments; ++s, maxima += kWidth) {
    V sum[kPanels][kVectors][kTokens];
    for (auto& of_panel : sum)
      for (auto& of_vector : of_panel)
        for (V& value : of_vector) value = zero();
    for (int64_t column = 0; column < w.segment; column += kTileColumns) {
      // Measured: 3 to 7 % (AVX2). Past the end of the matrix it does nothing.
      for (int p = 0; p < kPanels; ++p)
        __builtin_prefetch(tile + p * panel_bytes + kPrefetchBytes);
      // Unrolled whole, or the sums would live in memory.
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            V weights[4];
            code.unpack(tile + p * panel_bytes + v * kLanes * 4, half, weights);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
              for (int t = 0; t < kTokens; ++t)
                sum[p][v][t] = fma(weights[i], broadcast(x[t * w.in + kOrder[half * 4 + i]]),
                                   sum[p][v][t]);
          }
      tile += kTileBytes;
      x += kTileColumns;
    }
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVectors; ++v) {
        const V maximum = load(maxima + p * kPanelRows + v * kLanes);
        for (int t = 0; t < kTokens; ++t)
          total[p][v][t] = fma(sum[p][v][t], maximum, total[p][v][t]);
      }
  }
  for (int p = 0; p < kPanels; ++p)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t row = (panel + p) * kPanelRows + v * kLanes;
      for (int t = 0; t < kTokens; ++t) {
        V value = total[p][v][t];
        if (job.bias != nullptr) value = add(value, bias_of(job, row));
        store(job.y + t * job.stride + row, value);
      }
    }
}

template <int kTokens>
void few_rows(const Nf4Job& job, int64_t first, int64_t last, float* scratch) {
  // Two panels keep enough independent sums in flight; more tokens do so by themselves.
  constexpr int kPanels = kTokens <= 2 ? 2 : 1;
  int64_t panel = first;
  for (; panel + kPanels <= last; panel += kPanels)
    few_panels<kTokens, kPanels>(job, panel, scratch);
  for (; panel < last; ++panel) few_panels<kTokens, 1>(job, panel, scratch);
}

template <int kTokens>
void few_dispatch(const Nf4Job& job, int64_t first, int64_t last, float* scratch) {
  if (job.tokens == kTokens) {
    few_rows<kTokens>(job, first, last, scratch);
  } else if constexpr (kTokens > 1) {
    few_dispatch<kTokens - 1>(job, first, last, scratch);
  }
}

void few(const Nf4Job& job, int64_t first, int64_t last, float* scratch) {
  few_dispatch<kFewTokens>(job, first, last, scratch);
}

// ---- many tokens ---------------------------------------------------------------------------

// x, for every block of columns and tile of tokens: [column in kOrder][token of the tile].
void pack(const Nf4Job& job, int64_t first, int64_t last, float* packed) {
  const int64_t in = job.w.in;
  for (int64_t block = 0; block < in; block += kBlockColumns) {
    const int64_t columns = least(kBlockColumns, in - block);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t token = tile * kTileTokens;
      const int64_t count = least(kTileTokens, job.tokens - token);
      const float* from = job.x + token * in + block;
      float* to = packed + block * job.tokens + token * columns;
      for (int64_t column = 0; column < columns; column += kTileColumns)
        for (int i = 0; i < kTileColumns; ++i)
          for (int64_t t = 0; t < count; ++t) *to++ = from[t * in + column + kOrder[i]];
    }
  }
}

// kTokens by kPanels * 16 sums over one block of columns, added to y segment by segment.
template <int kTokens, int kPanels>
void multiply(const Nf4Job& job, const float* weights, const float* maxima, const float* x,
              int64_t columns, bool begins, bool ends, int64_t row, float* y) {
  constexpr int kWidth = kPanels * kPanelRows;
  constexpr int kAcross = kPanels * kVectors;
  for (int64_t start = 0; start < columns; start += job.w.segment, maxima += kWidth) {
    V sum[kTokens][kAcross];
    for (auto& of_token : sum)
      for (V& value : of_token) value = zero();
    for (int64_t column = 0; column < job.w.segment; ++column) {
      V w[kAcross];
      for (int v = 0; v < kAcross; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const V value = broadcast(x[t]);
#pragma GCC unroll 4
        for (int v = 0; v < kAcross; ++v) sum[t][v] = fma(w[v], value, sum[t][v]);
      }
      weights += kWidth;
      x += kTokens;
    }
    const bool fresh = begins && start == 0;
    const bool last = ends && start + job.w.segment == columns;
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < kAcross; ++v) {
        float* at = y + t * job.stride + v * kLanes;
        // What y held before is never read.
        V value = fma(sum[t][v], load(maxima + v * kLanes), fresh ? zero() : load(at));
        if (last && job.bias != nullptr) value = add(value, bias_of(job, row + v * kLanes));
        store(at, value);
      }
  }
}

template <int kTokens, int kPanels>
void multiply_dispatch(int64_t tokens, const Nf4Job& job, const float* weights,
                       const float* maxima, const float* x, int64_t columns, bool begins,
                       bool ends, int64_t row, float* y) {
  if (tokens == kTokens) {
    multiply<kTokens, kPanels>(job, weights, maxima, x, columns, begins, ends, row, y);
  } else if constexpr (kTokens > 1) {
    multiply_dispatch<kTokens - 1, kPanels>(tokens, job, weights, maxima, x, columns, begins, ends,
                                            row, y);
  }
}

template <int kPanels>
void many_panels(const Nf4Job& job, const Code& code, int64_t panel, int64_t block,
                 const float* packed, float* scratch) {
  const Nf4Matrix& w = job.w;
  constexpr int64_t kWidth = kPanels * kPanelRows;
  const int64_t columns = least(kBlockColumns, w.in - block);
  float* weights = scratch;
  float* maxima = scratch + kBlockColumns * kWidth;
  for (int p = 0; p < kPanels; ++p) {
    expand_maxima(w, panel + p, block / w.segment, (block + columns) / w.segment,
                  maxima + p * kPanelRows, kWidth);
    const uint8_t* tile = w.tiles + ((panel + p) * w.in + block) / kTileColumns * kTileBytes;
    float* to = weights + p * kPanelRows;
    for (int64_t column = 0; column < columns; column += kTileColumns, tile += kTileBytes)
      for (int half = 0; half < 2; ++half, to += 4 * kWidth)
        for (int v = 0; v < kVectors; ++v) {
          V four[4];
          code.unpack(tile + v * kLanes * 4, half, four);
          for (int i = 0; i < 4; ++i) store(to + i * kWidth + v * kLanes, four[i]);
        }
  }
  const float* x = packed + block * job.tokens;
  const int64_t row = panel * kPanelRows;
  for (int64_t token = 0; token < job.tokens; token += kTileTokens) {
    const int64_t count = least(kTileTokens, job.tokens - token);
    multiply_dispatch<kTileTokens, kPanels>(count, job, weights, maxima, x + token * columns,
                                            columns, block == 0, block + columns == w.in, row,
                                            job.y + token * job.stride + row);
  }
}

void many(const Nf4Job& job, int64_t first, int64_t last, const float* packed, float* scratch) {
  const Code code(job.w.code);
  // Blocks outside, panels inside: a block's part of x stays in the second-level cache.
  for (int64_t block = 0; block < job.w.in; block += kBlockColumns) {
    int64_t panel = first;
    for (; panel + kPanelsAtOnce <= last; panel += kPanelsAtOnce)
      many_panels<kPanelsAtOnce>(job, code, panel, block, packed, scratch);
    for (; panel < last; ++panel) many_panels<1>(job, code, panel, block, packed, scratch);
  }
}
