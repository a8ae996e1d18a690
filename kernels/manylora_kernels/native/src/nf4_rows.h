// What a panel's rows have besides weights: block maxima, with their double quantization undone, and
// biases. Included by each instruction set's source file inside its anonymous namespace, as
// nf4_kernels.h says, after the vector type and
//   look_up(table [256], q [16], out [16]).

// The maxima of one panel, segment after segment. absmax = code[q] * scale + offset, rounded as
// bitsandbytes rounds it: no fused multiply-add.
struct Maxima {
  const Nf4Matrix* w;
  int64_t panel;
  int64_t fresh_until;  // the segment whose scales are not in `scale` any more
  float scale[kPanelRows];

  void begin(const Nf4Matrix& matrix, int64_t of_panel, int64_t segment) {
    w = &matrix;
    panel = of_panel;
    fresh_until = segment;
  }

  // Writes the maxima of a segment; segments come in order from the one given to `begin`.
  void read(int64_t segment, float* out) {
    const int64_t at = (panel * (w->in / w->segment) + segment) * kPanelRows;
    if (w->absmax_code == nullptr) {
      const float* maxima = static_cast<const float*>(w->absmax) + at;
      for (int v = 0; v < kPanelRows; v += kLanes) store(out + v, load(maxima + v));
      return;
    }
    if (segment == fresh_until) read_scales(segment);
    look_up(w->absmax_code, static_cast<const uint8_t*>(w->absmax) + at, out);
    const V offset = broadcast(w->absmax_offset);
    for (int v = 0; v < kPanelRows; v += kLanes)
      store(out + v, add(mul(load(out + v), load(scale + v)), offset));
  }

  __attribute__((noinline)) void read_scales(int64_t segment) {
    fresh_until = w->in / w->segment;
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const int64_t row = panel * kPanelRows + r;
      scale[r] = 0.0f;
      if (row >= w->out) continue;  // a row of padding has no group
      const int64_t flat = row * w->in + segment * w->segment;
      const int64_t group = flat / w->group;
      scale[r] = w->absmax_scale[group];
      fresh_until = least(fresh_until, segment + ((group + 1) * w->group - flat) / w->segment);
    }
  }
};

// The bias of a panel's rows; rows beyond `out` read nothing.
V bias_of(const Nf4Job& job, int64_t row) {
  if (row + kLanes <= job.w.out) return load(job.bias + row);
  float values[kLanes] = {};
  for (int64_t r = row; r < job.w.out; ++r) values[r - row] = job.bias[r];
  return load(values);
}
