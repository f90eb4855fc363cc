// Kernels for the CPU, compiled on the user's machine by kernels.py: Mish, and the reverse process for a few states.
// Plain C++ that compilers vectorise; arrays are dense float32.

#include <cstdint>
#include <cstring>
#include <vector>

// e^x to float32 rounding for x <= 20; a NaN stays one (Cephes: 2^k times a polynomial on |r| <= log(2) / 2)
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float k = (x * 1.44269504088896341f + rounding) - rounding;
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// x tanh(log(1 + e^x)) = x n / (n + 2), n = e^2 + 2 e; beyond x = 20 it is x in float32
static inline float mish_of(float x) {
    const float e = exponential(x > 20.0f ? 20.0f : x);
    const float n = e * (e + 2.0f);
    return x < -87.0f ? x * 0.0f : x * (n / (n + 2.0f));  // as PyTorch: 0 far below, NaN at minus infinity
}

// y' = t + x s (1 - t^2) with t = n / (n + 2), s the sigmoid
static inline float slope_of(float x) {
    const float clamped = x > 20.0f ? 20.0f : x;
    const float e = exponential(clamped);
    const float n = e * (e + 2.0f);
    const float r = 1.0f / (n + 2.0f);
    return x < -87.0f ? x * 0.0f : n * r + 4.0f * clamped * e * r * (1.0f + e) * r;
}

// y = W x + b for each of a few rows; W is (out, in). A row of W, once in the cache, serves all rows of x.
static void linear(const float *x, const float *w, const float *b, float *y, int64_t rows, int64_t in, int64_t out) {
    int64_t o = 0;
    for (; o + 4 <= out; o += 4) {
        const float *w0 = w + o * in, *w1 = w0 + in, *w2 = w1 + in, *w3 = w2 + in;
        for (int64_t row = 0; row < rows; ++row) {
            const float *v = x + row * in;
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (int64_t i = 0; i < in; ++i) {
                s0 += w0[i] * v[i];
                s1 += w1[i] * v[i];
                s2 += w2[i] * v[i];
                s3 += w3[i] * v[i];
            }
            float *u = y + row * out + o;
            u[0] = s0 + b[o], u[1] = s1 + b[o + 1], u[2] = s2 + b[o + 2], u[3] = s3 + b[o + 3];
        }
    }
    for (; o < out; ++o)
        for (int64_t row = 0; row < rows; ++row) {
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int64_t i = 0; i < in; ++i) s += w[o * in + i] * x[row * in + i];
            y[row * out + o] = s + b[o];
        }
}

extern "C" {

void mish(const float *__restrict x, float *__restrict y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = mish_of(x[i]);
}

void mish_backward(const float *__restrict grad, const float *__restrict x, float *__restrict out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = grad[i] * slope_of(x[i]);
}

// The loop of diffusion/process.py with the network of BoundMLP.__call__, in one call.
//   table:     (steps, 5): 1 / alpha_t, sigma_t / alpha_t, a, b, c
//   constants: (steps, rows, widths[0]): what state, time and bias add to the first layer
//   on_action: (action_dim, widths[0])
//   weights, biases: of the `layers` products after it, whose outputs are widths[1], ..., widths[layers] = action_dim
//   added:     (steps, rows, action_dim): s z; null adds none
//   x:         (rows, action_dim): in the initial noise, out the actions
void reverse_process(
    int64_t steps, int64_t rows, int64_t action_dim, int64_t layers, const int64_t *widths, const float *table,
    const float *constants, const float *on_action, const float *const *weights, const float *const *biases,
    const float *added, int32_t clip, float *x
) {
    int64_t widest = 0;
    for (int64_t layer = 0; layer <= layers; ++layer) widest = widths[layer] > widest ? widths[layer] : widest;
    std::vector<float> hidden(rows * widest), activated(rows * widest), previous(rows * action_dim, 0.0f);
    const int64_t first = widths[0];
    for (int64_t step = 0; step < steps; ++step) {
        for (int64_t row = 0; row < rows; ++row) {
            float *h = hidden.data() + row * first;
            std::memcpy(h, constants + (step * rows + row) * first, first * sizeof(float));
            for (int64_t j = 0; j < action_dim; ++j) {
                const float value = x[row * action_dim + j];
                const float *column = on_action + j * first;
                for (int64_t i = 0; i < first; ++i) h[i] += value * column[i];
            }
        }
        for (int64_t layer = 0; layer < layers; ++layer) {
            mish(hidden.data(), activated.data(), rows * widths[layer]);
            linear(activated.data(), weights[layer], biases[layer], hidden.data(), rows, widths[layer], widths[layer + 1]);
        }
        const float *c = table + step * 5;
        for (int64_t i = 0; i < rows * action_dim; ++i) {
            float denoised = x[i] * c[0] - hidden[i] * c[1];
            if (clip) denoised = denoised < -1.0f ? -1.0f : denoised > 1.0f ? 1.0f : denoised;
            const float noise = added ? added[step * rows * action_dim + i] : 0.0f;
            x[i] = noise + x[i] * c[2] + denoised * c[3] + previous[i] * c[4];
            previous[i] = denoised;
        }
    }
    for (int64_t i = 0; i < rows * action_dim; ++i) x[i] = x[i] < -1.0f ? -1.0f : x[i] > 1.0f ? 1.0f : x[i];
}

}
