// Plain C++ for any processor; the compiler vectorizes the loops over lanes as it can.
#include "elements.h"
#include "runtime.h"

namespace manylora {
namespace {

#include "vector_portable.h"
#include "vector_math.h"

inline V square_root(const V& a) {
  V v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = __builtin_sqrtf(a.lane[i]);
  return v;
}

#include "element_kernels.h"

}  // namespace

const ElementKernels kElementsPortable = {unary, binary, sum};

const ElementKernels& element_kernels(int isa) {
#if defined(__x86_64__)
  if (isa == kAvx512) return kElementsAvx512;
  if (isa == kAvx2) return kElementsAvx2;
#endif
  (void)isa;
  return kElementsPortable;
}

}  // namespace manylora
