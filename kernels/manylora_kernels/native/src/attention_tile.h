// One tile of keys of attention.h: its scores, weights and outputs. Over the vector type of
// vector_*.h, included once by each instruction set's source file, inside an anonymous namespace:
// nothing here may be shared between these files, or the linker could keep the AVX-512 copy for all
// of them. For the same reason no std templates.
//
// A unit's rows are its queries times the query heads of its kv head, a query's heads side by side.
// Every number of a row is computed by the same operations in the same order whatever rows are
// beside it: a score sums the columns 0, 1, 2, ... in one accumulator (lanes are keys), an output
// the visible keys in their order (lanes are columns).
//
// The including file defines, before: kRowTile, kSums, kValueColumns.

constexpr float kNothing = -__builtin_inff();

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// To the second-level cache. Measured in decode with large caches: 1.25 to 1.5 times as fast.
inline void prefetch(const float* p) { __builtin_prefetch(p, 0, 2); }

struct State {
  float* output;   // [rows][width]
  float* largest;  // [rows]
  float* sum;      // [rows]
};

State state_at(const AttentionJob& job, int64_t rows, float* memory) {
  float* largest = memory + rows * cache_line_up(job.value_dim);
  return {memory, largest, largest + cache_line_up(rows)};
}

struct TileRows {
  const float* keys[kTileKeys];
  const float* values[kTileKeys];
};

// A unit at work.
struct Block {
  const AttentionJob& job;
  const AttentionUnit& unit;
  int64_t groups;   // query heads of the kv head
  int64_t rows;
  int64_t width;    // of a row of output: value_dim rounded up
  float* queries;   // [rows / kRowTile][key_dim][rows of the tile]
  float* keys;      // [key_dim][kTileKeys], the current tile transposed
  float* scores;    // [kRowTile][kTileKeys], then the weights
  float* lane_sum;  // [rows][kLanes], the sums of weights
  State part;
  State total;
  TileRows tile;    // where the current tile's keys and values lie
  TileRows next;    // the next one's, or again the current one's
  bool ahead;       // whether to fetch the next tile meanwhile: for few rows memory is what waits

  Block(const AttentionJob& j, const AttentionUnit& u, float* scratch)
      : job(j), unit(u), groups(j.heads / j.kv_heads), rows(rows_of(j, u)),
        width(cache_line_up(j.value_dim)) {
    queries = scratch;
    keys = queries + cache_line_up(rows * job.key_dim);
    scores = keys + job.key_dim * kTileKeys;
    lane_sum = scores + kRowTile * kTileKeys;
    part = state_at(job, rows, lane_sum + cache_line_up(rows * kLanes));
    total = state_at(job, rows, part.output + state_floats(job, rows));
  }

  int64_t position(int64_t row) const { return unit.first + row / groups; }
  int64_t head(int64_t row) const { return unit.kv_head * groups + row % groups; }
  // The index of a position's query.
  int64_t query(int64_t position) const {
    return job.query_starts[unit.sequence + 1] - (job.context_lens[unit.sequence] - position);
  }
};

int64_t scratch_floats(const AttentionJob& job, int64_t rows) {
  return cache_line_up(rows * job.key_dim) + job.key_dim * kTileKeys + kRowTile * kTileKeys +
         cache_line_up(rows * kLanes) + 2 * state_floats(job, rows);
}

void pack_queries(Block& b) {
  float* to = b.queries;
  for (int64_t row = 0; row < b.rows; row += kRowTile) {
    const int64_t count = least(kRowTile, b.rows - row);
    for (int64_t r = 0; r < count; ++r) {
      const float* from = b.job.q + b.query(b.position(row + r)) * b.job.q_token_stride +
                          b.head(row + r) * b.job.q_head_stride;
      for (int64_t d = 0; d < b.job.key_dim; ++d) to[d * count + r] = from[d];
    }
    to += count * b.job.key_dim;
  }
}

// Finds keys [from, to) of the tile at `start` in their pages. Places beside them repeat the first
// key, so nothing outside of the pages' own places is read.
void find_rows(const Block& b, int64_t start, int64_t from, int64_t to, TileRows& rows) {
  const AttentionJob& job = b.job;
  const int32_t* table = job.block_tables + b.unit.sequence * job.table_width;
  const int64_t k_stride = job.kv_heads * job.key_dim;
  const int64_t v_stride = job.kv_heads * job.value_dim;
  for (int64_t key = from; key < to;) {
    const int64_t page = (start + key) / job.block_tokens;
    const int64_t offset = start + key - page * job.block_tokens;
    const int64_t end = least(to, key + job.block_tokens - offset);
    const int64_t place = table[page] * job.block_tokens + offset;
    const float* k = job.k_cache + place * k_stride + b.unit.kv_head * job.key_dim;
    const float* v = job.v_cache + place * v_stride + b.unit.kv_head * job.value_dim;
    for (; key < end; ++key, k += k_stride, v += v_stride) {
      rows.keys[key] = k;
      rows.values[key] = v;
    }
  }
  for (int64_t key = 0; key < kTileKeys; ++key) {
    if (from <= key && key < to) continue;
    rows.keys[key] = rows.keys[from];
    rows.values[key] = rows.values[from];
  }
}

