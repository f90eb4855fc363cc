// The reverse process: each tile of states runs through all steps before the next one begins.
#pragma once

#include "mlp.h"
#include "threads.h"

// A row of a solver's table: D = scale_x x - scale_noise eps, clipped, and x' = a x + b D + c D_prev + s z.
struct Step {
    float scale_x, scale_noise, a, b, c, s;
};

constexpr int64_t FEW_STEPS = 10;  // of one state: packing the weights does not pay for so few products

static inline Vector clipped(Vector x) { return max(all(-1.0f), min(all(1.0f), x)); }

// The network's inputs are action, embedding of the time and features, in this order.
//   embedding: (steps, time_dim)
//   features:  (rows, features_dim)
//   noise:     (steps, rows, action_dim); null adds none
//   x:         (rows, action_dim): in the initial noise, out the actions
template <class T>
static void reverse_process(int64_t layers, const Layer *layer, int64_t steps, const Step *table, int64_t rows,
                            int64_t action_dim, int64_t time_dim, int64_t features_dim, const float *embedding,
                            const float *features, const float *noise, bool clip, int64_t threads, float *x) {
    Memory memory;
    const BoundMLP<T> mlp(memory, layers, layer, 0, action_dim, true, false, rows == 1 && steps <= FEW_STEPS);
    const int64_t of_action = action_dim, of_state = action_dim + time_dim, stride = mlp.stride;
    const Right<float> on_time = columns(memory, layer[0], of_action, of_state);
    const Right<float> on_state = columns(memory, layer[0], of_state, of_state + features_dim);
    const Right<float> on_output = columns(memory, layer[layers - 1], 0, layer[layers - 1].inputs);
    const int64_t padded = round_up(action_dim, on_output.width);
    const float *output_bias = memory.copy(layer[layers - 1].bias, action_dim, padded);

    float *times = memory.get(steps * stride);
    product(steps, Left<float>{embedding, time_dim, 1}, on_time,
            [&](int64_t r, int64_t c, Vector y) { store(times + r * stride + c, y); });

    struct Own {  // of a thread
        Room<T> room;
        float *states, *x, *clean;
    };
    std::vector<Own> owns;
    const int64_t tiles = (rows + TILE - 1) / TILE;
    for (int64_t i = 0; i < std::min(tiles, threads); ++i)
        owns.push_back({mlp.room(memory), memory.get(TILE * stride), memory.get(TILE * padded), memory.get(TILE * padded)});

    parallel(tiles, threads, [&](int64_t tile, int64_t thread) {
        const Own &own = owns[thread];
        const int64_t start = tile * TILE, some = std::min(rows - start, TILE);
        product(some, Left<float>{features + start * features_dim, features_dim, 1}, on_state,
                [&](int64_t r, int64_t c, Vector y) { store(own.states + r * stride + c, y + load(mlp.hidden[0].bias + c)); });
        const auto each = [&](const auto &use) {  // use(row, column, how many numbers are left there)
            for (int64_t r = 0; r < some; ++r)
                for (int64_t c = 0; c < padded; c += LANES) use(r, c, action_dim - c);
        };
        each([&](int64_t r, int64_t c, int64_t left) {
            store(own.x + r * padded + c, load_first(x + (start + r) * action_dim + c, left));
            store(own.clean + r * padded + c, Vector{});
        });
        for (int64_t step = 0; step < steps; ++step) {
            const Step &now = table[step];
            mlp.template forward<false>(some, {own.x, padded, 1}, own.states, stride, times + step * stride, own.room);
            product(some, mlp.activations(own.room.last), on_output, [&](int64_t r, int64_t c, Vector y) {
                float *to = own.x + r * padded + c, *before = own.clean + r * padded + c;
                Vector clean = load(to) * now.scale_x - (y + load(output_bias + c)) * now.scale_noise;
                if (clip) clean = clipped(clean);
                Vector next = load(to) * now.a + clean * now.b;
                if (now.c != 0) next += load(before) * now.c;
                if (noise) next += load_first(noise + ((step * rows + start + r) * action_dim + c), action_dim - c) * now.s;
                store(to, next), store(before, clean);
            });
        }
        each([&](int64_t r, int64_t c, int64_t left) {
            store_first(x + (start + r) * action_dim + c, clipped(load(own.x + r * padded + c)), left);
        });
    });
}
