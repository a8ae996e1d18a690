// Element by element operations over dense rows: what each instruction set provides.
#pragma once

#include <cstdint>

namespace manylora {

// As Python numbers them (native/program.py).
enum Unary : int64_t {
  kCopy = 0,
  kNegate,
  kSquare,
  kInverseRoot,
  kSigmoid,
  kSilu,
  kTanh,
  kGeluTanh,
  kRelu,
  kExponential,
};
enum Binary : int64_t { kAdd = 0, kSubtract, kMultiply, kDivide };

// A result's bits depend on its operands only, not on its place in a row.
struct ElementKernels {
  void (*unary)(int64_t function, int64_t count, float* out, const float* a);
  // Where `a_repeats` or `b_repeats`, that operand is one element. Add and subtract multiply b by
  // `factor` first.
  void (*binary)(int64_t function, int64_t count, float* out, const float* a, bool a_repeats,
                 const float* b, bool b_repeats, float factor);
  // Four sums of every fourth vector, added in pairs, then the lanes by halves.
  float (*sum)(int64_t count, const float* a);
};

extern const ElementKernels kElementsPortable;
#if defined(__x86_64__)
extern const ElementKernels kElementsAvx2;
extern const ElementKernels kElementsAvx512;
#endif

const ElementKernels& element_kernels(int isa);

}  // namespace manylora
