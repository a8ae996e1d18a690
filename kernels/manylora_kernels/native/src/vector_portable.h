// Float vectors as plain arrays. Included inside an anonymous namespace, as nf4_kernels.h says.

constexpr int kLanes = 16;

struct V {
  float lane[kLanes];
};

inline V load(const float* p) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = p[i];
  return v;
}
inline void store(float* p, const V& v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v.lane[i];
}
inline V broadcast(float f) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = f;
  return v;
}
inline V zero() { return broadcast(0.0f); }
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

// In `multiply` it would keep the compiler from vectorizing the loop.
inline void prefetch(const void*) {}
inline void look_up(const float* table, const uint8_t* q, float* out) {
  for (int r = 0; r < kPanelRows; ++r) out[r] = table[q[r]];
}
