// Replays a recorded forward pass: see program.h.
#include "program.h"

#include <map>
#include <new>
#include <utility>
#include <vector>

#include "attention.h"
#include "elements.h"
#include "int8.h"
#include "lora.h"
#include "runtime.h"

namespace manylora {

namespace {

// Elements that one thread should have, at least, before another is woken.
constexpr int64_t kShare = 1 << 14;
// Opening a team costs as much as one region, so it pays where at least as many products follow.
constexpr int kTeamProducts = 2;
// Numbers of tokens and outputs whose addresses are remembered.
constexpr size_t kRemembered = 256;

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

Located located(const Operand& operand, const Instruction& from, int64_t tokens, int64_t outputs) {
  const int64_t offset = operand.offset.at(tokens, outputs);
  switch (operand.place) {
    case kAddress: return {0, offset, reinterpret_cast<const float*>(operand.base)};
    case kScalar: return {0, 0, &from.scalar};
    default: return {operand.base, offset, nullptr};
  }
}

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

// Calls row(out offset, a offset, b offset) for rows [first, last) of the outer dimensions.
template <typename Row>
void for_rows(const Bound& at, int64_t outer_dims, int64_t first, int64_t last, const Row& row) {
  for (int64_t number = first; number < last; ++number) {
    int64_t rest = number;
    int64_t out = 0;
    int64_t a = 0;
    int64_t b = 0;
    for (int64_t i = outer_dims - 1; i >= 0; --i) {
      const int64_t index = rest % at.size[i];
      rest /= at.size[i];
      out += index * at.out_stride[i];
      a += index * at.a_stride[i];
      b += index * at.b_stride[i];
    }
    row(out, a, b);
  }
}

template <typename Part>
void in_parallel(int threads, int64_t rows, int64_t row_length, const Part& part) {
  const int64_t share = quotient_up(kShare, row_length < 1 ? 1 : row_length);
  if (threads == 1 || rows < 2 * share) return part(0, rows);
  const int64_t size = quotient_up(rows, threads) < share ? share : quotient_up(rows, threads);
  parallel(threads, rows, size, [&](int, int64_t first, int64_t last) { part(first, last); });
}

int64_t outer_rows(const Bound& at, int64_t outer_dims) {
  int64_t rows = 1;
  for (int64_t i = 0; i < outer_dims; ++i) rows *= at.size[i];
  return rows;
}

void elements(const Instruction& from, const Bound& at, const Step& step,
              const ElementKernels& kernels) {
  float* const out = at.out.in(step);
  const float* const a = at.a.in(step);
  const bool binary = from.code == kBinary;
  const float* const b = binary ? at.b.in(step) : a;
  const float factor = from.b.place == kScalar ? 1.0f : from.scalar;
  const int64_t inner = at.dims - 1;
  const int64_t count = at.size[inner];
  const int64_t a_step = at.a_stride[inner];
  const int64_t b_step = binary ? at.b_stride[inner] : 1;
  const bool dense = at.out_stride[inner] == 1 && (a_step == 1 || (binary && a_step == 0)) &&
                     (b_step == 1 || b_step == 0);
  in_parallel(step.threads, outer_rows(at, inner), count, [&](int64_t first, int64_t last) {
    for_rows(at, inner, first, last, [&](int64_t o, int64_t i, int64_t j) {
      if (dense && binary) {
        kernels.binary(from.function, count, out + o, a + i, a_step == 0, b + j, b_step == 0,
                       factor);
      } else if (dense) {
        kernels.unary(from.function, count, out + o, a + i);
      } else {
        for (int64_t k = 0; k < count; ++k) {
          float* to = out + o + k * at.out_stride[inner];
          if (binary)
            kernels.binary(from.function, 1, to, a + i + k * a_step, false, b + j + k * b_step,
                           false, factor);
          else
            kernels.unary(from.function, 1, to, a + i + k * a_step);
        }
      }
    });
  });
}

void mean(const Bound& at, const Step& step, const ElementKernels& kernels) {
  float* const out = at.out.in(step);
  const float* const a = at.a.in(step);
  const int64_t count = at.size[at.dims];
  in_parallel(step.threads, outer_rows(at, at.dims), count, [&](int64_t first, int64_t last) {
    for_rows(at, at.dims, first, last, [&](int64_t o, int64_t i, int64_t) {
      out[o] = kernels.sum(count, a + i) / static_cast<float>(count);
    });
  });
}

bool lora(const Instruction& from, const Bound& at, const Step& step) {
  const Hook& hook = step.hooks[from.hook];
  const int64_t in = from.size[1].constant;
  const int64_t out = from.size[2].constant;
  std::vector<LoraSegment> segments;
  for (int64_t type = 0; type < kHookPools; ++type) {
    const HookPool& pool = hook.pools[type];
    if (pool.runs < 0) continue;
    const LoraRuns& runs = step.lora[pool.runs];
    for (int64_t i = 0; i < runs.count; ++i)
      segments.push_back(
          lora_segment(runs.runs + 4 * i, runs.weights[i], type, pool.a, pool.b, in, out));
  }
  if (segments.empty()) return true;
  return lora_delta({segments.data(), static_cast<int64_t>(segments.size()), at.a.in(step),
                     at.out.in(step), in, out, at.a_stride[0], at.out_stride[0]},
                    static_cast<int>(step.isa), static_cast<int>(step.threads));
}

void rescale(const Instruction& from, const Bound& at, const Step& step,
             const ElementKernels& kernels) {
  const Hook& hook = step.hooks[from.hook];
  if (hook.rescale < 0) return;
  const RescaleRuns& runs = step.rescale[hook.rescale];
  const int64_t width = from.size[2].constant;
  for (int64_t i = 0; i < runs.count; ++i) {
    const int32_t* run = runs.runs + 3 * i;
    for (int64_t token = run[0]; token < run[1]; ++token) {
      float* y = at.out.in(step) + token * at.out_stride[0];
      kernels.binary(kMultiply, width, y, y, false, hook.scale + run[2] * width, false, 1.0f);
      kernels.binary(kAdd, width, y, y, false, hook.shift + run[2] * width, false, 1.0f);
    }
  }
}

bool nf4(const Instruction& from, const Bound& at, const Step& step) {
  const Nf4Job job{*static_cast<const Nf4Matrix*>(from.weight), at.a.in(step), at.out.in(step),
                   from.bias, at.size[0], at.out_stride[0]};
  const int isa = static_cast<int>(step.isa);
  const int threads = static_cast<int>(step.threads);
  if (step.math == kFloatMath) return nf4_linear(job, isa, threads);
  return nf4_linear_int8(job, isa, step.math == kInt8AmxMath, threads);
}

bool half(const Instruction& from, const Bound& at, const Step& step) {
  const auto& weight = *static_cast<const HalfMatrix*>(from.weight);
  return half_linear({weight.tiles, at.a.in(step), from.bias, at.out.in(step), weight.kind,
                      weight.out, weight.in, at.size[0], at.a_stride[0], weight.scale},
                     static_cast<int>(step.isa), static_cast<int>(step.threads)) == 0;
}

bool attention(const Instruction& from, const Bound& at, const Step& step) {
  const auto& layer = *static_cast<const AttentionLayer*>(from.weight);
  const Pages& pages = step.pages;
  const LayerCache& cache = pages.layers[layer.layer];
  StoreJob store{};
  store.k = reinterpret_cast<const char*>(at.b.in(step));
  store.v = reinterpret_cast<const char*>(at.c.in(step));
  store.k_cache = reinterpret_cast<char*>(cache.k);
  store.v_cache = reinterpret_cast<char*>(cache.v);
  store.positions = pages.positions;
  store.k_head_stride = at.b_stride[0];
  store.k_token_stride = at.b_stride[1];
  store.v_head_stride = at.c_stride[0];
  store.v_token_stride = at.c_stride[1];
  store.tokens = step.tokens;
  store.kv_heads = layer.kv_heads;
  store.key_dim = layer.key_dim;
  store.value_dim = layer.value_dim;
  store.places = pages.blocks * pages.block_tokens;
  store.item_bytes = sizeof(float);
  const int threads = static_cast<int>(step.threads);
  if (store_kv(store, threads) != kDone) return false;
  AttentionJob job{};
  job.q = at.a.in(step);
  job.k_cache = cache.k;
  job.v_cache = cache.v;
  job.block_tables = pages.block_tables;
  job.context_lens = pages.context_lens;
  job.query_starts = pages.query_starts;
  job.sinks = layer.sinks;
  job.out = at.out.in(step);
  job.q_head_stride = at.a_stride[0];
  job.q_token_stride = at.a_stride[1];
  job.queries = step.tokens;
  job.sequences = pages.sequences;
  job.table_width = pages.table_width;
  job.heads = layer.heads;
  job.kv_heads = layer.kv_heads;
  job.key_dim = layer.key_dim;
  job.value_dim = layer.value_dim;
  job.blocks = pages.blocks;
  job.block_tokens = pages.block_tokens;
  job.window = layer.window;
  job.scale = layer.scale;
  job.softcap = layer.softcap;
  return paged_attention(job, static_cast<int>(step.isa), threads) == kDone;
}

}  // namespace

class Program {
 public:
  Program(const Instruction* instructions, int64_t count)
      : instructions_(instructions, instructions + count) {}

