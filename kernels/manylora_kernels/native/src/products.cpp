// See products.h.
#include "products.h"

#include <vector>

#include "int8.h"
#include "lora_fusion.h"

namespace manylora {
namespace {

bool is_product(const Instruction& from) {
  return from.code == kNf4Linear || from.code == kHalfLinear;
}

int64_t columns_of(const Instruction& from) {
  return from.code == kNf4Linear ? static_cast<const Nf4Matrix*>(from.weight)->in
                                 : static_cast<const HalfMatrix*>(from.weight)->in;
}

bool same(const Located& a, const Located& b) {
  return a.slot == b.slot && a.offset == b.offset && a.address == b.address;
}

// Whether two products may share what is made of x.
bool share(const InstructionList& list, int64_t i, int64_t j) {
  const Instruction& a = list.instructions[i];
  const Instruction& b = list.instructions[j];
  if (a.code != b.code || !same(list.places[i].a, list.places[j].a) ||
      columns_of(a) != columns_of(b) || list.places[i].size[0] != list.places[j].size[0] ||
      list.places[i].a_stride[0] != list.places[j].a_stride[0])
    return false;
  return a.code != kNf4Linear || static_cast<const Nf4Matrix*>(a.weight)->segment ==
                                     static_cast<const Nf4Matrix*>(b.weight)->segment;
}

// Products and the low-rank products of each (-1: none), by the instructions' numbers.
struct Group {
  int64_t products[kMostProducts];
  int64_t lora[kMostProducts];
  int64_t count = 0;
  int64_t end = 0;
};

Group group_at(const InstructionList& list, int64_t first, int64_t last) {
  Group group;
  for (int64_t i = first; i < last; ++i) {
    const Instruction& from = list.instructions[i];
    if (is_product(from)) {
      if (group.count == kMostProducts || (group.count > 0 && !share(list, first, i))) break;
      group.products[group.count] = i;
      group.lora[group.count++] = -1;
    } else if (from.code == kLora) {
      const int64_t of = group.products[group.count - 1];
      if (group.lora[group.count - 1] >= 0 || !same(list.places[of].out, list.places[i].out) ||
          !same(list.places[of].a, list.places[i].a))
        break;
      group.lora[group.count - 1] = i;
    } else if (from.code != kForeign && from.code != kRescale) {
      break;
    }
    group.end = i + 1;
  }
  return group;
}

void add_segments(const Instruction& from, const Step& step, std::vector<LoraSegment>& segments) {
  const Hook& hook = step.hooks[from.hook];
  const int64_t in = from.size[1].constant;
  const int64_t out = from.size[2].constant;
  for (int64_t type = 0; type < kHookPools; ++type) {
    const HookPool& pool = hook.pools[type];
    if (pool.runs < 0) continue;
    const LoraRuns& runs = step.lora[pool.runs];
    for (int64_t i = 0; i < runs.count; ++i)
      segments.push_back(
          lora_segment(runs.runs + 4 * i, runs.weights[i], type, pool.a, pool.b, in, out));
  }
}

LoraJob lora_job(const Instruction& from, const Bound& at, const Step& step,
                 const LoraSegment* segments, size_t count) {
  return {segments,        static_cast<int64_t>(count),
          at.a.in(step),   at.out.in(step),
          from.size[1].constant, from.size[2].constant,
          at.a_stride[0],  at.out_stride[0]};
}

bool run_linear(const InstructionList& list, const Group& group, const Fusion& fusion,
                const Step& step) {
  const int isa = static_cast<int>(step.isa);
  const int threads = static_cast<int>(step.threads);
  const auto from = [&](int64_t i) -> const Instruction& {
    return list.instructions[group.products[i]];
  };
  const auto at = [&](int64_t i) -> const Bound& { return list.places[group.products[i]]; };
  if (from(0).code == kHalfLinear) {
    HalfJob jobs[kMostProducts];
    for (int64_t i = 0; i < group.count; ++i) {
      const auto& weight = *static_cast<const HalfMatrix*>(from(i).weight);
      jobs[i] = {weight.tiles,      at(i).a.in(step), from(i).bias, at(i).out.in(step),
                 weight.kind,       weight.out,       weight.in,    at(i).size[0],
                 at(i).a_stride[0], weight.scale};
    }
    return half_linear(jobs, group.count, fusion, isa, threads) == 0;
  }
  Nf4Job jobs[kMostProducts];
  for (int64_t i = 0; i < group.count; ++i)
    jobs[i] = {*static_cast<const Nf4Matrix*>(from(i).weight),
               at(i).a.in(step),
               at(i).out.in(step),
               from(i).bias,
               at(i).size[0],
               at(i).out_stride[0]};
  if (step.math == kFloatMath) return nf4_linear(jobs, group.count, fusion, isa, threads);
  return nf4_linear_int8(jobs, group.count, fusion, isa, step.math == kInt8AmxMath, threads);
}

}  // namespace

int64_t run_products(const InstructionList& list, int64_t first, const Step& step) {
  const Group group = group_at(list, first, list.last);
  std::vector<LoraSegment> segments;
  size_t ends[kMostProducts];
  for (int64_t i = 0; i < group.count; ++i) {
    if (group.lora[i] >= 0) add_segments(list.instructions[group.lora[i]], step, segments);
    ends[i] = segments.size();
  }
  if (segments.empty()) {
    return run_linear(list, group, nothing_fused(), step) ? group.end : -1;
  }
  LoraJob jobs[kMostProducts];
  for (int64_t i = 0; i < group.count; ++i) {
    const size_t begin = i == 0 ? 0 : ends[i - 1];
    // Without low-rank products, a job without segments, whatever it is read from.
    const int64_t lora = group.lora[i] >= 0 ? group.lora[i] : group.products[i];
    jobs[i] = lora_job(list.instructions[lora], list.places[lora], step, segments.data() + begin,
                       ends[i] - begin);
  }
  const LoraFusion fusion(jobs, group.count, static_cast<int>(step.isa));
  if (!fusion.has_memory()) return -1;
  return run_linear(list, group, fusion, step) ? group.end : -1;
}

bool run_lora(const Instruction& from, const Bound& at, const Step& step) {
  std::vector<LoraSegment> segments;
  add_segments(from, step, segments);
  return segments.empty() ||
         lora_delta(lora_job(from, at, step, segments.data(), segments.size()),
                    static_cast<int>(step.isa), static_cast<int>(step.threads));
}

}  // namespace manylora
