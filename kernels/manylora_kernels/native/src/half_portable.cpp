// Plain C++ for any processor; the compiler vectorizes the loops over lanes as it can.
#include "half.h"

namespace manylora {
namespace {

constexpr int kTileTokens = 4;
constexpr int kSums = 4;
constexpr int64_t kPanelsAtOnce = 4;

#include "vector_portable.h"

inline float from_bits(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

struct Bfloat16 {
  static constexpr int64_t kTile = kTileHalves;
  static V column(const uint16_t* tile, int row, int which) {
    V v;
    for (int i = 0; i < kLanes; ++i)
      v.lane[i] = from_bits(static_cast<uint32_t>(tile[2 * (row + i) + which]) << 16);
    return v;
  }
};

struct Float16 {
  static constexpr int64_t kTile = kTileHalves;
  static V column(const uint16_t* tile, int row, int which) {
    V v;
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t half = tile[which * kHalfRows + row + i];
      // The exponent's bias differs by 112; a product with 2^112 also makes subnormals normal.
      const float size = from_bits((half & 0x7fff) << 13) * 0x1p112f;
      const bool finite = (half & 0x7c00) != 0x7c00;
      const float wide = finite ? size : from_bits(0x7f800000 | (half & 0x3ff) << 13);
      v.lane[i] = half & 0x8000 ? -wide : wide;
    }
    return v;
  }
};

struct Int8 {
  static constexpr int64_t kTile = kInt8TileHalves;
  static V column(const uint16_t* tile, int row, int which) {
    const auto* bytes = reinterpret_cast<const int8_t*>(tile) + which * kHalfRows + row;
    V v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = static_cast<float>(bytes[i]);
    return v;
  }
};

#include "half_kernels.h"

}  // namespace

const HalfKernels kHalfPortable = {kTileTokens, kPanelsAtOnce, pack, multiply};

}  // namespace manylora
