// paged_attention as C++ and Python call it: how the work is cut up and shared among threads.
#include "arena.h"
#include "attention.h"

namespace manylora {
namespace {

// Rows of a unit: enough to make good for transposing a tile of keys, and still in the cache.
constexpr int64_t kUnitRows = 192;
// Below this many multiplications waking a thread costs more than it brings.
constexpr int64_t kSerialProducts = 1 << 17;

const AttentionKernels* kernels_of(int isa) {
  if (!runs(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == kAvx512) return &kAttentionAvx512;
  if (isa == kAvx2) return &kAttentionAvx2;
#endif
  return &kAttentionPortable;
}

// Whether every index stays inside of its array.
bool valid(const AttentionJob& job) {
  if (job.kv_heads < 1 || job.heads % job.kv_heads != 0 || job.block_tokens < 1) return false;
  for (int64_t s = 0; s < job.sequences; ++s) {
    const int64_t start = job.query_starts[s];
    const int64_t end = job.query_starts[s + 1];
    const int64_t length = job.context_lens[s];
    if (start < 0 || end < start || end > job.queries || end - start > length) return false;
    const int64_t pages = quotient_up(length, job.block_tokens);
    if (end == start) continue;
    if (pages > job.table_width) return false;
    const int32_t* table = job.block_tables + s * job.table_width;
    for (int64_t page = 0; page < pages; ++page)
      if (table[page] < 0 || table[page] >= job.blocks) return false;
  }
  return true;
}

// A part of a unit: `part` of `unit`, whose state is `state` floats into the states.
struct Piece {
  int64_t unit;
  int64_t part;
  int64_t state;
};

// What a call consists of, counted before memory for it is asked for.
struct Plan {
  int64_t positions;  // of a unit at most
  int64_t units = 0;
  int64_t pieces = 0;
  int64_t rows = 0;  // of the largest unit
  int64_t states = 0;  // floats of all pieces' states
  int64_t products = 0;

  explicit Plan(const AttentionJob& job) {
    const int64_t groups = job.heads / job.kv_heads;
    positions = groups >= kUnitRows ? 1 : kUnitRows / groups;
  }

  // Calls `use(unit)` for every unit, a sequence's last positions, which see most keys, first.
  template <typename Use>
  void each(const AttentionJob& job, const Use& use) const {
    for (int64_t s = job.sequences - 1; s >= 0; --s) {
      const int64_t end = job.context_lens[s];
      const int64_t begin = end - (job.query_starts[s + 1] - job.query_starts[s]);
      for (int64_t last = end; last > begin; last -= positions)
        for (int64_t head = 0; head < job.kv_heads; ++head)
          use(AttentionUnit{s, head, last - positions < begin ? begin : last - positions, last});
    }
  }

  void count(const AttentionJob& job) {
    each(job, [&](const AttentionUnit& unit) {
      const int64_t of_unit = rows_of(job, unit);
      const int64_t parts = end_part(unit) - first_part(job, unit);
      units += 1;
      pieces += parts;
      rows = of_unit > rows ? of_unit : rows;
      states += parts * state_floats(job, of_unit);
      products += of_unit * (unit.last - first_key(job, unit.first)) *
                  (job.key_dim + job.value_dim);
    });
  }
};

template <typename Item>
Item* take(char*& memory, int64_t count) {
  Item* items = reinterpret_cast<Item*>(memory);
  memory += quotient_up(count * int64_t{sizeof(Item)}, 64) * 64;
  return items;
}

}  // namespace

AttentionStatus paged_attention(const AttentionJob& job, int isa, int threads) {
  const AttentionKernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return kUnknownIsa;
  if (!valid(job)) return kBadIndex;
  Plan plan(job);
  plan.count(job);
  if (plan.units == 0) return kDone;
  if (threads < 1 || plan.products < kSerialProducts) threads = 1;
  // So few units that threads would wait for one another: parts are handed out instead.
  const bool split = threads > 1 && plan.units < 4 * threads && plan.pieces > plan.units;
  const int64_t scratch_floats = cache_line_up(kernels->scratch_floats(job, plan.rows));
  const int64_t pieces = split ? plan.pieces : 0;
  const int64_t states = split ? plan.states : 0;
  static thread_local Arena arena;
  char* memory = arena.reserve(
      4 * 64 + plan.units * int64_t{sizeof(AttentionUnit)} + pieces * int64_t{sizeof(Piece)} +
      plan.units * int64_t{sizeof(int64_t)} +
      (scratch_floats * threads + states) * int64_t{sizeof(float)});
  if (memory == nullptr) return kNoMemory;
  AttentionUnit* units = take<AttentionUnit>(memory, plan.units);
  Piece* piece = take<Piece>(memory, pieces);
  int64_t* first_state = take<int64_t>(memory, plan.units);
  float* scratch = take<float>(memory, scratch_floats * threads);
  float* state = take<float>(memory, states);

  int64_t unit_count = 0;
  int64_t piece_count = 0;
  int64_t floats = 0;
  plan.each(job, [&](const AttentionUnit& unit) {
    first_state[unit_count] = floats;
    if (split)
      for (int64_t part = first_part(job, unit); part < end_part(unit); ++part) {
        piece[piece_count++] = Piece{unit_count, part, floats};
        floats += state_floats(job, rows_of(job, unit));
      }
    units[unit_count++] = unit;
  });
  if (!split) {
    parallel(threads, unit_count, 1, [&](int thread, int64_t first, int64_t) {
      kernels->attend(job, units[first], scratch + thread * scratch_floats);
    });
    return kDone;
  }
  parallel(threads, piece_count, 1, [&](int thread, int64_t first, int64_t) {
    const Piece& of = piece[first];
    kernels->attend_part(job, units[of.unit], of.part, state + of.state,
                         scratch + thread * scratch_floats);
  });
  parallel(threads, unit_count, 1, [&](int thread, int64_t first, int64_t) {
    kernels->combine(job, units[first], state + first_state[first],
                     scratch + thread * scratch_floats);
  });
  return kDone;
}

}  // namespace manylora

#pragma GCC visibility push(default)
extern "C" {

// Each returns an AttentionStatus.
int manylora_paged_attention(const manylora::AttentionJob* job, int isa, int threads) {
  return manylora::paged_attention(*job, isa, threads);
}

int manylora_store_kv(const manylora::StoreJob* job, int threads) {
  return manylora::store_kv(*job, threads);
}

}  // extern "C"
#pragma GCC visibility pop
