// The low-rank products of several layers over one x, in the regions of the layers' own products:
// x is shrunk beside its packing; of many tokens, each item's outputs are expanded into while they
// are in the cache, so y is not read a second time. Of few tokens y is small and B large: outputs are
// expanded in long runs, for which B is fetched during the layers' arithmetic.
#pragma once

#include "fusion.h"
#include "lora.h"

namespace manylora {

class LoraFusion : public Fusion {
 public:
  // jobs[i] belongs to product i; one without segments changes nothing. Its y is ready when
  // `after` is called.
  LoraFusion(const LoraJob* jobs, int64_t count, int isa);

  bool has_memory() const { return projected_.data() != nullptr; }
  // Rank rows times tokens of all jobs.
  int64_t projections() const { return projections_; }
  int64_t items_before() const override { return items_; }
  void before(int64_t item) const override;
  void after(const Outputs& outputs) const override;
  int64_t outputs_at_once() const override;
  int64_t reads(const Outputs& outputs, LineRun* runs) const override;

 private:
  const LoraJob* jobs_;
  int64_t count_;
  const LoraKernels& kernels_;
  int64_t projections_;
  int64_t items_;
  Scratch projected_;
};

}  // namespace manylora
