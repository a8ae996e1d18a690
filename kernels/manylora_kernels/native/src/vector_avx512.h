// Sixteen floats of AVX-512F (BW for the half-width loads). Included inside an anonymous namespace
// by sources that are compiled for it; see vector_math.h for what is built on it.

using V = __m512;
constexpr int kLanes = 16;

inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V broadcast(float f) { return _mm512_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
// The first n lanes, zero in the others, whose memory is not touched.
inline V load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_part(float* p, int64_t n, V v) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }

// The larger of each pair; b where either is NaN.
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
// x where a < b, else y, which includes NaN.
inline V where_less(V a, V b, V x, V y) {
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}
inline V magnitude(V v) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}
inline V with_sign(V size, V sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_or_si512(
      _mm512_castps_si512(size), _mm512_and_si512(_mm512_castps_si512(sign), bit)));
}
// 2^n for n in the low bits of a float's mantissa, -126 <= n <= 127.
inline V power_of_two(V bits) {
  const __m512i n = _mm512_add_epi32(_mm512_castps_si512(bits), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
}

// Four neighbouring columns of kLanes rows: out[i] holds column i, a row to a lane.
inline void transpose4(const float* const* rows, int64_t column, V out[4]) {
  V r[4];
  for (int i = 0; i < 4; ++i) {
    V v = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + column));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[4 + i] + column), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[8 + i] + column), 2);
    r[i] = _mm512_insertf32x4(v, _mm_loadu_ps(rows[12 + i] + column), 3);
  }
  const V low01 = _mm512_unpacklo_ps(r[0], r[1]);
  const V low23 = _mm512_unpacklo_ps(r[2], r[3]);
  const V high01 = _mm512_unpackhi_ps(r[0], r[1]);
  const V high23 = _mm512_unpackhi_ps(r[2], r[3]);
  out[0] = _mm512_shuffle_ps(low01, low23, 0x44);
  out[1] = _mm512_shuffle_ps(low01, low23, 0xee);
  out[2] = _mm512_shuffle_ps(high01, high23, 0x44);
  out[3] = _mm512_shuffle_ps(high01, high23, 0xee);
}
