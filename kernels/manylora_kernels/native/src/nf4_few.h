// Few tokens: every weight is unpacked in a register and used at once. See nf4_kernels.h.

constexpr int64_t kPrefetchBytes = 2048;

// One token is read where it is; more are packed.
template <int kTokens>
constexpr int x_offset(int column, int token) {
  return kTokens == 1 ? kOrder[column] : column * kTokens + token;
}

// Not to be inlined: a compiler that allocates registers for several of these at once keeps sums
// in memory.
template <int kTokens, int kPanels>
__attribute__((noinline)) void few_panels(const Nf4Job& job, int64_t panel, const float* x,
                                          Ahead& beside) {
  const Nf4Matrix& w = job.w;
  const Code code(w.code);
  const int64_t segments = w.in / w.segment;
  const int64_t panel_bytes = w.in / kTileColumns * kTileBytes;
  Maxima maxima[kPanels];
  for (int p = 0; p < kPanels; ++p) maxima[p].begin(w, panel + p, 0);
  alignas(64) float maximum[kPanels][kPanelRows];
  V total[kPanels][kVectors][kTokens];
  for (auto& of_panel : total)
    for (auto& of_vector : of_panel)
      for (V& value : of_vector) value = zero();
  const uint8_t* tile = w.tiles + panel * panel_bytes;
  for (int64_t s = 0; s < segments; ++s) {
    for (int p = 0; p < kPanels; ++p) maxima[p].read(s, maximum[p]);
    V sum[kPanels][kVectors][kTokens];
    for (auto& of_panel : sum)
      for (auto& of_vector : of_panel)
        for (V& value : of_vector) value = zero();
    // A panel's end is followed by the panels after these. Past the end of the matrix, prefetching
    // does nothing.
    const uint8_t* ahead = tile + kPrefetchBytes;
    if (ahead >= w.tiles + (panel + 1) * panel_bytes) ahead += (kPanels - 1) * panel_bytes;
    for (int64_t column = 0; column < w.segment; column += kTileColumns) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * panel_bytes);
      // Fewer stay in the first-level cache by themselves.
#pragma GCC unroll 16
      for (int i = 0; kTokens > 4 && i < kTileColumns * kTokens; i += 16)
        __builtin_prefetch(x + 2 * kTileColumns * kTokens + i);
      // Unrolled whole, or the sums would live in memory.
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            V weights[4];
            code.unpack(tile + p * panel_bytes + v * kLanes * 4, half, weights);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
#pragma GCC unroll 32
              for (int t = 0; t < kTokens; ++t)
                sum[p][v][t] = fma(weights[i], broadcast(x[x_offset<kTokens>(half * 4 + i, t)]),
                                   sum[p][v][t]);
          }
      tile += kTileBytes;
      ahead += kTileBytes;
      x += kTileColumns * kTokens;
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 32
        for (int t = 0; t < kTokens; ++t)
          total[p][v][t] = fma(sum[p][v][t], load(maximum[p] + v * kLanes), total[p][v][t]);
    for (int p = 0; p < kPanels; ++p) fetch_share(beside);
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
void few_dispatch(const Nf4Job& job, int64_t first, int64_t last, const float* packed,
                  Ahead& beside) {
  if (job.tokens == kTokens) {
    constexpr int kPanels = few_panels_at_once(kTokens);
    int64_t panel = first;
    for (; panel + kPanels <= last; panel += kPanels)
      few_panels<kTokens, kPanels>(job, panel, packed, beside);
    for (; panel < last; ++panel) few_panels<kTokens, 1>(job, panel, packed, beside);
  } else if constexpr (kTokens > 1) {
    few_dispatch<kTokens - 1>(job, first, last, packed, beside);
  }
}

void few(const Nf4Job& job, int64_t first, int64_t last, const float* packed, Ahead& beside) {
  few_dispatch<kFewTokens>(job, first, last, packed, beside);
}
