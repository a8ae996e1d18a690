// Float vectors of AVX-512F. Included inside the anonymous namespace of a source file that compiles
// for it, after <immintrin.h>, as nf4_kernels.h says.

using V = __m512;
constexpr int kLanes = 16;

inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V broadcast(float f) { return _mm512_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void look_up(const float* table, const uint8_t* q, float* out) {
  const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  _mm512_storeu_ps(out, _mm512_i32gather_ps(at, table, 4));
}
