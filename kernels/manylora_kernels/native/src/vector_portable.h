// Sixteen floats in plain C++; the compiler vectorizes the loops over lanes as it can. See
// vector_avx512.h for what each function does.

constexpr int kLanes = 16;

struct V {
  float lane[kLanes];
};

inline V load_part(const float* p, int64_t n) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = i < n ? p[i] : 0.0f;
  return v;
}
inline void store_part(float* p, int64_t n, const V& v) {
  for (int64_t i = 0; i < n; ++i) p[i] = v.lane[i];
}
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
inline V sub(const V& a, const V& b) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] - b.lane[i];
  return v;
}
inline V div(const V& a, const V& b) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] / b.lane[i];
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
inline V larger(const V& a, const V& b) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return v;
}
inline V where_less(const V& a, const V& b, const V& x, const V& y) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i];
  return v;
}
inline V magnitude(const V& a) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = __builtin_fabsf(a.lane[i]);
  return v;
}
inline V with_sign(const V& size, const V& sign) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = __builtin_copysignf(size.lane[i], sign.lane[i]);
  return v;
}
inline V power_of_two(const V& bits) {
  V v;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t n;
    __builtin_memcpy(&n, &bits.lane[i], sizeof n);
    n = (n + 127) << 23;
    __builtin_memcpy(&v.lane[i], &n, sizeof n);
  }
  return v;
}

inline void transpose4(const float* const* rows, int64_t column, V out[4]) {
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kLanes; ++lane) out[i].lane[lane] = rows[lane][column + i];
}
