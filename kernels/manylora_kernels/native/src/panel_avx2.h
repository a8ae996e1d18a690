// What kernels over panels need beside vector_avx2.h, after which it is included.

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void look_up(const float* table, const uint8_t* q, float* out) {
  for (int r = 0; r < kPanelRows; ++r) out[r] = table[q[r]];
}
