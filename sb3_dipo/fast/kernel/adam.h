// A step of Adam (Kingma and Ba 2015) on a clipped gradient, and Polyak's average.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "threads.h"
#include "vectors.h"

// A parameter with `size` numbers, its gradient, Adam's means of the gradient and of its square, and how many steps it took.
struct Adam {
    float *parameter, *gradient, *mean, *square, *step;
    int64_t size;
};

// The parameter of a target network, and the network's own, which has `size` numbers.
struct Average {
    float *target;
    const float *parameter;
    int64_t size;
};

constexpr int64_t PIECE = 1 << 14;  // numbers that a thread takes at a time

// Call task(which, begin, size) for pieces of all parameters.
template <class One, class Task> static void pieces(int64_t count, const One *all, int64_t threads, const Task &task) {
    std::vector<std::pair<int64_t, int64_t>> list;
    for (int64_t i = 0; i < count; ++i)
        for (int64_t begin = 0; begin < all[i].size; begin += PIECE) list.emplace_back(i, begin);
    parallel(list.size(), threads, [&](int64_t n, int64_t) {
        task(n, all[list[n].first], list[n].second, std::min(all[list[n].first].size - list[n].second, PIECE));
    });
}

// The joint L2 norm of the gradients.
static double gradient_norm(int64_t count, const Adam *all, int64_t threads) {
    int64_t number = 0;
    for (int64_t i = 0; i < count; ++i) number += (all[i].size + PIECE - 1) / PIECE;
    std::vector<double> squares(number);
    pieces(count, all, threads, [&](int64_t n, const Adam &one, int64_t begin, int64_t size) {
        Vector sums[4] = {};
        for (int64_t i = 0; i < size; i += 4 * LANES)
            for (int64_t k = 0; k < 4; ++k) {
                const Vector g = load_first(one.gradient + begin + i + k * LANES, size - i - k * LANES);
                sums[k] += g * g;
            }
        squares[n] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    });
    double total = 0;
    for (double each : squares) total += each;
    return std::sqrt(total);
}

// Multiply the gradients by `scale`, and take a step.
static void adam_step(int64_t count, const Adam *all, int64_t threads, double scale, double rate, double beta1, double beta2,
                      double epsilon) {
    const float factor = scale, lerp = 1 - beta1, decay = beta2, grow = 1 - beta2, small = epsilon;
    for (int64_t i = 0; i < count; ++i) *all[i].step += 1;
    pieces(count, all, threads, [&](int64_t, const Adam &one, int64_t begin, int64_t size) {
        const double step = *one.step;
        const float correction = std::sqrt(1 - std::pow(beta2, step)), size_of_step = rate / (1 - std::pow(beta1, step));
        for (int64_t i = begin; i < begin + size; i += LANES) {
            const int64_t left = begin + size - i;
            const Vector g = load_first(one.gradient + i, left) * factor;
            const Vector m = load_first(one.mean + i, left), mean = m + lerp * (g - m);
            const Vector square = decay * load_first(one.square + i, left) + grow * g * g;
            const Vector change = size_of_step * mean / (square_root(square) / correction + small);
            store_first(one.gradient + i, g, left);
            store_first(one.mean + i, mean, left);
            store_first(one.square + i, square, left);
            store_first(one.parameter + i, load_first(one.parameter + i, left) - change, left);
        }
    });
}

// (1 - tau) of each target and tau of its parameter, rounded as SB3 does: a step of a target is small beside it.
static void polyak_update(int64_t count, const Average *all, int64_t threads, double tau) {
    const float keep = 1 - tau, take = tau;
    pieces(count, all, threads, [&](int64_t, const Average &one, int64_t begin, int64_t size) {
        for (int64_t i = begin; i < begin + size; i += LANES) {
            const int64_t left = begin + size - i;
            store_first(one.target + i, load_first(one.target + i, left) * keep, left);  // which may be the parameter, too
            store_first(one.target + i, load_first(one.target + i, left) + load_first(one.parameter + i, left) * take, left);
        }
    });
}
