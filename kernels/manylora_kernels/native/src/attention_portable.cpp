// Plain C++ for any processor; the compiler vectorizes the loops over lanes as it can.
#include "attention.h"

namespace manylora {
namespace {

constexpr int kRowTile = 4;
constexpr int kSums = 4;
constexpr int kValueColumns = 1;

#include "vector_portable.h"
#include "vector_math.h"

#include "attention_tile.h"

#include "attention_kernels.h"

}  // namespace

const AttentionKernels kAttentionPortable = {scratch_floats, attend, attend_part, combine};

}  // namespace manylora
