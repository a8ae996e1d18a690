// The kernels of lora.h over the vectors of a vector_*.h, vector_math.h and widen_*.h, included once by each instruction set's
// source file, inside an anonymous namespace, for the same reasons as nf4_kernels.h.
//
// The including file defines kShrinkTokens by kShrinkRanks (dot products at once) and
// kExpandTokens by kExpandVectors (sums at once), as many as its registers hold.

template <typename T>
V load_first(const T* p, int64_t count) {
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = widened(p[i]);
  return load(values);
}

constexpr int64_t kShortRow = 2048;

// ---- shrink --------------------------------------------------------------------------------

template <int kTokens, int kRanks, typename T>
void dots(const LoraJob& job, const float* x, const T* a, float weight, float* out,
          int64_t out_stride) {
  V total[kTokens][kRanks];
  for (auto& of_token : total)
    for (V& value : of_token) value = zero();
  const bool ahead = kTokens == 1 && job.in <= kShortRow;
  int64_t i = 0;
  for (; i + kLanes <= job.in; i += kLanes) {
    V from[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) from[t] = load(x + t * job.x_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) {
      const V row = load(a + r * job.in + i);
      // Of the ranks that follow: short rows end before the processor has seen the pattern.
      if (ahead) __builtin_prefetch(a + (kRanks + r) * job.in + i);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) total[t][r] = fma(from[t], row, total[t][r]);
    }
  }
  if (i < job.in)
    for (int r = 0; r < kRanks; ++r) {
      const V row = load_first(a + r * job.in + i, job.in - i);
      for (int t = 0; t < kTokens; ++t)
        total[t][r] = fma(load_first(x + t * job.x_stride + i, job.in - i), row, total[t][r]);
    }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRanks; ++r) out[t * out_stride + r] = weight * sum_of_lanes(total[t][r]);
}

template <int kTokens, typename T>
void dots_of_ranks(const LoraJob& job, const float* x, const T* a, int64_t first, int64_t last,
                   float weight, float* out, int64_t out_stride) {
  int64_t r = first;
  for (; r + kShrinkRanks <= last; r += kShrinkRanks)
    dots<kTokens, kShrinkRanks>(job, x, a + r * job.in, weight, out + r, out_stride);
  for (; r < last; ++r) dots<kTokens, 1>(job, x, a + r * job.in, weight, out + r, out_stride);
}

template <typename T>
void shrink_typed(const LoraJob& job, const LoraSegment& segment, int64_t begin, int64_t end,
                  int64_t first, int64_t last, float* projected) {
  const T* a = static_cast<const T*>(segment.a);
  int64_t token = begin;
  for (; token + kShrinkTokens <= end; token += kShrinkTokens)
    dots_of_ranks<kShrinkTokens>(job, job.x + token * job.x_stride, a, first, last, segment.weight,
                                 projected + (token - segment.start) * segment.rank, segment.rank);
  for (; token < end; ++token)
    dots_of_ranks<1>(job, job.x + token * job.x_stride, a, first, last, segment.weight,
                     projected + (token - segment.start) * segment.rank, segment.rank);
}

void shrink(const LoraJob& job, const LoraSegment& segment, int64_t begin, int64_t end,
            int64_t first, int64_t last, float* projected) {
  if (segment.type == kFactorFloat)
    shrink_typed<float>(job, segment, begin, end, first, last, projected);
  else if (segment.type == kFactorBf16)
    shrink_typed<Bf16>(job, segment, begin, end, first, last, projected);
  else
    shrink_typed<Fp16>(job, segment, begin, end, first, last, projected);
}

// ---- expand --------------------------------------------------------------------------------

