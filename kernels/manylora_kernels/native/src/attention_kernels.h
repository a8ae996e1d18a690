// The kernels of attention.h: a unit's parts of the keys one after another, or one of them.
// Included like attention_tile.h, and after it.

void tile_rows(Block& b, int64_t start, int64_t row) {
  const int64_t count = least(kRowTile, b.rows - row);
  int64_t from[kRowTile];
  int64_t to[kRowTile];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t position = b.position(row + r);
    from[r] = most(first_key(b.job, position) - start, 0);
    to[r] = least(position + 1 - start, kTileKeys);
  }
  // Both grow with the position.
  const int64_t first = from[0];
  const int64_t last = to[count - 1];
  if (first >= last) return;
  score<kRowTile>(count, b.queries + row * b.job.key_dim, b, first / kLanes,
                  (last + kLanes - 1) / kLanes);
  weigh(b, row, count, from, to);
  add_visible(b, row, count, from, to);
}

void sum_part(Block& b, int64_t part) {
  for (int64_t i = 0; i < b.rows * b.width; ++i) b.part.output[i] = 0.0f;
  for (int64_t i = 0; i < b.rows * kLanes; ++i) b.lane_sum[i] = 0.0f;
  for (int64_t row = 0; row < b.rows; ++row) b.part.largest[row] = kNothing;
  const int64_t begin = most(part * kPartKeys, first_key(b.job, b.unit.first));
  const int64_t end = least((part + 1) * kPartKeys, b.unit.last);
  b.ahead = b.rows <= kRowTile;
  const int64_t first = begin / kTileKeys * kTileKeys;
  find_rows(b, first, begin - first, least(end - first, kTileKeys), b.next);
  for (int64_t start = first; start < end; start += kTileKeys) {
    b.tile = b.next;
    const int64_t behind = start + kTileKeys;
    if (behind < b.unit.last)
      find_rows(b, behind, 0, least(b.unit.last - behind, kTileKeys), b.next);
    transpose_keys(b, most(begin - start, 0), least(end - start, kTileKeys));
    for (int64_t row = 0; row < b.rows; row += kRowTile) tile_rows(b, start, row);
  }
  for (int64_t row = 0; row < b.rows; ++row)
    b.part.sum[row] = sum_of_lanes(load(b.lane_sum + row * kLanes));
}

void begin_total(Block& b) {
  for (int64_t i = 0; i < b.rows * b.width; ++i) b.total.output[i] = 0.0f;
  for (int64_t row = 0; row < b.rows; ++row) {
    const bool sink = b.job.sinks != nullptr;
    b.total.largest[row] = sink ? b.job.sinks[b.head(row)] : kNothing;
    b.total.sum[row] = b.total.largest[row] == kNothing ? 0.0f : 1.0f;
  }
}

void add_part(Block& b, const State& part) {
  for (int64_t row = 0; row < b.rows; ++row) {
    const float found = part.largest[row];
    if (found == kNothing && part.sum[row] == 0.0f) continue;  // saw no key
    float& largest = b.total.largest[row];
    const float now = found > largest ? found : largest;
    const V old_factor = exponential(broadcast(step_down(largest, now)));
    const V new_factor = exponential(broadcast(step_down(found, now)));
    largest = now;
    float* output = b.total.output + row * b.width;
    const float* more = part.output + row * b.width;
    for (int64_t c = 0; c < b.width; c += kLanes)
      store(output + c, fma(load(more + c), new_factor, mul(load(output + c), old_factor)));
    float sum[kLanes];
    store(sum, fma(broadcast(part.sum[row]), new_factor,
                   mul(broadcast(b.total.sum[row]), old_factor)));
    b.total.sum[row] = sum[0];
  }
}

void write_out(const Block& b) {
  const int64_t dim = b.job.value_dim;
  for (int64_t row = 0; row < b.rows; ++row) {
    float* out = b.job.out + (b.query(b.position(row)) * b.job.heads + b.head(row)) * dim;
    const float* output = b.total.output + row * b.width;
    const V sum = broadcast(b.total.sum[row]);
    for (int64_t c = 0; c < dim; c += kLanes)
      store_part(out + c, least(kLanes, dim - c), div(load(output + c), sum));
  }
}

void attend(const AttentionJob& job, const AttentionUnit& unit, float* scratch) {
  Block b(job, unit, scratch);
  pack_queries(b);
  begin_total(b);
  for (int64_t part = first_part(job, unit); part < end_part(unit); ++part) {
    sum_part(b, part);
    add_part(b, b.part);
  }
  write_out(b);
}

void attend_part(const AttentionJob& job, const AttentionUnit& unit, int64_t part, float* state,
                 float* scratch) {
  Block b(job, unit, scratch);
  b.part = state_at(job, b.rows, state);
  pack_queries(b);
  sum_part(b, part);
}

void combine(const AttentionJob& job, const AttentionUnit& unit, const float* states,
             float* scratch) {
  Block b(job, unit, scratch);
  begin_total(b);
  for (int64_t part = first_part(job, unit); part < end_part(unit); ++part) {
    add_part(b, state_at(job, b.rows, const_cast<float*>(states)));
    states += state_floats(job, b.rows);
  }
  write_out(b);
}
