// The linear layers of a replayed pass, with the low-rank products of their adapters.
#pragma once

#include "places.h"

namespace manylora {

struct InstructionList {
  const Instruction* instructions;
  const Bound* places;
  int64_t last;  // where this run ends
  int64_t size;  // of the whole pass
};

// Runs the product at `first`, and with it those that follow over the same operand, each with its
// low-rank products. Returns where they end, or -1 where memory is short. What may stand between
// them: places where the caller could have taken over, and rescaling, which is left to the caller.
int64_t run_products(const InstructionList& list, int64_t first, const Step& step);

// A hook's low-rank products by themselves. False: no memory.
bool run_lora(const Instruction& from, const Bound& at, const Step& step);

}  // namespace manylora
