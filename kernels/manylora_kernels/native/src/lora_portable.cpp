// Plain C++ for any processor; the compiler vectorizes the loops over lanes as it can.
#include "lora.h"

namespace manylora {
namespace {

#include "vector_portable.h"
#include "vector_math.h"
#include "widen_portable.h"

constexpr int kShrinkTokens = 2;
constexpr int kShrinkRanks = 2;
constexpr int kExpandTokens = 2;
constexpr int kExpandVectors = 2;

#include "lora_kernels.h"

}  // namespace

const LoraKernels kLoraPortable = {shrink, expand};

}  // namespace manylora
