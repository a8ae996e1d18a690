// Eight floats of AVX2 with FMA and F16C; see vector_avx512.h for what each function does.

using V = __m256;
constexpr int kLanes = 8;

inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V broadcast(float f) { return _mm256_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }

inline __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline V load_part(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_part(float* p, int64_t n, V v) { _mm256_maskstore_ps(p, first_lanes(n), v); }

inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline V where_less(V a, V b, V x, V y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline V magnitude(V v) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}
inline V with_sign(V size, V sign) {
  return _mm256_or_ps(size, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
inline V power_of_two(V bits) {
  const __m256i n = _mm256_add_epi32(_mm256_castps_si256(bits), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}

inline void transpose4(const float* const* rows, int64_t column, V out[4]) {
  V r[4];
  for (int i = 0; i < 4; ++i)
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + column)),
                                _mm_loadu_ps(rows[4 + i] + column), 1);
  const V low01 = _mm256_unpacklo_ps(r[0], r[1]);
  const V low23 = _mm256_unpacklo_ps(r[2], r[3]);
  const V high01 = _mm256_unpackhi_ps(r[0], r[1]);
  const V high23 = _mm256_unpackhi_ps(r[2], r[3]);
  out[0] = _mm256_shuffle_ps(low01, low23, 0x44);
  out[1] = _mm256_shuffle_ps(low01, low23, 0xee);
  out[2] = _mm256_shuffle_ps(high01, high23, 0x44);
  out[3] = _mm256_shuffle_ps(high01, high23, 0xee);
}
