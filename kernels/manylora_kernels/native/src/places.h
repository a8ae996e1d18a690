// Where an instruction's operands lie for one number of tokens and outputs.
#pragma once

#include "program.h"

namespace manylora {

// An operand's place for one number of tokens: `slot` in the arena, or an address.
struct Located {
  int64_t slot;
  int64_t offset;
  const float* address;

  float* in(const Step& step) const {
    if (address != nullptr) return const_cast<float*>(address) + offset;
    return step.slots[slot] + offset;
  }
};

// An instruction with its sizes worked out; neighbouring dimensions that can be walked as one are.
struct Bound {
  int64_t dims;
  int64_t size[kMaxDims];
  int64_t out_stride[kMaxDims];
  int64_t a_stride[kMaxDims];
  int64_t b_stride[kMaxDims];
  int64_t c_stride[kMaxDims];
  Located out;
  Located a;
  Located b;
  Located c;
};

Bound bound(const Instruction& from, int64_t tokens, int64_t outputs);

}  // namespace manylora
