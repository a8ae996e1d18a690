// What kernels over panels need beside vector_portable.h, after which it is included.

// In `multiply` it would keep the compiler from vectorizing the loop.
inline void prefetch(const void*) {}
inline void look_up(const float* table, const uint8_t* q, float* out) {
  for (int r = 0; r < kPanelRows; ++r) out[r] = table[q[r]];
}