  // Whether instructions [first, last) have work for a team of threads that stays together.
  bool wants_team(int64_t first, int64_t last) const {
    int products = 0;
    for (int64_t i = first; i < last && products < kTeamProducts; ++i) {
      const int64_t code = instructions_[i].code;
      products += code == kNf4Linear || code == kHalfLinear || code == kAttention;
    }
    return products == kTeamProducts;
  }

  bool run(const Step& step, int64_t first, int64_t last) {
    const std::vector<Bound>& places = bound_for(step.tokens, step.outputs);
    const int isa = static_cast<int>(step.isa);
    const ElementKernels& kernels = element_kernels(isa);
    for (int64_t i = first; i < last; ++i) {
      const Instruction& from = instructions_[i];
      const Bound& at = places[i];
      switch (from.code) {
        case kUnary:
        case kBinary:
          elements(from, at, step, kernels);
          break;
        case kMean:
          mean(at, step, kernels);
          break;
        case kNf4Linear:
          if (!nf4(from, at, step)) return false;
          break;
        case kHalfLinear:
          if (!half(from, at, step)) return false;
          break;
        case kAttention:
          if (!attention(from, at, step)) return false;
          break;
        case kLora:
          if (!lora(from, at, step)) return false;
          break;
        case kRescale:
          rescale(from, at, step, kernels);
          break;
        default:
          break;
      }
    }
    return true;
  }