// All ranks for a tile of outputs that stays in registers: for many tokens.
template <int kTokens, int kVectors, typename T>
void sums(const LoraJob& job, const float* p, int64_t rank, const T* b, float* y) {
  V total[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) total[t][v] = load(y + t * job.y_stride + v * kLanes);
  for (int64_t r = 0; r < rank; ++r) {
    V row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + r * job.out + v * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const V projected = broadcast(p[t * rank + r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[t][v] = fma(projected, row[v], total[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) store(y + t * job.y_stride + v * kLanes, total[t][v]);
}

// The last outputs, fewer than a vector.
template <typename T>
void sums_of_rest(const LoraJob& job, const float* p, int64_t rank, const T* b, float* y,
                  int64_t count) {
  V total = load_first(y, count);
  for (int64_t r = 0; r < rank; ++r)
    total = fma(broadcast(p[r]), load_first(b + r * job.out, count), total);
  float values[kLanes];
  store(values, total);
  for (int64_t o = 0; o < count; ++o) y[o] = values[o];
}

template <int kTokens, typename T>
void sums_of_outputs(const LoraJob& job, const float* p, int64_t rank, const T* b, float* y,
                     int64_t first, int64_t last) {
  int64_t o = first;
  for (; o + kExpandVectors * kLanes <= last; o += kExpandVectors * kLanes)
    sums<kTokens, kExpandVectors>(job, p, rank, b + o, y + o);
  for (; o + kLanes <= last; o += kLanes) sums<kTokens, 1>(job, p, rank, b + o, y + o);
  if (o < last)
    for (int t = 0; t < kTokens; ++t)
      sums_of_rest(job, p + t * rank, rank, b + o, y + t * job.y_stride + o, last - o);
}

// A few ranks at a time over all outputs, y in the cache: for few tokens, whose time is that of
// reading B, which this does in long runs.
template <int kRanks, typename T>
void add_ranks(const float* p, const T* b, int64_t stride, float* y, int64_t count) {
  int64_t o = 0;
  for (; o + kLanes <= count; o += kLanes) {
    V total = load(y + o);
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) {
      __builtin_prefetch(b + (kRanks + r) * stride + o);
      total = fma(broadcast(p[r]), load(b + r * stride + o), total);
    }
    store(y + o, total);
  }
  if (o == count) return;
  V total = load_first(y + o, count - o);
  for (int r = 0; r < kRanks; ++r)
    total = fma(broadcast(p[r]), load_first(b + r * stride + o, count - o), total);
  float values[kLanes];
  store(values, total);
  for (int64_t i = 0; i + o < count; ++i) y[o + i] = values[i];
}

template <typename T>
void expand_few(const LoraJob& job, const LoraSegment& segment, const float* projected,
                int64_t first, int64_t last) {
  constexpr int kRanks = 4;
  const T* b = static_cast<const T*>(segment.b) + first;
  const int64_t rank = segment.rank;
  const auto each = [&](int64_t r, const auto& add) {
    const float* p = projected + r;
    for (int64_t token = segment.start; token < segment.end; ++token, p += rank)
      add(p, b + r * job.out, job.y + token * job.y_stride + first);
  };
  int64_t r = 0;
  for (; r + kRanks <= rank; r += kRanks)
    each(r, [&](const float* p, const T* rows, float* y) {
      add_ranks<kRanks>(p, rows, job.out, y, last - first);
    });
  for (; r < rank; ++r)
    each(r, [&](const float* p, const T* rows, float* y) {
      add_ranks<1>(p, rows, job.out, y, last - first);
    });
}

template <typename T>
void expand_typed(const LoraJob& job, const LoraSegment& segment, const float* projected,
                  int64_t first, int64_t last) {
  if (segment.end - segment.start < kExpandTokens)
    return expand_few<T>(job, segment, projected, first, last);
  const T* b = static_cast<const T*>(segment.b);
  int64_t token = segment.start;
  for (; token + kExpandTokens <= segment.end; token += kExpandTokens)
    sums_of_outputs<kExpandTokens>(job, projected + (token - segment.start) * segment.rank,
                                   segment.rank, b, job.y + token * job.y_stride, first, last);
  for (; token < segment.end; ++token)
    sums_of_outputs<1>(job, projected + (token - segment.start) * segment.rank, segment.rank, b,
                       job.y + token * job.y_stride, first, last);
}

void expand(const LoraJob& job, const LoraSegment& segment, const float* projected, int64_t first,
            int64_t last) {
  if (segment.type == kFactorFloat)
    expand_typed<float>(job, segment, projected, first, last);
  else if (segment.type == kFactorBf16)
    expand_typed<Bf16>(job, segment, projected, first, last);
  else
    expand_typed<Fp16>(job, segment, projected, first, last);
}
