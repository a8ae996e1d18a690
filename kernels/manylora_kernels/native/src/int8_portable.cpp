// Plain C++ for any processor; the compiler vectorizes the loops over lanes as it can.
#include "int8.h"

namespace manylora {
namespace {

#include "vector_portable.h"
#include "panel_portable.h"

constexpr int kTileTokens = 4;
constexpr bool kBalanced = false;

constexpr int panels_at_once(int) { return 1; }

void round_code(const float* code, int8_t* book);

struct I {
  int32_t lane[kLanes];
};

inline I broadcast_int(int32_t value) {
  I sum;
  for (int r = 0; r < kLanes; ++r) sum.lane[r] = value;
  return sum;
}
inline V to_float(const I& sum) {
  V v;
  for (int r = 0; r < kLanes; ++r) v.lane[r] = static_cast<float>(sum.lane[r]);
  return v;
}

struct W {
  int8_t column[4][kLanes];
};

inline I dot(I sum, const W& w, const int8_t* x) {
  for (int b = 0; b < 4; ++b)
    for (int r = 0; r < kLanes; ++r) sum.lane[r] += w.column[b][r] * x[b];
  return sum;
}

struct Book {
  int8_t book[16];

  explicit Book(const float* code) { round_code(code, book); }

  W unpack(const uint8_t* dwords, int half) const {
    const int shift = half == 0 ? 4 : 0;
    W w;
    for (int b = 0; b < 4; ++b)
      for (int r = 0; r < kLanes; ++r) w.column[b][r] = book[(dwords[4 * r + b] >> shift) & 15];
    return w;
  }
};

#include "int8_kernels.h"

}  // namespace

const Int8Kernels kInt8Portable = {kTileTokens, kPadded, kItemPanels, quantize, rows, scratch_bytes};

}  // namespace manylora
