// Vectors in plain C++, which the compiler maps to what the processor has. Include inside an
// anonymous namespace.
constexpr int kLanes = 8;

struct V {
  float lane[kLanes];
};

inline V broadcast(float f) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = f;
  return v;
}
inline V zero() { return broadcast(0.0f); }
inline V load(const float* p) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = p[i];
  return v;
}
template <typename Half>
inline V load(const Half* p) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = widened(p[i]);
  return v;
}
inline void store(float* p, const V& v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v.lane[i];
}
inline V mul(const V& a, const V& b) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] * b.lane[i];
  return v;
}
inline V add(const V& a, const V& b) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] + b.lane[i];
  return v;
}
inline V fma(const V& a, const V& b, const V& c) {
  V v;
  // Fused only where the processor does it: a call of the library's fmaf would cost far more.
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) v.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
#else
  for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
#endif
  return v;
}
// The sum of the lanes: halves onto each other, until one is left.
inline float sum(V v) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v.lane[i] += v.lane[i + width];
  return v.lane[0];
}
