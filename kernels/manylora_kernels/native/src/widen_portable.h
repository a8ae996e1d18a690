// Loads of 16-bit floats beside vector_portable.h, after which it is included.

template <typename Half>
inline V load(const Half* p) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = widened(p[i]);
  return v;
}
