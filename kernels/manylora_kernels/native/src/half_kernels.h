// The kernels of half.h over the vector type of vector_*.h, included once by each instruction set's
// source file, inside an anonymous namespace: nothing here may be shared between these files, or
// the linker could keep the AVX-512 copy for all of them. For the same reason no std templates.
//
// The including file defines, before: kTileTokens, kSums, and for all kinds of weight
//   struct Bfloat16, Float16, Int8 with kTile (halves) and V column(tile, first row, 0 or 1): kLanes rows, widened.

constexpr int kVectors = kHalfRows / kLanes;  // in a panel
// Measured at one token from memory; past the end of the matrix it does nothing.
constexpr int64_t kAhead = 1024 / sizeof(uint16_t);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t even_up(int64_t a) { return (a + 1) / 2 * 2; }

// x, for every segment and tile of tokens: [column][token of the tile].
void pack(const HalfJob& job, int64_t first, int64_t last, float* packed) {
  const int64_t columns_up = even_up(job.in);
  for (int64_t start = 0; start < columns_up; start += kHalfSegment) {
    const int64_t columns = least(kHalfSegment, columns_up - start);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t token = tile * kTileTokens;
      const int64_t count = least(kTileTokens, job.tokens - token);
      const float* from = job.x + token * job.x_stride + start;
      float* to = packed + start * job.tokens + token * columns;
      const int64_t real = least(columns, job.in - start);
      for (int64_t column = 0; column < real; ++column)
        for (int64_t t = 0; t < count; ++t) *to++ = from[t * job.x_stride + column];
      for (int64_t t = 0; t < (columns - real) * count; ++t) *to++ = 0.0f;
    }
  }
}

// kTokens by kPanels * 16 sums over the segment at `start`, added to y.
template <typename Half, int kTokens, int kPanels>
void multiply_tile(const HalfJob& job, int64_t panel, int64_t start, int64_t columns,
                   const float* x, int64_t token) {
  constexpr int kAcross = kPanels * kVectors;
  const int64_t panel_halves = even_up(job.in) / 2 * Half::kTile;
  const uint16_t* tile = job.tiles + panel * panel_halves + start / 2 * Half::kTile;
  V sum[kTokens][kAcross];
  for (auto& of_token : sum)
    for (V& value : of_token) value = zero();
  for (int64_t column = 0; column < columns; column += 2) {
    for (int p = 0; p < kPanels; ++p) __builtin_prefetch(tile + p * panel_halves + kAhead);
    // Unrolled whole, or the sums would live in memory.
#pragma GCC unroll 2
    for (int which = 0; which < 2; ++which) {
      V w[kAcross];
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v)
        w[v] = Half::column(tile + v / kVectors * panel_halves, v % kVectors * kLanes, which);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const V value = broadcast(x[which * kTokens + t]);
#pragma GCC unroll 8
        for (int v = 0; v < kAcross; ++v) sum[t][v] = fma(w[v], value, sum[t][v]);
      }
    }
    tile += Half::kTile;
    x += 2 * kTokens;
  }
  const bool ends = start + columns >= job.in;
#pragma GCC unroll 8
  for (int v = 0; v < kAcross; ++v) {
    const int64_t row = panel * kHalfRows + v * kLanes;
    const int64_t rows = least(kLanes, job.out - row);
    if (rows <= 0) continue;
    const bool shift = ends && job.bias != nullptr;
    const bool rescale = ends && job.scale != nullptr;
    const V scale = rescale ? load_part(job.scale + row, rows) : zero();
    const V bias = shift ? load_part(job.bias + row, rows) : zero();
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      float* y = job.y + (token + t) * job.out + row;
      V value = sum[t][v];
      // What y held before is never read.
      if (start != 0) value = add(load_part(y, rows), value);
      if (rescale) value = mul(value, scale);
      if (shift) value = add(value, bias);
      store_part(y, rows, value);
    }
  }
}

// Panels [panel, last) of one tile of tokens, as many at once as leave the sums in registers.
template <typename Half, int kTokens>
void multiply_panels(const HalfJob& job, int64_t panel, int64_t last, int64_t start,
                     int64_t columns, const float* x, int64_t token) {
  constexpr int kMost = kSums / (kTokens * kVectors);
  constexpr int kPanels = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
  for (; panel + kPanels <= last; panel += kPanels)
    multiply_tile<Half, kTokens, kPanels>(job, panel, start, columns, x, token);
  for (; panel < last; ++panel)
    multiply_tile<Half, kTokens, 1>(job, panel, start, columns, x, token);
}

template <typename Half, int kTokens>
void multiply_tokens(int64_t tokens, const HalfJob& job, int64_t panel, int64_t last,
                     int64_t start, int64_t columns, const float* x, int64_t token) {
  if (tokens == kTokens) {
    multiply_panels<Half, kTokens>(job, panel, last, start, columns, x, token);
  } else if constexpr (kTokens > 1) {
    multiply_tokens<Half, kTokens - 1>(tokens, job, panel, last, start, columns, x, token);
  }
}

template <typename Half>
void multiply_segment(const HalfJob& job, int64_t first, int64_t last, int64_t start,
                      const float* packed) {
  const int64_t columns = least(kHalfSegment, even_up(job.in) - start);
  for (int64_t token = 0; token < job.tokens; token += kTileTokens)
    multiply_tokens<Half, kTileTokens>(least(kTileTokens, job.tokens - token), job, first, last,
                                       start, columns,
                                       packed + start * job.tokens + token * columns, token);
}

template <typename Half>
void multiply_kind(const HalfJob& job, int64_t first, int64_t last, const float* packed) {
  // One tile of tokens reads the weights once: panel by panel, each from end to end. More of them
  // read x most often: a segment of it stays in the second-level cache for all panels, and a few
  // panels' segment in the first for all tokens.
  if (job.tokens <= kTileTokens) {
    for (int64_t panel = first; panel < last; panel += kPanelsAtOnce)
      for (int64_t start = 0; start < job.in; start += kHalfSegment)
        multiply_segment<Half>(job, panel, least(panel + kPanelsAtOnce, last), start, packed);
  } else {
    for (int64_t start = 0; start < job.in; start += kHalfSegment)
      for (int64_t panel = first; panel < last; panel += kPanelsAtOnce)
        multiply_segment<Half>(job, panel, least(panel + kPanelsAtOnce, last), start, packed);
  }
}

void multiply(const HalfJob& job, int64_t first, int64_t last, const float* packed) {
  if (job.kind == kBfloat16) {
    multiply_kind<Bfloat16>(job, first, last, packed);
  } else if (job.kind == kInt8) {
    multiply_kind<Int8>(job, first, last, packed);
  } else {
    multiply_kind<Float16>(job, first, last, packed);
  }
}
