// Functions over the vector type of vector_*.h, included after it. The polynomials were fitted for
// this file: weighted least squares repeated until the relative errors levelled out.

// e^x for x <= 88, within 1 ulp where the result is normal; 0 below -87, also of -infinity. NaN
// stays.
inline V exponential(V x) {
  // Added, it leaves the nearest integer in the low bits of the mantissa.
  const V rounder = broadcast(12582912.0f);
  const V lowest = broadcast(-87.0f);
  const V clamped = larger(lowest, x);
  const V bits = fma(clamped, broadcast(1.44269502f), rounder);
  const V n = sub(bits, rounder);
  // ln 2 in two parts; n times the first is exact.
  V r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  V p = fma(broadcast(0.00139507244f), r, broadcast(0.00836902484f));
  p = fma(p, r, broadcast(0.0416662022f));
  p = fma(p, r, broadcast(0.166665182f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, mul(r, r), r);
  const V result = mul(add(p, broadcast(1.0f)), power_of_two(bits));
  return where_less(x, lowest, zero(), result);
}

// tanh x within 2 ulp. NaN stays.
inline V hyperbolic_tangent(V x) {
  const V size = magnitude(x);
  // Beyond 9.1 the nearest float is 1. The product keeps a limit on the exponent as well.
  const V limit = broadcast(10.0f);
  const V bounded = where_less(limit, size, limit, size);
  const V e = exponential(add(bounded, bounded));
  const V far = sub(broadcast(1.0f), div(broadcast(2.0f), add(e, broadcast(1.0f))));
  const V t = mul(size, size);
  V p = fma(broadcast(0.00216419785f), t, broadcast(-0.00820006337f));
  p = fma(p, t, broadcast(0.0217096582f));
  p = fma(p, t, broadcast(-0.0539483614f));
  p = fma(p, t, broadcast(0.133332178f));
  p = fma(p, t, broadcast(-0.333333313f));
  const V near = fma(mul(p, t), size, size);
  return with_sign(where_less(broadcast(0.62f), size, far, near), x);
}

// The lanes' sum and largest value, halves folded onto halves.
inline float sum_of_lanes(V v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
inline float largest_lane(V v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}
