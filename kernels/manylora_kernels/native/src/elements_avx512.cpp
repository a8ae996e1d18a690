// AVX-512. Compiled for it whatever the command line says, and called only where it runs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx2,fma")
#endif
#include <immintrin.h>

#include "elements.h"

namespace manylora {
namespace {

#include "vector_avx512.h"
#include "vector_math.h"

inline V square_root(V v) { return _mm512_sqrt_ps(v); }

#include "element_kernels.h"

}  // namespace

const ElementKernels kElementsAvx512 = {unary, binary, sum};

}  // namespace manylora
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
