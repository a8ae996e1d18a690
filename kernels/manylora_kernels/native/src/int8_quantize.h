// x to eight bits, as int8.h says. Included by each instruction set's source file inside its
// anonymous namespace, after `constexpr bool kPadded`: plain loops, which the compiler vectorizes.

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int32_t kLeastBits = 0x0d800000;  // 2^-100; 127 over less might not be finite
// Adding it rounds a small float to an integer, to even, and leaves that in the low bits.
constexpr float kRounder = 12582912.0f;

inline int32_t bits_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Bytes 0, 2, 4, 6 of v.
inline uint32_t even_bytes(uint64_t v) {
  v &= 0x00ff00ff00ff00ff;
  v = (v | (v >> 8)) & 0x0000ffff0000ffff;
  return static_cast<uint32_t>(v | (v >> 16));
}

void quantize_segment(const float* x, int64_t columns, int64_t stride, int8_t* q, float* scale,
                      int32_t* balance) {
  int32_t most = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const int32_t bits = bits_of(x[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int8_t row[kMaxSegment];
  int32_t sum = 0;
  float largest;
  __builtin_memcpy(&largest, &most, sizeof largest);
  const bool finite = most < kInfinityBits;
  if (finite && most >= kLeastBits) {
    const float inverse = kInt8Steps / largest;
    for (int64_t i = 0; i < columns; ++i) {
      const int32_t rounded = bits_of(x[i] * inverse + kRounder) - bits_of(kRounder);
      row[i] = static_cast<int8_t>(rounded);
      sum += rounded;
    }
  } else {
    for (int64_t i = 0; i < columns; ++i) row[i] = 0;
  }
  *scale = finite ? largest * (1.0f / (kInt8Steps * kInt8Steps)) : __builtin_nanf("");
  *balance = -128 * sum;
  for (int64_t i = 0; i < columns; i += kTileColumns, q += 2 * stride) {
    uint64_t eight;
    __builtin_memcpy(&eight, row + i, sizeof eight);
    const uint32_t halves[2] = {even_bytes(eight), even_bytes(eight >> 8)};
    __builtin_memcpy(q, &halves[0], 4);
    __builtin_memcpy(q + stride, &halves[1], 4);
  }
}

void quantize(const Nf4Job& job, int64_t first, int64_t last, const Int8Activations& to) {
  const int64_t in = job.w.in, segment = job.w.segment, segments = in / segment;
  for (int64_t begin = 0; begin < job.tokens; begin += to.tile_tokens) {
    const int64_t count = least(to.tile_tokens, job.tokens - begin);
    const int64_t places = kPadded ? to.tile_tokens : count;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t s = first; s < last; ++s) {
        int8_t* q = to.q + begin * in + s * segment * places + t * (kPadded ? segment : 4);
        const int64_t at = begin * segments + s * places + t;
        quantize_segment(job.x + (begin + t) * in + s * segment, segment, kPadded ? 4 : 4 * count,
                         q, to.scale + at, to.balance + at);
      }
  }
}

// The code book in the same steps. |code| is at most 1.
inline void round_code(const float* code, int8_t* book) {
  for (int i = 0; i < 16; ++i)
    book[i] = static_cast<int8_t>(bits_of(code[i] * kInt8Steps + kRounder) - bits_of(kRounder));
}
