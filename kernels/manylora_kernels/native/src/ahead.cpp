// See ahead.h.
#include "ahead.h"

#include "runtime.h"

namespace manylora {

LineRun lines_of(const void* first, int64_t bytes, int64_t rows, int64_t stride) {
  const auto start = reinterpret_cast<uintptr_t>(first);
  const uintptr_t line = start / kLineBytes * kLineBytes;
  return {reinterpret_cast<const char*>(line),
          quotient_up(static_cast<int64_t>(start - line) + bytes, kLineBytes), rows, stride};
}

Ahead ahead_of(const LineRun* runs, int64_t count, int64_t steps) {
  Ahead ahead{runs, runs + count, nullptr, nullptr, 0, 0, 0};
  int64_t lines = 0;
  for (int64_t i = 0; i < count; ++i) lines += runs[i].lines * runs[i].rows;
  ahead.share = quotient_up(lines, steps < 1 ? 1 : steps);
  if (count > 0) begin_run(ahead);
  return ahead;
}

}  // namespace manylora
