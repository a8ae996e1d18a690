// Float vectors of AVX2 with FMA. Included inside the anonymous namespace of a source file that
// compiles for it, after <immintrin.h>, as nf4_kernels.h says.

using V = __m256;
constexpr int kLanes = 8;

inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V broadcast(float f) { return _mm256_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void look_up(const float* table, const uint8_t* q, float* out) {
  for (int r = 0; r < kPanelRows; ++r) out[r] = table[q[r]];
}
