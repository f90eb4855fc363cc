// The quantile Huber loss, and its slope, in one pass over quantiles and targets.
#pragma once

#include "vectors.h"

// The mean over rows, networks, quantiles q_i and targets y_j of |tau_i - [y_j < q_i]| h(y_j - q_i), where tau_i is the middle
// of the i-th of equal parts of [0, 1], and h is half the square up to 1 and grows with slope 1 beyond.
//   quantiles: (rows, networks, count)
//   targets:   (rows, target_count)
//   slopes:    out, of the loss, shaped like the quantiles
static double quantile_huber(int64_t rows, int64_t networks, int64_t count, int64_t target_count, const float *quantiles,
                             const float *targets, float *slopes) {
    const float share = 1 / (static_cast<float>(rows * networks * count) * static_cast<float>(target_count));
    double loss = 0;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < networks * count; ++i) {
            const int64_t at = row * networks * count + i;
            const float tau = (static_cast<float>(i % count) + 0.5f) / static_cast<float>(count);
            const Vector quantile = all(quantiles[at]), above = all(tau), below = all(1 - tau);
            Vector total{}, slope{};
            for (int64_t j = 0; j < target_count; j += LANES) {
                const Vector d = first(load_first(targets + row * target_count + j, target_count - j) - quantile, target_count - j);
                const Vector inner = max(all(-1.0f), min(all(1.0f), d));
                const Vector weighted = (d < 0.0f ? below : above) * inner;
                total += weighted * (d - 0.5f * inner);  // d^2 / 2, or |d| - 1/2
                slope += weighted + 0.0f * d;  // PyTorch's slope is NaN where d is infinite
            }
            loss += sum(total);
            slopes[at] = -share * sum(slope);
        }
    return loss / (static_cast<double>(rows * networks * count) * static_cast<double>(target_count));
}
