// What kernels over panels need beside vector_avx512.h, after which it is included.

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void look_up(const float* table, const uint8_t* q, float* out) {
  const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  _mm512_storeu_ps(out, _mm512_i32gather_ps(at, table, 4));
}
