// The action gradient: steps of Adam on the actions, uphill on the smallest or the mean of the critics' outputs.
#pragma once

#include "mlp.h"
#include "threads.h"

// As in action_gradient.py: the step size, the largest joint norm of a gradient, and what Adam's are.
struct Climb {
    int64_t steps;
    double rate, max_norm, beta1, beta2, epsilon;
};

static inline float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // a NaN stays

// One of the critics, with what is kept of all rows. Of its outputs the mean counts, whose weight is the mean of theirs.
template <class T> struct Critic {
    BoundMLP<T> mlp;
    const float *output;
    float output_bias;
    float *states;
    Kept kept{};
    std::vector<Room<T>> rooms;

    Critic(Memory &memory, int64_t layers, const Layer *layer, int64_t rows, int64_t features_dim, const float *features,
           int64_t threads, bool back)
        : mlp(memory, layers, layer, features_dim, layer[0].inputs, true, back) {
        const Layer &last = layer[layers - 1];
        float *mean = memory.zeros(round_up(last.inputs, WIDE));
        double bias = 0;
        for (int64_t i = 0; i < last.outputs; ++i) {
            for (int64_t j = 0; j < last.inputs; ++j) mean[j] += last.weight[i * last.inputs + j];
            bias += last.bias[i];
        }
        for (int64_t j = 0; j < last.inputs; ++j) mean[j] /= last.outputs;
        output = mean, output_bias = static_cast<float>(bias / last.outputs);

        states = memory.get(rows * mlp.stride);
        product(rows, Left<float>{features, features_dim, 1}, columns(memory, layer[0], 0, features_dim),
                [&](int64_t r, int64_t c, Vector y) { store(states + r * mlp.stride + c, y + load(mlp.hidden[0].bias + c)); });
        if (back) {
            const int64_t size = mlp.depth * rows * mlp.stride;
            kept = {memory.get(size), normalises(layers, layer) ? memory.get(size) : nullptr, memory.get(mlp.depth * rows), rows};
        }
        for (int64_t i = 0; i < threads; ++i) rooms.push_back(mlp.room(memory));
    }

    template <bool keep>
    void values(int64_t start, int64_t rows, const Left<float> &x, const Room<T> &room, float *to) const {
        mlp.template forward<keep>(rows, {x.at + start * x.row, x.row, 1}, states + start * mlp.stride, mlp.stride, nullptr,
                                   room, kept, start);
        const int64_t width = mlp.hidden.back().width;
        for (int64_t r = 0; r < rows; ++r) {
            const float *last = room.last + r * mlp.stride;
            to[r] = sum_row(width, [&](int64_t c) { return load(last + c) * load(output + c); }) + output_bias;
        }
    }
};

// The inputs of the critics are features and action, in this order.
//   layer:         critics * layers of them
//   features:      (rows, features_dim)
//   low, high:     bounds, (rows, action_dim); nulls are -1 and 1
//   actions:       (rows, action_dim), in and out
//   values:        out, the objective at the actions that came in, (rows,)
template <class T>
static void action_gradient(int64_t critics, int64_t layers, const Layer *layer, bool mean, const Climb &climb, int64_t rows,
                            int64_t features_dim, int64_t action_dim, const float *features, const float *low,
                            const float *high, int64_t threads, float *actions, float *values) {
    Memory memory;
    std::vector<Critic<T>> nets;
    for (int64_t i = 0; i < critics; ++i)
        nets.emplace_back(memory, layers, layer + i * layers, rows, features_dim, features, threads, climb.steps > 0);
    const int64_t padded = round_up(action_dim, panel_width(action_dim)), size = rows * padded, tiles = (rows + TILE - 1) / TILE;
    float *x = memory.zeros(size), *m = memory.zeros(size), *v = memory.zeros(size), *q = memory.get(critics * rows);
    float *gradients = memory.zeros(critics * size);  // of the mean one of each critic, of the smallest one
    int32_t *chosen = memory.get<int32_t>(rows), *which = memory.get<int32_t>(critics * rows);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(x + r * padded, actions + r * action_dim, 4 * action_dim);

    const auto evaluate = [&](auto keep, float *to) {
        parallel(critics * tiles, threads, [&](int64_t task, int64_t thread) {
            const int64_t net = task / tiles, start = task % tiles * TILE;  // so that a critic's weights stay in the cache
            nets[net].template values<decltype(keep)::value>(start, std::min(rows - start, TILE), {x, padded, 1},
                                                  nets[net].rooms[thread], q + net * rows + start);
        });
        for (int64_t r = 0; r < rows; ++r) {
            float total = q[r], smallest = q[r];
            chosen[r] = 0;
            for (int32_t i = 1; i < critics; ++i) {
                const float now = q[i * rows + r];
                total += now;
                if (now < smallest || (now != now && smallest == smallest)) smallest = now, chosen[r] = i;  // NaN counts
            }
            if (to) to[r] = mean ? total / critics : smallest;
        }
    };

    double power1 = 1, power2 = 1;
    for (int64_t step = 0; step < climb.steps; ++step) {
        evaluate(std::true_type(), step ? nullptr : values);
        std::vector<int64_t> task_net, task_start, count(critics);
        for (int64_t i = 0; i < critics; ++i) {
            for (int64_t r = 0; r < rows; ++r)
                if (mean || chosen[r] == i) which[i * rows + count[i]++] = r;
            for (int64_t start = 0; start < count[i]; start += TILE) task_net.push_back(i), task_start.push_back(start);
        }
        parallel(task_net.size(), threads, [&](int64_t task, int64_t thread) {
            const int64_t i = task_net[task], start = task_start[task], some = std::min(count[i] - start, TILE);
            const Critic<T> &net = nets[i];
            const int32_t *own = which + i * rows + start;
            float *gradient = gradients + (mean ? i * size : 0);
            const auto of_output = [&](const auto &use) {
                for (int64_t r = 0; r < some; ++r)
                    for (int64_t c = 0; c < net.mlp.hidden.back().width; c += LANES) use(r, c, load(net.output + c));
            };
            net.mlp.backward(some, own, net.kept, net.rooms[thread], of_output, [&](int64_t r, int64_t c, Vector g) {
                store(gradient + own[r] * padded + c, g);
            });
        });
        const auto each = [&](const auto &use) {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < action_dim; ++c) use(r * padded + c, r * action_dim + c);
        };
        double squares = 0;
        each([&](int64_t j, int64_t) {
            for (int64_t i = 1; mean && i < critics; ++i) gradients[j] += gradients[i * size + j];
            if (mean) gradients[j] /= critics;
            squares += gradients[j] * gradients[j];
        });
        float scale = static_cast<float>(climb.max_norm / (static_cast<float>(std::sqrt(squares)) + 1e-6f));
        if (scale > 1) scale = 1;  // a NaN stays
        power1 *= climb.beta1, power2 *= climb.beta2;
        const float lerp = 1 - climb.beta1, decay = climb.beta2, grow = 1 - climb.beta2, epsilon = climb.epsilon;
        const float rate = climb.rate / (1 - power1), correction = 1 / (1 - power2);
        each([&](int64_t j, int64_t k) {
            const float g = gradients[j] * scale;
            m[j] += lerp * (g - m[j]);
            v[j] = decay * v[j] + grow * g * g;
            const float y = x[j] + rate * m[j] / (std::sqrt(v[j] * correction) + epsilon);
            x[j] = clamped(y, low ? low[k] : -1.0f, high ? high[k] : 1.0f);
        });
    }
    if (climb.steps == 0) evaluate(std::false_type(), values);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(actions + r * action_dim, x + r * padded, 4 * action_dim);
}
