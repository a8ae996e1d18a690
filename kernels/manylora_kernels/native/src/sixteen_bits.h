// 16-bit floats in memory. Widening is exact.
#pragma once

#include <cstdint>
#include <cstring>

namespace manylora {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widened(float value) { return value; }
inline float widened(Bf16 value) { return from_bits(uint32_t{value.bits} << 16); }
inline float widened(Fp16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Infinities and NaN keep their payload; all else is a power of two away from its float.
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;
  return (sign != 0) ? -scaled : scaled;
}

}  // namespace manylora
