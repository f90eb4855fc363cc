// What kernels.py calls. It has checked every pointer and size; arrays are dense. Compiled as one file.

#include "action_gradient.h"
#include "adam.h"
#include "quantile_huber.h"
#include "reverse_process.h"
#include "training.h"

#if defined(BFLOAT16)
using Element = Pair;
#else
using Element = float;
#endif

// Returns whether there was memory enough.
template <class Work> static int32_t guarded(const Work &work) noexcept {
    try {
        work();
        return 1;
    } catch (const std::bad_alloc &) {
        return 0;
    }
}

extern "C" {

int32_t is_for_amd() {
#if defined(__znver4__) || defined(__znver5__) || defined(__znver6__)
    return 1;
#else
    return 0;
#endif
}

void use_threads(Fork fork) { fork_threads = fork; }

int32_t reverse_process(int64_t layers, const Layer *layer, int64_t steps, const Step *table, int64_t rows,
                        int64_t action_dim, int64_t time_dim, int64_t features_dim, const float *embedding,
                        const float *features, const float *noise, int32_t clip, int64_t threads, float *x) {
    return guarded([=] {
        reverse_process<Element>(layers, layer, steps, table, rows, action_dim, time_dim, features_dim, embedding, features,
                                 noise, clip, threads, x);
    });
}

int32_t action_gradient(int64_t critics, int64_t layers, const Layer *layer, int32_t mean, const Climb *climb, int64_t rows,
                        int64_t features_dim, int64_t action_dim, const float *features, const float *low,
                        const float *high, int64_t threads, float *actions, float *values) {
    return guarded([=] {
        action_gradient<Element>(critics, layers, layer, mean, *climb, rows, features_dim, action_dim, features, low, high,
                                 threads, actions, values);
    });
}

int64_t mlp_kept(int64_t count, int64_t layers, const Layer *layer, int64_t rows) {
    int64_t size = 0;
    for (int64_t i = 0; i < count; ++i) size += Saved(layers, layer + i * layers, rows, nullptr).size;
    return size;
}

int32_t mlp_forward(int64_t count, int64_t layers, const Layer *layer, int64_t rows, int64_t threads, const float *x,
                    float *saved, float *y) {
    return guarded([=] { forward(count, layers, layer, rows, threads, x, saved, y); });
}

int32_t mlp_backward(int64_t count, int64_t layers, const Layer *layer, int64_t rows, int64_t threads, const float *x,
                     float *saved, const float *of_y, const Gradients *gradients, float *of_x) {
    return guarded([=] { backward(count, layers, layer, rows, threads, x, saved, of_y, gradients, of_x); });
}

double gradient_norm_of(int64_t count, const Adam *all, int64_t threads) { return gradient_norm(count, all, threads); }

void adam_step_of(int64_t count, const Adam *all, int64_t threads, double scale, double rate, double beta1, double beta2,
                  double epsilon) {
    adam_step(count, all, threads, scale, rate, beta1, beta2, epsilon);
}

void polyak_update_of(int64_t count, const Average *all, int64_t threads, double tau) {
    polyak_update(count, all, threads, tau);
}

double quantile_huber_loss(int64_t rows, int64_t networks, int64_t count, int64_t target_count, const float *quantiles,
                           const float *targets, float *slopes) {
    return quantile_huber(rows, networks, count, target_count, quantiles, targets, slopes);
}
}
