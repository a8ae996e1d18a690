// What every kernel needs around it: threads, scratch memory, and the choice of instruction set.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "team.h"

namespace manylora {

// As Python numbers them (binding.ISAS).
enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The GNU OpenMP entry point that torch itself uses, so that no second team of threads exists.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
extern std::atomic<GompParallel> gomp_parallel;
// The tests set it to NaN: nothing may be read that was not written.
extern std::atomic<float> scratch_fill;
extern std::atomic<bool> fill_scratch;

// Whether this processor runs an instruction set.
bool runs(int isa);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    constexpr size_t kAlignment = 64;
    const size_t bytes = quotient_up(floats * int64_t{sizeof(float)}, kAlignment) * kAlignment;
    data_ = static_cast<float*>(std::aligned_alloc(kAlignment, bytes == 0 ? kAlignment : bytes));
    if (data_ != nullptr && fill_scratch.load())
      for (int64_t i = 0; i < floats; ++i) data_[i] = scratch_fill.load();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Items [0, count) of `size` units each, taken by whichever thread is free. Which thread takes
// which item, or how many there are, changes no result.
template <typename Work>
struct Region {
  const Work& work;
  int64_t units;
  int64_t size;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};

  static void run(void* self) {
    auto& region = *static_cast<Region*>(self);
    const int thread = region.threads.fetch_add(1);
    for (;;) {
      const int64_t first = region.next.fetch_add(1) * region.size;
      if (first >= region.units) return;
      region.work(thread, first, least(first + region.size, region.units));
    }
  }
};

template <typename Work>
void parallel(int threads, int64_t units, int64_t size, const Work& work) {
  Region<Work> region{work, units, size};
  const GompParallel start = gomp_parallel.load();
  if (threads < 2 || units <= size) {
    Region<Work>::run(&region);
  } else if (Team* team = Team::led()) {
    team->run(Region<Work>::run, &region);
  } else if (start != nullptr) {
    start(Region<Work>::run, &region, static_cast<unsigned>(threads), 0);
  } else {
    Region<Work>::run(&region);
  }
}

}  // namespace manylora