 private:
  const std::vector<Bound>& bound_for(int64_t tokens, int64_t outputs) {
    const auto key = std::make_pair(tokens, outputs);
    const auto found = bound_.find(key);
    if (found != bound_.end()) return found->second;
    if (bound_.size() >= kRemembered) bound_.clear();
    std::vector<Bound> fresh;
    fresh.reserve(instructions_.size());
    for (const Instruction& from : instructions_) fresh.push_back(bound(from, tokens, outputs));
    return bound_.emplace(key, std::move(fresh)).first->second;
  }

  std::vector<Instruction> instructions_;
  std::map<std::pair<int64_t, int64_t>, std::vector<Bound>> bound_;
};

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" {

// The instructions are copied; what they point to is not. Null: no memory.
manylora::Program* manylora_program_new(const manylora::Instruction* instructions, int64_t count) {
  return new (std::nothrow) manylora::Program(instructions, count);
}

void manylora_program_free(manylora::Program* program) { delete program; }

// Instructions [first, last). Returns 0, 1 where the instruction set does not run here, or 2 where
// memory is short or a page lies outside of the cache.
int manylora_program_run(manylora::Program* program, const manylora::Step* step, int64_t first,
                         int64_t last) {
  if (!manylora::runs(static_cast<int>(step->isa))) return 1;
  struct Call {
    manylora::Program* program;
    const manylora::Step* step;
    int64_t first;
    int64_t last;
    bool done;
  } call{program, step, first, last, false};
  manylora::with_team(
      program->wants_team(first, last) ? static_cast<int>(step->threads) : 1,
      [](void* self) {
        auto& given = *static_cast<Call*>(self);
        given.done = given.program->run(*given.step, given.first, given.last);
      },
      &call);
  return call.done ? 0 : 2;
}

}  // extern "C"
#pragma GCC visibility pop
