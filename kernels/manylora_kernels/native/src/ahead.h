// Fetching what comes next from memory while the processor computes: a product of a few tokens is
// bound by its arithmetic and leaves memory idle; the low-rank products after it are bound by
// memory.
#pragma once

#include <cstdint>

namespace manylora {

constexpr int64_t kLineBytes = 64;

// `rows` runs of `lines` cache lines, their beginnings `stride` bytes apart.
struct LineRun {
  const char* first;
  int64_t lines;
  int64_t rows;
  int64_t stride;
};

// What is left to fetch, and how many lines of it at a time.
struct Ahead {
  const LineRun* run;
  const LineRun* end;
  const char* row;
  const char* line;
  int64_t lines_left;
  int64_t rows_left;
  int64_t share;
};

// The lines that `rows` runs of `bytes` bytes touch.
LineRun lines_of(const void* first, int64_t bytes, int64_t rows, int64_t stride);

// All of `runs`, which must stay where they are, in `steps` shares.
Ahead ahead_of(const LineRun* runs, int64_t count, int64_t steps);

static inline void begin_run(Ahead& ahead) {
  ahead.row = ahead.line = ahead.run->first;
  ahead.lines_left = ahead.run->lines;
  ahead.rows_left = ahead.run->rows;
}

// Fetches the next share into the second-level cache. Static, like all that source files for
// several instruction sets include: see nf4_kernels.h.
static inline void fetch_share(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.share && ahead.run != ahead.end; ++i) {
    __builtin_prefetch(ahead.line, 0, 2);
    ahead.line += kLineBytes;
    if (--ahead.lines_left != 0) continue;
    if (--ahead.rows_left != 0) {
      ahead.row += ahead.run->stride;
      ahead.line = ahead.row;
      ahead.lines_left = ahead.run->lines;
    } else if (++ahead.run != ahead.end) {
      begin_run(ahead);
    }
  }
}

}  // namespace manylora
