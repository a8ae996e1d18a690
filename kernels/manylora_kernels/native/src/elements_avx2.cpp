// AVX2 with FMA. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#include "elements.h"

namespace manylora {
namespace {

#include "vector_avx2.h"
#include "vector_math.h"

inline V square_root(V v) { return _mm256_sqrt_ps(v); }

#include "element_kernels.h"

}  // namespace

const ElementKernels kElementsAvx2 = {unary, binary, sum};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
