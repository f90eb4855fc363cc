// The outputs of an MLP, and its gradients.
#pragma once

#include <numeric>

#include "mlp.h"
#include "threads.h"

// What a forward pass keeps for the backward pass: activations, and what `Kept` is, one after the other in memory.
struct Saved {
    float *activations;
    int64_t step;  // of the activations, from layer to layer
    Kept kept;
    int64_t size;

    Saved(int64_t layers, const Layer *layer, int64_t rows, float *start) : activations(start) {
        step = rows * row_stride(layers, layer);
        const int64_t all = (layers - 1) * step, norms = normalises(layers, layer) ? all : 0;
        kept = {start + all, start + 2 * all, start + 2 * all + norms, rows};
        size = 2 * all + norms + (layers - 1) * rows;
    }
};

//   x:     (rows, inputs of the first layer)
//   saved: as large as `Saved` says, or null
//   y:     out, (rows, outputs of the last layer)
static void forward(int64_t layers, const Layer *layer, int64_t rows, int64_t threads, const float *x, float *saved,
                        float *y) {
    Memory memory;
    const int64_t inputs = layer[0].inputs, outputs = layer[layers - 1].outputs, tiles = (rows + TILE - 1) / TILE;
    const BoundMLP<float> mlp(memory, layers, layer, 0, inputs, true, false);
    const Saved all(layers, layer, rows, saved);
    const Right<float> on_output = columns(memory, layer[layers - 1], 0, layer[layers - 1].inputs);
    const float *bias = memory.copy(layer[layers - 1].bias, outputs, round_up(outputs, WIDE));
    std::vector<Room<float>> rooms;
    for (int64_t i = 0; i < std::min(tiles, threads); ++i) rooms.push_back(mlp.room(memory));

    parallel(tiles, threads, [&](int64_t tile, int64_t thread) {
        const int64_t start = tile * TILE, some = std::min(rows - start, TILE);
        const Left<float> of_x{x + start * inputs, inputs, 1};
        Room<float> room = rooms[thread];
        if (saved) {
            room.start = all.activations + start * mlp.stride, room.step = all.step, room.turns = mlp.depth;
            room.last = room.at(mlp.depth - 1);
            mlp.forward<true>(some, of_x, mlp.hidden[0].bias, 0, nullptr, room, all.kept, start);
        } else
            mlp.forward<false>(some, of_x, mlp.hidden[0].bias, 0, nullptr, room);
        product(some, mlp.activations(room.last), on_output, [&](int64_t r, int64_t c, Vector out) {
            store_first(y + (start + r) * outputs + c, out + load(bias + c), outputs - c);
        });
    });
}

// Gradients of a layer's parameters, shaped like them, or nulls.
struct Gradients {
    float *weight, *bias, *scale, *shift;
};

//   saved: of the forward pass
//   of_y:  gradient at the outputs, (rows, outputs of the last layer)
//   of_x:  out, (rows, inputs of the first layer), or null
static void backward(int64_t layers, const Layer *layer, int64_t rows, int64_t threads, const float *x, float *saved,
                         const float *of_y, const Gradients *gradients, float *of_x) {
    Memory memory;
    const Layer &last = layer[layers - 1];
    const int64_t inputs = layer[0].inputs, tiles = (rows + TILE - 1) / TILE;
    const BoundMLP<float> mlp(memory, layers, layer, 0, of_x ? inputs : 0, false, true);
    const Right<float> on_output_back = pack_weight_back<float>(memory, last.weight, last.outputs, last.inputs);
    const Saved all(layers, layer, rows, saved);
    const int64_t stride = mlp.stride;
    float *of_linear = memory.get(mlp.depth * all.step), *scratch = memory.get(std::min(tiles, threads) * TILE * stride);
    float *of_norm = normalises(layers, layer) ? memory.get(mlp.depth * all.step) : nullptr;
    int32_t *which = memory.get<int32_t>(rows);
    std::iota(which, which + rows, 0);

    parallel(tiles, threads, [&](int64_t tile, int64_t thread) {
        const int64_t start = tile * TILE, some = std::min(rows - start, TILE);
        float *to = of_linear + start * stride;
        const Room<float> room{to, all.step, mlp.depth, to, scratch + thread * TILE * stride};
        const auto of_last = [&](const auto &use) {
            product(some, Left<float>{of_y + start * last.outputs, last.outputs, 1}, on_output_back, use);
        };
        const auto at_x = [&](int64_t r, int64_t c, Vector g) {
            store_first(of_x + (start + r) * inputs + c, g, inputs - c);
        };
        mlp.backward(some, which + start, all.kept, room, of_last, at_x, of_norm ? of_norm + start * stride : nullptr);
    });

    const int64_t x_stride = round_up(inputs, WIDE) + LANES;
    float *padded_x = memory.zeros(rows * x_stride);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(padded_x + r * x_stride, x + r * inputs, 4 * inputs);

    std::vector<int64_t> task_layer, task_start;
    for (int64_t l = 0; l < layers; ++l)
        for (int64_t start = 0; start < layer[l].outputs; start += TILE) task_layer.push_back(l), task_start.push_back(start);
    parallel(task_layer.size(), threads, [&](int64_t task, int64_t) {
        const int64_t l = task_layer[task], start = task_start[task], some = std::min(layer[l].outputs - start, TILE);
        const bool is_last = l == layers - 1;
        const float *g = (is_last ? of_y : of_linear + l * all.step) + start;
        const int64_t step = is_last ? last.outputs : stride, width = layer[l].inputs;
        if (gradients[l].weight) {
            const Right<float> input{l ? all.activations + (l - 1) * all.step : padded_x, rows, width, WIDE,
                                     l ? stride : x_stride, WIDE};
            product(some, Left<float>{g, 1, step}, input, [&](int64_t r, int64_t c, Vector sums) {
                store_first(gradients[l].weight + (start + r) * width + c, sums, width - c);
            });
        }
        const auto sum_rows = [&](float *to, const auto &number) {  // number(row, column, how many are left there)
            for (int64_t c = 0; to && c < some; c += LANES) {
                Vector total{};
                for (int64_t r = 0; r < rows; ++r) total += number(r, c, some - c);
                store_first(to + start + c, total, some - c);
            }
        };
        sum_rows(gradients[l].bias, [&](int64_t r, int64_t c, int64_t left) { return load_first(g + r * step + c, left); });
        const float *norm = of_norm + l * all.step + start, *normal = all.kept.normal + l * all.step + start;
        sum_rows(gradients[l].shift, [&](int64_t r, int64_t c, int64_t) { return load(norm + r * stride + c); });
        sum_rows(gradients[l].scale, [&](int64_t r, int64_t c, int64_t) {
            return load(norm + r * stride + c) * load(normal + r * stride + c);
        });
    });
}
