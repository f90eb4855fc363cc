// The outputs of MLPs, and their gradients.
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
        size = round_up(2 * all + norms + (layers - 1) * rows, LANES);  // what comes next is aligned, too
    }
};

// Several MLPs of as many layers, on the same input.
//   layer: count * layers of them
//   x:     (rows, inputs of the first layers)
//   saved: as large as `Saved` says of each, one after the other, or null
//   y:     out, (rows, count, outputs of the last layers)
static void forward(int64_t count, int64_t layers, const Layer *layer, int64_t rows, int64_t threads, const float *x,
                    float *saved, float *y) {
    struct Net {
        BoundMLP<float> mlp;
        Saved all;
        Right<float> on_output;
        const float *bias;
        std::vector<Room<float>> rooms;
    };
    Memory memory;
    const int64_t inputs = layer[0].inputs, outputs = layer[layers - 1].outputs, tiles = (rows + TILE - 1) / TILE;
    std::vector<Net> nets;
    for (int64_t i = 0; i < count; ++i) {
        const Layer *own = layer + i * layers, &last = own[layers - 1];
        nets.push_back({BoundMLP<float>(memory, layers, own, 0, inputs, true, false), Saved(layers, own, rows, saved),
                        columns(memory, last, 0, last.inputs), memory.copy(last.bias, outputs, round_up(outputs, WIDE)), {}});
        for (int64_t j = 0; j < std::min(count * tiles, threads); ++j) nets[i].rooms.push_back(nets[i].mlp.room(memory));
        if (saved) saved += nets[i].all.size;
    }

    parallel(count * tiles, threads, [&](int64_t task, int64_t thread) {
        const int64_t i = task / tiles, start = task % tiles * TILE, some = std::min(rows - start, TILE);
        const Net &net = nets[i];
        const Left<float> of_x{x + start * inputs, inputs, 1};
        Room<float> room = net.rooms[thread];
        if (saved) {
            room.start = net.all.activations + start * net.mlp.stride, room.step = net.all.step, room.turns = net.mlp.depth;
            room.last = room.at(net.mlp.depth - 1);
            net.mlp.forward<true>(some, of_x, net.mlp.hidden[0].bias, 0, nullptr, room, net.all.kept, start);
        } else
            net.mlp.forward<false>(some, of_x, net.mlp.hidden[0].bias, 0, nullptr, room);
        product(some, net.mlp.activations(room.last), net.on_output, [&](int64_t r, int64_t c, Vector out) {
            store_first(y + ((start + r) * count + i) * outputs + c, out + load(net.bias + c), outputs - c);
        });
    });
}

// Gradients of a layer's parameters, shaped like them, or nulls.
struct Gradients {
    float *weight, *bias, *scale, *shift;
};

//   saved:     of the forward pass
//   of_y:      gradient at the outputs, (rows, count, outputs of the last layers)
//   gradients: count * layers of them
//   of_x:      out, of each MLP by itself, (count, rows, inputs of the first layers), or null
static void backward(int64_t count, int64_t layers, const Layer *layer, int64_t rows, int64_t threads, const float *x,
                     float *saved, const float *of_y, const Gradients *gradients, float *of_x) {
    struct Net {
        BoundMLP<float> mlp;
        Saved all;
        Right<float> on_output_back;
        float *of_linear, *of_norm, *scratch;
    };
    Memory memory;
    const int64_t inputs = layer[0].inputs, outputs = layer[layers - 1].outputs, of_y_row = count * outputs;
    const int64_t tiles = (rows + TILE - 1) / TILE;
    std::vector<Net> nets;
    for (int64_t i = 0; i < count; ++i) {
        const Layer *own = layer + i * layers, &last = own[layers - 1];
        const BoundMLP<float> mlp(memory, layers, own, 0, of_x ? inputs : 0, false, true);
        const Saved all(layers, own, rows, saved);
        const int64_t size = mlp.depth * all.step;
        nets.push_back({mlp, all, pack_weight_back<float>(memory, last.weight, outputs, last.inputs), memory.get(size),
                        normalises(layers, own) ? memory.get(size) : nullptr, memory.get(std::min(count * tiles, threads) * TILE * mlp.stride)});
        saved += all.size;
    }
    int32_t *which = memory.get<int32_t>(rows);
    std::iota(which, which + rows, 0);

    parallel(count * tiles, threads, [&](int64_t task, int64_t thread) {
        const int64_t i = task / tiles, start = task % tiles * TILE, some = std::min(rows - start, TILE);
        const Net &net = nets[i];
        const int64_t stride = net.mlp.stride;
        float *to = net.of_linear + start * stride;
        const Room<float> room{to, net.all.step, net.mlp.depth, to, net.scratch + thread * TILE * stride};
        const auto of_last = [&](const auto &use) {
            product(some, Left<float>{of_y + start * of_y_row + i * outputs, of_y_row, 1}, net.on_output_back, use);
        };
        const auto at_x = [&](int64_t r, int64_t c, Vector g) {
            store_first(of_x + (i * rows + start + r) * inputs + c, g, inputs - c);
        };
        float *of_norm = net.of_norm ? net.of_norm + start * stride : nullptr;
        net.mlp.backward(some, which + start, net.all.kept, room, of_last, at_x, of_norm);
    });

    const int64_t x_stride = round_up(inputs, WIDE) + LANES;
    float *padded_x = memory.zeros(rows * x_stride);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(padded_x + r * x_stride, x + r * inputs, 4 * inputs);

    std::vector<int64_t> task_layer, task_start;  // of all layers of all MLPs
    for (int64_t l = 0; l < count * layers; ++l)
        for (int64_t start = 0; start < layer[l].outputs; start += TILE) task_layer.push_back(l), task_start.push_back(start);
    parallel(task_layer.size(), threads, [&](int64_t task, int64_t) {
        const int64_t at = task_layer[task], i = at / layers, l = at % layers;
        const int64_t start = task_start[task], some = std::min(layer[at].outputs - start, TILE), width = layer[at].inputs;
        const Gradients &own = gradients[at];
        const Net &net = nets[i];
        const int64_t stride = net.mlp.stride;
        const bool is_last = l == layers - 1;
        const float *g = (is_last ? of_y + i * outputs : net.of_linear + l * net.all.step) + start;
        const int64_t step = is_last ? of_y_row : stride;
        if (own.weight) {
            const Right<float> input{l ? net.all.activations + (l - 1) * net.all.step : padded_x, rows, width, WIDE,
                                     l ? stride : x_stride, WIDE};
            product(some, Left<float>{g, 1, step}, input, [&](int64_t r, int64_t c, Vector sums) {
                store_first(own.weight + (start + r) * width + c, sums, width - c);
            });
        }
        const auto sum_rows = [&](float *to, const auto &number) {  // number(row, column, how many are left there)
            for (int64_t c = 0; to && c < some; c += LANES) {
                Vector total{};
                for (int64_t r = 0; r < rows; ++r) total += number(r, c, some - c);
                store_first(to + start + c, total, some - c);
            }
        };
        sum_rows(own.bias, [&](int64_t r, int64_t c, int64_t left) { return load_first(g + r * step + c, left); });
        const float *norm = net.of_norm + l * net.all.step + start, *normal = net.all.kept.normal + l * net.all.step + start;
        sum_rows(own.shift, [&](int64_t r, int64_t c, int64_t left) { return load_first(norm + r * stride + c, left); });
        sum_rows(own.scale, [&](int64_t r, int64_t c, int64_t left) {
            return load_first(norm + r * stride + c, left) * load_first(normal + r * stride + c, left);
        });
    });
}
