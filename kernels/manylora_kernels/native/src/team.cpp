// See team.h.
#include "team.h"

#include "runtime.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace manylora {
namespace {

// Looks at the round before a member lets others have the processor: some tens of microseconds.
constexpr int kEagerLooks = 1 << 15;

void give_way(int looks) {
  if (looks < kEagerLooks) return;
#if defined(__x86_64__)
  _mm_pause();
#endif
#if defined(__linux__)
  if (looks % 64 == 0) sched_yield();
#endif
}

struct Opening {
  Team team;
  Team::Function function;
  void* data;
};

void enter(void* self) {
  auto& opening = *static_cast<Opening*>(self);
  // The thread that opened the region has marked itself.
  if (Team::led() == &opening.team) {
    opening.function(opening.data);
    opening.team.dismiss();
  } else {
    opening.team.serve();
  }
}

}  // namespace

Team*& Team::led() {
  static thread_local Team* team = nullptr;
  return team;
}

void Team::run(Function function, void* data) {
  function_ = function;
  data_ = data;
  open_.store(true);
  round_.fetch_add(1);
  function(data);
  // Sequentially consistent on both sides: a member either counted itself before this and is
  // waited for, or finds the region closed.
  open_.store(false);
  while (inside_.load() != 0) {
  }
}

void Team::serve() {
  uint64_t seen = 0;
  for (int looks = 0;; ++looks) {
    const uint64_t round = round_.load(std::memory_order_acquire);
    if (round == seen) {
      if (dismissed_.load(std::memory_order_relaxed)) return;
      give_way(looks);
      continue;
    }
    looks = 0;
    seen = round;
    inside_.fetch_add(1);
    if (open_.load()) function_(data_);
    inside_.fetch_sub(1);
  }
}

void with_team(int threads, Team::Function function, void* data) {
  const GompParallel start = gomp_parallel.load();
  if (threads < 2 || start == nullptr || Team::led() != nullptr) return function(data);
  Opening opening{{}, function, data};
  Team::led() = &opening.team;
  start(enter, &opening, static_cast<unsigned>(threads), 0);
  Team::led() = nullptr;
}

}  // namespace manylora
