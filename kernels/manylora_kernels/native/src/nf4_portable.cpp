// Plain C++ for any processor; the compiler vectorizes the loops over lanes as it can.
#include "nf4.h"

namespace manylora {
namespace {

#include "vector_portable.h"
#include "panel_portable.h"

constexpr int kFewTokens = 2;
constexpr int kTileTokens = 4;
constexpr int kPanelsAtOnce = 1;
constexpr int64_t kBlockColumns = 256;

constexpr int few_panels_at_once(int) { return 1; }

struct Code {
  const float* book;

  explicit Code(const float* code) : book(code) {}

  void unpack(const uint8_t* dwords, int half, V out[4]) const {
    const int shift = half == 0 ? 4 : 0;
    for (int b = 0; b < 4; ++b)
      for (int r = 0; r < kLanes; ++r) out[b].lane[r] = book[(dwords[4 * r + b] >> shift) & 15];
  }
};

#include "nf4_kernels.h"

}  // namespace

const Nf4Kernels kNf4Portable = {kFewTokens, kTileTokens, kPanelsAtOnce, kBlockColumns,
                                 pack,       few,         many};

}  // namespace manylora
