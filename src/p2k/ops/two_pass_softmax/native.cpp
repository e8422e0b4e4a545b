// Softmax in two passes for a CPU with wide vectors. Plain loops over LANES independent accumulators: the compiler
// turns each into vector instructions. No maximum is taken, so the input is read twice and the output written once.
// Source: dukhan2020twopass. Chapter: two-pass-softmax.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 64;
constexpr float LOG2_E = 0x1.715476p+0f;
// ln 2 in two parts; the product with the second is what the first rounds away.
constexpr float LN2_HIGH = 0x1.62E43p-1f;
constexpr float LN2_LOW = -0x1.05C61p-29f;
// Below this argument e^x is zero; the NaN that -inf leaves in p is never used.
constexpr float LOWEST = -1e9f;
constexpr float ZERO_EXPONENT = -1e30f;

struct Pair {
  float mantissa, exponent;
};

// e^x = mantissa * 2^exponent. Minimax polynomial of degree five on [-ln 2 / 2, ln 2 / 2].
inline Pair exponential(float x) {
  const float n = std::nearbyint(x * LOG2_E);
  float t = std::fma(n, -LN2_HIGH, x);
  t = std::fma(n, -LN2_LOW, t);
  float p = 0x1.0F9F9Cp-7f;
  p = std::fma(p, t, 0x1.573A1Ap-5f);
  p = std::fma(p, t, 0x1.555A80p-3f);
  p = std::fma(p, t, 0x1.FFFDC6p-2f);
  p = std::fma(p, t, 0x1.FFFFF6p-1f);
  p = std::fma(p, t, 1.0f);
  return {x < LOWEST ? 0.0f : p, x < LOWEST ? ZERO_EXPONENT : n};
}

// 2^k for an integer-valued k <= 0, written into the exponent field; results below the normal range are zero, and so
// is that of NaN, whose mantissa is NaN too.
inline float power_of_two(float k) {
  const float bounded = k >= -127.0f ? k : -127.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(bounded) + 127) << 23;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void add(Pair& sum, Pair term) {
  // NaN must win the comparison, or it would be lost here.
  const float top = sum.exponent >= term.exponent ? sum.exponent : term.exponent;
  sum.mantissa = sum.mantissa * power_of_two(sum.exponent - top) + term.mantissa * power_of_two(term.exponent - top);
  sum.exponent = top;
}

void softmax_row(const float* x, float* y, std::int64_t n) {
  float mantissa[LANES], exponent[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    mantissa[lane] = 0.0f;
    exponent[lane] = ZERO_EXPONENT;
  }
  std::int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) {
      Pair sum{mantissa[lane], exponent[lane]};
      add(sum, exponential(x[i + lane]));
      mantissa[lane] = sum.mantissa;
      exponent[lane] = sum.exponent;
    }
  }
  Pair total{0.0f, ZERO_EXPONENT};
  for (int lane = 0; lane < LANES; ++lane) add(total, {mantissa[lane], exponent[lane]});
  for (; i < n; ++i) add(total, exponential(x[i]));
  const float inverse = 1.0f / total.mantissa;
  for (std::int64_t j = 0; j < n; ++j) {
    const Pair term = exponential(x[j]);
    y[j] = term.mantissa * inverse * power_of_two(term.exponent - total.exponent);
  }
}

// The same arithmetic with the maximum taken first: the control that differs from softmax_row in the passes alone.
// RELOAD keeps the exponentials in the output between the passes, otherwise they are computed twice.
template <bool RELOAD>
void three_pass_row(const float* x, float* y, std::int64_t n) {
  float tops[LANES], sums[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    tops[lane] = LOWEST;
    sums[lane] = 0.0f;
  }
  std::int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) tops[lane] = x[i + lane] <= tops[lane] ? tops[lane] : x[i + lane];
  }
  float top = LOWEST;
  for (int lane = 0; lane < LANES; ++lane) top = tops[lane] <= top ? top : tops[lane];
  for (; i < n; ++i) top = x[i] <= top ? top : x[i];
  for (i = 0; i + LANES <= n; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) {
      const Pair term = exponential(x[i + lane] - top);
      const float value = term.mantissa * power_of_two(term.exponent);
      if (RELOAD) y[i + lane] = value;
      sums[lane] += value;
    }
  }
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
  for (; i < n; ++i) {
    const Pair term = exponential(x[i] - top);
    const float value = term.mantissa * power_of_two(term.exponent);
    if (RELOAD) y[i] = value;
    sum += value;
  }
  const float inverse = 1.0f / sum;
  for (std::int64_t j = 0; j < n; ++j) {
    if (RELOAD) {
      y[j] *= inverse;
    } else {
      const Pair term = exponential(x[j] - top);
      y[j] = term.mantissa * power_of_two(term.exponent) * inverse;
    }
  }
}

template <typename Row>
void each_row(Row row, const float* x, float* y, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i) row(x + i * columns, y + i * columns, columns);
}

}  // namespace

extern "C" {

void p2k_two_pass(const float* x, float* y, std::int64_t rows, std::int64_t columns) {
  each_row(softmax_row, x, y, rows, columns);
}

void p2k_three_pass_recompute(const float* x, float* y, std::int64_t rows, std::int64_t columns) {
  each_row(three_pass_row<false>, x, y, rows, columns);
}

void p2k_three_pass_reload(const float* x, float* y, std::int64_t rows, std::int64_t columns) {
  each_row(three_pass_row<true>, x, y, rows, columns);
}

}  // extern "C"