// Transposes K of the vectors that hold keys [from, to).
void transpose_keys(Block& b, int64_t from, int64_t to) {
  const int64_t dim = b.job.key_dim;
  const int64_t whole = dim / 4 * 4;
  for (int64_t key = from / kLanes * kLanes; key < to; key += kLanes) {
    const float* const* rows = b.tile.keys + key;
    const float* const* next = b.next.keys + key;
    for (int64_t d = 0; d < whole; d += 4) {
      V columns[4];
      transpose4(rows, d, columns);
      for (int i = 0; i < 4; ++i) store(b.keys + (d + i) * kTileKeys + key, columns[i]);
      // A quarter of the rows at a time, so that a line is asked for once.
      if (b.ahead)
        for (int i = d / 4 % 4; i < kLanes; i += 4) prefetch(next[i] + d / 16 * 16);
    }
    for (int64_t d = whole; d < dim; ++d)
      for (int i = 0; i < kLanes; ++i) b.keys[d * kTileKeys + key + i] = rows[i][d];
  }
}

template <int kRows, int kVectors>
void multiply_keys(const float* q, const float* keys, int64_t dim, float* scores) {
  V sum[kRows][kVectors];
  for (auto& of_row : sum)
    for (V& value : of_row) value = zero();
  for (int64_t d = 0; d < dim; ++d, q += kRows, keys += kTileKeys) {
    V k[kVectors];
    for (int v = 0; v < kVectors; ++v) k[v] = load(keys + v * kLanes);
    // Unrolled whole, or the sums would live in memory.
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V value = broadcast(q[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(k[v], value, sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(scores + r * kTileKeys + v * kLanes, sum[r][v]);
}

template <int kRows>
void score(int64_t rows, const float* q, const Block& b, int64_t vector, int64_t end) {
  if (rows == kRows) {
    const int64_t dim = b.job.key_dim;
    if constexpr (kRows * 4 <= kSums)
      for (; vector + 4 <= end; vector += 4)
        multiply_keys<kRows, 4>(q, b.keys + vector * kLanes, dim, b.scores + vector * kLanes);
    if constexpr (kRows * 2 <= kSums)
      for (; vector + 2 <= end; vector += 2)
        multiply_keys<kRows, 2>(q, b.keys + vector * kLanes, dim, b.scores + vector * kLanes);
    for (; vector < end; ++vector)
      multiply_keys<kRows, 1>(q, b.keys + vector * kLanes, dim, b.scores + vector * kLanes);
  } else if constexpr (kRows > 1) {
    score<kRows - 1>(rows, q, b, vector, end);
  }
}

// Scales and caps a row's scores in keys [from, to), hides those beside them; returns the largest.
float mask_scores(const AttentionJob& job, float* scores, int64_t from, int64_t to) {
  const int64_t first = from / kLanes * kLanes;
  const int64_t last = (to + kLanes - 1) / kLanes * kLanes;
  const V scale = broadcast(job.scale);
  for (int64_t key = first; key < last; key += kLanes) {
    V z = mul(load(scores + key), scale);
    if (job.softcap != 0.0f)
      z = mul(broadcast(job.softcap), hyperbolic_tangent(div(z, broadcast(job.softcap))));
    store(scores + key, z);
  }
  for (int64_t key = first; key < from; ++key) scores[key] = kNothing;
  for (int64_t key = to; key < last; ++key) scores[key] = kNothing;
  V top = broadcast(kNothing);
  for (int64_t key = first; key < last; key += kLanes) top = larger(load(scores + key), top);
  return largest_lane(top);
}

// What sums relative to `before` are to be multiplied by to be relative to `now`, as an exponent.
inline float step_down(float before, float now) { return before == now ? 0.0f : before - now; }

// Turns scores into weights relative to each row's largest score so far, and what was summed
// before into the same measure.
void weigh(Block& b, int64_t row, int64_t count, const int64_t* from, const int64_t* to) {
  constexpr int kRounded = (kRowTile + kLanes - 1) / kLanes * kLanes;
  float factor[kRounded] = {};
  for (int64_t r = 0; r < count; ++r) {
    if (from[r] >= to[r]) continue;
    float& largest = b.part.largest[row + r];
    const float found = mask_scores(b.job, b.scores + r * kTileKeys, from[r], to[r]);
    const float now = found > largest ? found : largest;
    factor[r] = step_down(largest, now);
    largest = now;
  }
  for (int r = 0; r < kRounded; r += kLanes) store(factor + r, exponential(load(factor + r)));
  for (int64_t r = 0; r < count; ++r) {
    if (from[r] >= to[r]) continue;
    float* scores = b.scores + r * kTileKeys;
    const float largest = b.part.largest[row + r];
    // Where all scores are -infinity, differences would be NaN.
    const V base = broadcast(largest == kNothing ? 0.0f : largest);
    float* lane_sum = b.lane_sum + (row + r) * kLanes;
    V sum = mul(load(lane_sum), broadcast(factor[r]));
    const int64_t last = (to[r] + kLanes - 1) / kLanes * kLanes;
    for (int64_t key = from[r] / kLanes * kLanes; key < last; key += kLanes) {
      const V weight = exponential(sub(load(scores + key), base));
      store(scores + key, weight);
      sum = add(sum, weight);
    }
    store(lane_sum, sum);
    if (factor[r] == 1.0f) continue;
    float* output = b.part.output + (row + r) * b.width;
    for (int64_t c = 0; c < b.width; c += kLanes)
      store(output + c, mul(load(output + c), broadcast(factor[r])));
  }
}

template <int kRows, int kColumns, bool kPartial, bool kAhead>
void multiply_values(const Block& b, int64_t row, int64_t in_tile, int64_t from, int64_t to,
                     int64_t column) {
  float* output = b.part.output + (row + in_tile) * b.width + column;
  const float* weights = b.scores + in_tile * kTileKeys;
  const int64_t rest = b.job.value_dim - column;
  V sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) sum[r][c] = load(output + r * b.width + c * kLanes);
  for (int64_t key = from; key < to; ++key) {
    const float* value = b.tile.values[key] + column;
    if (kAhead)
      for (int c = 0; c < kColumns; ++c) prefetch(b.next.values[key] + column + c * kLanes);
    V v[kColumns];
    for (int c = 0; c < kColumns; ++c)
      v[c] = kPartial ? load_part(value, rest) : load(value + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V weight = broadcast(weights[r * kTileKeys + key]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(v[c], weight, sum[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) store(output + r * b.width + c * kLanes, sum[r][c]);
}

// Adds values of keys [from, to) to `rows` neighbouring rows.
template <int kRows>
void add_values(const Block& b, int64_t rows, int64_t row, int64_t in_tile, int64_t from,
                int64_t to) {
  if (rows == kRows) {
    const int64_t dim = b.job.value_dim;
    int64_t column = 0;
    for (; column + kValueColumns * kLanes <= dim; column += kValueColumns * kLanes)
      if (b.ahead) {
        multiply_values<kRows, kValueColumns, false, true>(b, row, in_tile, from, to, column);
      } else {
        multiply_values<kRows, kValueColumns, false, false>(b, row, in_tile, from, to, column);
      }
    for (; column + kLanes <= dim; column += kLanes)
      multiply_values<kRows, 1, false, false>(b, row, in_tile, from, to, column);
    if (column < dim) multiply_values<kRows, 1, true, false>(b, row, in_tile, from, to, column);
  } else if constexpr (kRows > 1) {
    add_values<kRows - 1>(b, rows, row, in_tile, from, to);
  }
}

// A row meets only keys that it sees: another's weight of 0 would turn an infinite value into NaN.
// What all rows see they share; a row's keys before and behind that are its own.
void add_visible(const Block& b, int64_t row, int64_t count, const int64_t* from,
                 const int64_t* to) {
  constexpr int kValueRows = kSums / kValueColumns;
  for (int64_t at = 0; at < count; at += kValueRows) {
    const int64_t rows = least(kValueRows, count - at);
    const int64_t shared_from = from[at + rows - 1];
    const int64_t shared_to = most(to[at], shared_from);
    for (int64_t r = at; r < at + rows; ++r)
      if (from[r] < least(shared_from, to[r]))
        add_values<1>(b, 1, row, r, from[r], least(shared_from, to[r]));
    if (shared_from < shared_to) add_values<kValueRows>(b, rows, row, at, shared_from, shared_to);
    for (int64_t r = at; r < at + rows; ++r)
      if (most(shared_to, from[r]) < to[r])
        add_values<1>(b, 1, row, r, most(shared_to, from[r]), to[r]);
  }
}
