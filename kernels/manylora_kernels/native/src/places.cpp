// See places.h.
#include "places.h"

namespace manylora {
namespace {

Located located(const Operand& operand, const Instruction& from, int64_t tokens, int64_t outputs) {
  const int64_t offset = operand.offset.at(tokens, outputs);
  switch (operand.place) {
    case kAddress: return {0, offset, reinterpret_cast<const float*>(operand.base)};
    case kScalar: return {0, 0, &from.scalar};
    default: return {operand.base, offset, nullptr};
  }
}

}  // namespace

Bound bound(const Instruction& from, int64_t tokens, int64_t outputs) {
  Bound to{};
  to.out = located(from.out, from, tokens, outputs);
  to.a = located(from.a, from, tokens, outputs);
  to.b = located(from.b, from, tokens, outputs);
  to.c = located(from.c, from, tokens, outputs);
  if (from.code == kAttention) {
    // The strides between heads and between tokens.
    for (int i = 0; i < 2; ++i) {
      to.a_stride[i] = from.a.stride[i].at(tokens, outputs);
      to.b_stride[i] = from.b.stride[i].at(tokens, outputs);
      to.c_stride[i] = from.c.stride[i].at(tokens, outputs);
    }
    return to;
  }
  const bool rows = from.code == kMean;
  if (from.code != kUnary && from.code != kBinary && !rows) {
    // Matrices: the number of rows, and the strides between them.
    to.dims = 1;
    to.size[0] = from.size[0].at(tokens, outputs);
    to.out_stride[0] = from.out.stride[0].at(tokens, outputs);
    to.a_stride[0] = from.a.stride[0].at(tokens, outputs);
    return to;
  }
  for (int64_t i = 0; i < from.dims; ++i) {
    const int64_t size = from.size[i].at(tokens, outputs);
    if (size == 1) continue;
    const int64_t out = from.out.stride[i].at(tokens, outputs);
    const int64_t a = from.a.stride[i].at(tokens, outputs);
    const int64_t b = from.b.stride[i].at(tokens, outputs);
    const int64_t last = to.dims - 1;
    if (to.dims > 0 && to.out_stride[last] == size * out && to.a_stride[last] == size * a &&
        to.b_stride[last] == size * b) {
      to.size[last] *= size;
    } else {
      to.size[to.dims++] = size;
    }
    to.out_stride[to.dims - 1] = out;
    to.a_stride[to.dims - 1] = a;
    to.b_stride[to.dims - 1] = b;
  }
  if (rows) {
    // The summed dimension comes last, whatever its size.
    to.size[to.dims] = from.size[from.dims].at(tokens, outputs);
    to.a_stride[to.dims] = from.a.stride[from.dims].at(tokens, outputs);
  } else if (to.dims == 0) {
    to.dims = 1;
    to.size[0] = 1;
    to.out_stride[0] = to.a_stride[0] = to.b_stride[0] = 1;
  }
  return to;
}

}  // namespace manylora
