// The random-walk reference kappa_t as a table, for ReferenceTable; see docs/algorithm.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace clara {

// kappa_1 ... kappa_T for Adam steps on unit white noise, up to the T where Adam's bias correction has died out.
inline std::vector<double> random_walk_table(double beta1, double smoothing) {
  constexpr double kNegligible = 1e-12;  // of beta1^t, against 1
  constexpr double kMaxLength = 1048576.0;  // enough for beta1 up to 0.99997
  const double length = beta1 == 0.0 ? 1.0 : std::ceil(std::log(kNegligible) / std::log(beta1));
  const double q = 1.0 - smoothing, gain = std::sqrt(smoothing * (2.0 - smoothing));
  std::vector<double> table(static_cast<size_t>(std::max(1.0, std::min(length, kMaxLength))));
  // Variance of m, covariance of path and m, variance of the path.
  double variance = 0.0, covariance = 0.0, path_variance = 0.0, beta1_power = 1.0;
  for (double& kappa : table) {
    beta1_power *= beta1;
    const double a = gain / (1.0 - beta1_power);
    variance = beta1 * beta1 * variance + (1.0 - beta1) * (1.0 - beta1);
    path_variance = q * q * path_variance + 2.0 * q * a * beta1 * covariance + a * a * variance;
    covariance = q * beta1 * covariance + a * variance;
    kappa = path_variance;
  }
  return table;
}

// U_t for beta1^t = `power`, the expected square of one element of Adam's step on unit white noise.
inline double step_variance(double beta1, double power) {
  return (1.0 - beta1) / (1.0 + beta1) * (1.0 + power) / (1.0 - power);
}

// kappa_t / U_t, a walk's squared length in units of its last step's.
inline std::vector<double> measured_walk_table(double beta1, double smoothing) {
  std::vector<double> table = random_walk_table(beta1, smoothing);
  double beta1_power = 1.0;
  for (double& value : table) {
    beta1_power *= beta1;
    value /= step_variance(beta1, beta1_power);
  }
  return table;
}

inline double random_walk_limit(double beta1, double smoothing) {
  const double correlation = beta1 * (1.0 - smoothing);
  return (1.0 - beta1) / (1.0 + beta1) * (1.0 + correlation) / (1.0 - correlation);
}

inline double measured_walk_limit(double beta1, double smoothing) {
  return random_walk_limit(beta1, smoothing) / step_variance(beta1, 0.0);
}

// Beyond the table kappa_t approaches its limit by this factor a step, as a logarithm.
inline double random_walk_log_tail_decay(double smoothing) {
  return smoothing < 1.0 ? 2.0 * std::log1p(-smoothing) : -std::numeric_limits<double>::infinity();
}

}  // namespace clara
