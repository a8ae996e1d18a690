// The kernels of elements.h over the vectors of a vector_*.h and vector_math.h, included once by
// each instruction set's source file, inside an anonymous namespace, for the same reasons as
// nf4_kernels.h. The including file defines square_root(V) besides.

// e^x without the limits of `exponential`: infinity above 88.
inline V unbounded_exponential(V x) {
  const V highest = broadcast(88.0f);
  // A last step of at most e^0.73 covers what is left below the largest float.
  const V over = sub(larger(x, highest), highest);
  const V top = broadcast(0.7228394f);
  const V rest = where_less(top, over, top, over);
  const V near = mul(exponential(where_less(highest, x, highest, x)), exponential(rest));
  return where_less(top, over, div(broadcast(1.0f), zero()), near);
}

inline V sigmoid(V x) {
  // By the exponential of -|x|, which cannot overflow.
  const V e = exponential(sub(zero(), magnitude(x)));
  const V one = broadcast(1.0f);
  const V bottom = add(one, e);
  return where_less(x, zero(), div(e, bottom), div(one, bottom));
}

inline V gelu_tanh(V x) {
  const V inner = mul(broadcast(0.7978845608f), fma(mul(mul(x, x), x), broadcast(0.044715f), x));
  return mul(mul(broadcast(0.5f), x), add(broadcast(1.0f), hyperbolic_tangent(inner)));
}

template <int64_t kFunction>
inline V applied(V x) {
  if constexpr (kFunction == kNegate) return sub(broadcast(-0.0f), x);
  if constexpr (kFunction == kSquare) return mul(x, x);
  if constexpr (kFunction == kInverseRoot) return div(broadcast(1.0f), square_root(x));
  if constexpr (kFunction == kSigmoid) return sigmoid(x);
  if constexpr (kFunction == kSilu) return mul(x, sigmoid(x));
  if constexpr (kFunction == kTanh) return hyperbolic_tangent(x);
  if constexpr (kFunction == kGeluTanh) return gelu_tanh(x);
  if constexpr (kFunction == kRelu) return larger(zero(), x);
  if constexpr (kFunction == kExponential) return unbounded_exponential(x);
  return x;
}

template <int64_t kFunction>
void unary_row(int64_t count, float* out, const float* a) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, applied<kFunction>(load(a + i)));
  if (i < count)
    store_part(out + i, count - i, applied<kFunction>(load_part(a + i, count - i)));
}

void unary(int64_t function, int64_t count, float* out, const float* a) {
  switch (function) {
    case kNegate: return unary_row<kNegate>(count, out, a);
    case kSquare: return unary_row<kSquare>(count, out, a);
    case kInverseRoot: return unary_row<kInverseRoot>(count, out, a);
    case kSigmoid: return unary_row<kSigmoid>(count, out, a);
    case kSilu: return unary_row<kSilu>(count, out, a);
    case kTanh: return unary_row<kTanh>(count, out, a);
    case kGeluTanh: return unary_row<kGeluTanh>(count, out, a);
    case kRelu: return unary_row<kRelu>(count, out, a);
    case kExponential: return unary_row<kExponential>(count, out, a);
    default: return unary_row<kCopy>(count, out, a);
  }
}

template <int64_t kFunction>
inline V combined(V a, V b, V factor) {
  // Multiplied before it is added, not fused: as torch rounds it.
  if constexpr (kFunction == kAdd) return add(a, mul(factor, b));
  if constexpr (kFunction == kSubtract) return sub(a, mul(factor, b));
  if constexpr (kFunction == kMultiply) return mul(a, b);
  return div(a, b);
}

template <int64_t kFunction, bool kARepeats, bool kBRepeats>
void binary_row(int64_t count, float* out, const float* a, const float* b, float by) {
  const V factor = broadcast(by);
  const V first_a = kARepeats ? broadcast(*a) : zero();
  const V first_b = kBRepeats ? broadcast(*b) : zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(out + i, combined<kFunction>(kARepeats ? first_a : load(a + i),
                                       kBRepeats ? first_b : load(b + i), factor));
  if (i < count) {
    const int64_t rest = count - i;
    store_part(out + i, rest,
               combined<kFunction>(kARepeats ? first_a : load_part(a + i, rest),
                                   kBRepeats ? first_b : load_part(b + i, rest), factor));
  }
}

template <int64_t kFunction>
void binary_of(int64_t count, float* out, const float* a, bool a_repeats, const float* b,
               bool b_repeats, float factor) {
  if (a_repeats && b_repeats) return binary_row<kFunction, true, true>(count, out, a, b, factor);
  if (a_repeats) return binary_row<kFunction, true, false>(count, out, a, b, factor);
  if (b_repeats) return binary_row<kFunction, false, true>(count, out, a, b, factor);
  return binary_row<kFunction, false, false>(count, out, a, b, factor);
}

void binary(int64_t function, int64_t count, float* out, const float* a, bool a_repeats,
            const float* b, bool b_repeats, float factor) {
  switch (function) {
    case kAdd: return binary_of<kAdd>(count, out, a, a_repeats, b, b_repeats, factor);
    case kSubtract: return binary_of<kSubtract>(count, out, a, a_repeats, b, b_repeats, factor);
    case kMultiply: return binary_of<kMultiply>(count, out, a, a_repeats, b, b_repeats, factor);
    default: return binary_of<kDivide>(count, out, a, a_repeats, b, b_repeats, factor);
  }
}

float sum(int64_t count, const float* a) {
  V sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] = add(sums[k], load(a + i + k * kLanes));
  for (int k = 0; i < count; i += kLanes, ++k) {
    const int64_t rest = count - i;
    sums[k] = add(sums[k], rest < kLanes ? load_part(a + i, rest) : load(a + i));
  }
  return sum_of_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}
