// Many tokens: a block of weights is unpacked into memory once and multiplied with every token.
// See nf4_kernels.h.

// kTokens by kPanels * 16 sums over one block of columns, added to `total` segment by segment.
// Not to be inlined, for the reason in nf4_few.h.
template <int kTokens, int kPanels>
__attribute__((noinline)) void multiply(const float* weights, const float* maxima, const float* x,
                                        int64_t columns, int64_t segment, bool begins,
                                        float* total) {
  constexpr int kWidth = kPanels * kPanelRows;
  constexpr int kAcross = kPanels * kVectors;
  for (int64_t start = 0; start < columns; start += segment, maxima += kWidth) {
    V sum[kTokens][kAcross];
    for (auto& of_token : sum)
      for (V& value : of_token) value = zero();
    for (int64_t column = 0; column < segment; ++column) {
      // The next tile of tokens, which follows this one in memory.
      prefetch(x + columns * kTokens);
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
    // What `total` held before the first segment is never read.
    const bool fresh = begins && start == 0;
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < kAcross; ++v) {
        float* at = total + t * kWidth + v * kLanes;
        prefetch(at + kTokens * kWidth);
        store(at, fma(sum[t][v], load(maxima + v * kLanes), fresh ? zero() : load(at)));
      }
  }
}

template <int kTokens, int kPanels>
void multiply_dispatch(int64_t tokens, const float* weights, const float* maxima, const float* x,
                       int64_t columns, int64_t segment, bool begins, float* total) {
  if (tokens == kTokens) {
    multiply<kTokens, kPanels>(weights, maxima, x, columns, segment, begins, total);
  } else if constexpr (kTokens > 1) {
    multiply_dispatch<kTokens - 1, kPanels>(tokens, weights, maxima, x, columns, segment, begins,
                                            total);
  }
}

// Unpacks `columns` columns of kPanels panels: [column in kOrder][row].
template <int kPanels>
void unpack(const Nf4Matrix& w, const Code& code, int64_t panel, int64_t block, int64_t columns,
            float* weights, float* maxima) {
  constexpr int64_t kWidth = kPanels * kPanelRows;
  for (int p = 0; p < kPanels; ++p) {
    Maxima reader;
    reader.begin(w, panel + p, block / w.segment);
    for (int64_t s = 0; s < columns / w.segment; ++s)
      reader.read(block / w.segment + s, maxima + s * kWidth + p * kPanelRows);
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
}

template <int kPanels>
void many_panels(const Nf4Job& job, const Code& code, int64_t panel, int64_t block,
                 const float* packed, float* weights, float* total) {
  const Nf4Matrix& w = job.w;
  constexpr int64_t kWidth = kPanels * kPanelRows;
  const int64_t columns = least(kBlockColumns, w.in - block);
  float* maxima = weights + kBlockColumns * kWidth;
  unpack<kPanels>(w, code, panel, block, columns, weights, maxima);
  const float* x = packed + block * job.tokens;
  for (int64_t token = 0; token < job.tokens; token += kTileTokens) {
    const int64_t count = least(kTileTokens, job.tokens - token);
    multiply_dispatch<kTileTokens, kPanels>(count, weights, maxima, x + token * columns, columns,
                                            w.segment, block == 0, total + token * kWidth);
  }
}

void many(const Nf4Job& job, int64_t first, int64_t last, const float* packed, float* scratch) {
  const Code code(job.w.code);
  // Sums apart from y: there they lie a power of two apart, which throws them out of the caches.
  float* totals = scratch + kPanelsAtOnce * kPanelRows *
                                (kBlockColumns + kBlockColumns / kTileColumns);
  // Blocks outside, panels inside: a block's part of x stays in the second-level cache.
  for (int64_t block = 0; block < job.w.in; block += kBlockColumns) {
    int64_t panel = first;
    for (; panel + kPanelsAtOnce <= last; panel += kPanelsAtOnce)
      many_panels<kPanelsAtOnce>(job, code, panel, block, packed, scratch,
                                 totals + (panel - first) * kPanelRows * job.tokens);
    for (; panel < last; ++panel)
      many_panels<1>(job, code, panel, block, packed, scratch,
                     totals + (panel - first) * kPanelRows * job.tokens);
  }
  int64_t panel = first;
  while (panel < last) {
    const int64_t panels = panel + kPanelsAtOnce <= last ? kPanelsAtOnce : 1;
    const int64_t width = panels * kPanelRows;
    for (int64_t t = 0; t < job.tokens; ++t)
      for (int64_t lane = 0; lane < width; lane += kLanes, totals += kLanes) {
        const int64_t row = panel * kPanelRows + lane;
        V value = load(totals);
        if (job.bias != nullptr) value = add(value, bias_of(job, row));
        store(job.y + t * job.stride + row, value);
      }
    panel += panels;
  }
}
