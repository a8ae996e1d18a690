// Vectors of AVX2 with FMA and F16C. Include inside an anonymous namespace, after the target was
// set: nothing here may be shared between source files of different targets.
using V = __m256;
constexpr int kLanes = 8;

inline V zero() { return _mm256_setzero_ps(); }
inline V broadcast(float f) { return _mm256_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline V load(const Fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }

// The sum of the lanes: halves onto each other, until one is left.
inline float sum(V v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
