// An MLP of Linear, perhaps LayerNorm, Mish, ..., Linear at fixed weights, for a tile of rows: what a layer leaves is still
// in the cache when the next one reads it. T is float, or Pair: products between hidden layers are then of bfloat16.
#pragma once

#include <cmath>
#include <vector>

#include "packing.h"

constexpr int64_t TILE = 32 / ROWS * ROWS;  // rows that pass all layers together

// A linear layer, weight (outputs, inputs) and bias (outputs,), and weight and bias of the LayerNorm after it, or nulls.
struct Layer {
    const float *weight, *bias, *scale, *shift;
    int64_t inputs, outputs;
    double epsilon;
};

// The columns of its weight for some of a layer's inputs, as a factor.
static Right<float> columns(Memory &memory, const Layer &layer, int64_t begin, int64_t end) {
    return pack_transposed(memory, layer.weight + begin, end - begin, layer.outputs, layer.inputs);
}

// From row to row of activations, in numbers: rows a power of two apart would share places in the cache.
static int64_t row_stride(int64_t layers, const Layer *layer) {
    int64_t widest = 0;
    for (int64_t l = 0; l < layers - 1; ++l) widest = std::max(widest, round_up(layer[l].outputs, WIDE));
    return widest + LANES;
}

static bool normalises(int64_t layers, const Layer *layer) {
    return std::any_of(layer, layer + layers, [](const Layer &each) { return each.scale != nullptr; });
}

// The sum of number(c) over the vectors of a row, in chains that do not wait for each other.
template <class Number> static float sum_row(int64_t width, const Number &number) {
    constexpr int CHAINS = 4;
    Vector sums[CHAINS] = {};
    int64_t c = 0;
    for (; c + CHAINS * LANES <= width; c += CHAINS * LANES)
        for (int i = 0; i < CHAINS; ++i) sums[i] += number(c + i * LANES);
    for (; c < width; c += LANES) sums[0] += first(number(c), width - c);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// What a forward pass keeps for the backward pass, in row l * rows + row for layer l: of Mish its slope; of LayerNorm the
// normalised numbers and the factor that normalised them.
struct Kept {
    float *slope, *normal, *factor;
    int64_t rows;
};

// Where the activations of a tile go: those of hidden layer l to at(l), and, in float32, those of the last one to `last`.
template <class T> struct Room {
    T *start;
    int64_t step, turns;
    float *last, *scratch;
    T *at(int64_t l) const { return start + l % turns * step; }
};

template <class T> constexpr int64_t PER = std::is_same<T, float>::value ? 1 : 2;  // numbers in a T

template <class T> struct Hidden {
    int64_t width;
    const float *bias, *scale, *shift;
    float epsilon;
    Right<T> forward, back;  // of all but the first layer
};

template <class T> class BoundMLP {
  public:
    const int64_t depth, stride;
    std::vector<Hidden<T>> hidden;
    Right<float> on_x{}, on_x_back{};

    // An MLP of so many layers, at least two, for passes forward and back. Of its inputs those from `begin` to `end` vary.
    // For a `single` row, products forward may take the weights between hidden layers as they are.
    BoundMLP(Memory &memory, int64_t layers, const Layer *layer, int64_t begin, int64_t end, bool forward, bool back,
             bool single = false)
        : depth(layers - 1), stride(row_stride(layers, layer)) {
        for (int64_t l = 0; l < depth; ++l) {
            const int64_t width = layer[l].outputs, padded = round_up(width, WIDE);
            const auto copy = [&](const float *from) { return from ? memory.copy(from, width, padded) : nullptr; };
            Hidden<T> own{width, copy(layer[l].bias), copy(layer[l].scale), copy(layer[l].shift), 0, {}, {}};
            own.epsilon = static_cast<float>(layer[l].epsilon);
            if (l && forward) own.forward = pack_weight<T>(memory, layer[l].weight, width, layer[l].inputs, single);
            if (l && back) own.back = pack_weight_back<T>(memory, layer[l].weight, width, layer[l].inputs);
            hidden.push_back(own);
        }
        if (forward) on_x = columns(memory, layer[0], begin, end);
        if (back && begin < end)
            on_x_back = pack(memory, layer[0].weight + begin, layer[0].outputs, end - begin, layer[0].inputs);
    }

    Room<T> room(Memory &memory) const {
        const int64_t size = TILE * stride;
        return {memory.get<T>(2 * size / PER<T>), size / PER<T>, 2, memory.get(size), memory.get(size)};
    }

    // Run a tile through the hidden layers. The first one is base + more + W x: rows of base are `base_row` apart, more is
    // null or one row. With `keep`, rows from `row` on keep what a backward pass needs.
    template <bool keep>
    void forward(int64_t rows, const Left<float> &x, const float *base, int64_t base_row, const float *more,
                 const Room<T> &room, const Kept &kept = {}, int64_t row = 0) const {
        for (int64_t l = 0; l < depth; ++l) {
            const auto run = [&](auto *to) {
                if (l == 0)
                    layer<keep>(l, rows, x, on_x, base, base_row, more, to, room.scratch, kept, row);
                else
                    layer<keep>(l, rows, activations(room.at(l - 1)), hidden[l].forward, hidden[l].bias, 0, nullptr, to,
                                room.scratch, kept, row);
            };
            if (l == depth - 1)
                run(room.last);
            else
                run(room.at(l));
        }
    }

    // From a gradient at the activations of layer l to one at the outputs of its linear layer. start(use) calls
    // use(row, column, vector) for each vector of the former; row r is which[r] of what was kept. Where it is not null,
    // `of_norm` gets the gradient at the output of LayerNorm, for its weight and bias.
    template <class Out, class Start>
    void back_through(int64_t l, int64_t rows, const int32_t *which, const Kept &kept, Out *to, float *scratch,
                      const Start &start, float *of_norm = nullptr) const {
        const Hidden<T> &own = hidden[l];
        const float *slopes = kept.slope + l * kept.rows * stride;
        start([&](int64_t r, int64_t c, Vector g) {
            g *= load(slopes + which[r] * stride + c);
            if (of_norm) store(of_norm + r * stride + c, g);
            if (own.scale)
                store(scratch + r * stride + c, g * load(own.scale + c));
            else
                store(to + (r * stride + c) / PER<Out>, g);
        });
        if (!own.scale) return;
        float means[TILE], slopes_of_row[TILE];  // of all rows first, as in `layer`
        const auto normal = [&](int64_t r) { return kept.normal + (l * kept.rows + which[r]) * stride; };
        for (int64_t r = 0; r < rows; ++r) {
            const float *g = scratch + r * stride, *n = normal(r);
            means[r] = sum_row(own.width, [&](int64_t c) { return load(g + c); }) / own.width;
            slopes_of_row[r] = sum_row(own.width, [&](int64_t c) { return load(g + c) * load(n + c); }) / own.width;
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float *g = scratch + r * stride, *n = normal(r);
            const float factor = kept.factor[l * kept.rows + which[r]];
            for (int64_t c = 0; c < own.width; c += LANES)
                store(to + (r * stride + c) / PER<Out>, factor * (load(g + c) - means[r] - slopes_of_row[r] * load(n + c)));
        }
    }

    // The gradient at x, for rows `which` of those that were kept: use(row, column, vector) is called for each vector of it.
    // start(use) does so for the gradient at the activations of the last hidden layer. Gradients at the outputs of linear
    // layers go to `room`, that of the first one to `room.last`; `of_norms` is as `of_norm` above, from layer to layer like
    // the room, or null.
    template <class Start, class Use>
    void backward(int64_t rows, const int32_t *which, const Kept &kept, const Room<T> &room, const Start &start,
                  const Use &use, float *of_norms = nullptr) const {
        for (int64_t l = depth - 1; l >= 0; --l) {
            const auto run = [&](auto *to) {
                float *of_norm = of_norms ? of_norms + l * room.step : nullptr;
                if (l == depth - 1)
                    back_through(l, rows, which, kept, to, room.scratch, start, of_norm);
                else
                    back_through(l, rows, which, kept, to, room.scratch, [&](const auto &then) {
                        product(rows, activations(room.at(l + 1)), hidden[l + 1].back, then);
                    }, of_norm);
            };
            if (l == 0)
                run(room.last);
            else
                run(room.at(l));
        }
        if (on_x_back.at) product(rows, activations(room.last), on_x_back, use);
    }

    template <class A> Left<A> activations(const A *from) const { return {from, stride / PER<A>, 1}; }

  private:
    template <bool keep, class A, class Out>
    void layer(int64_t l, int64_t rows, const Left<A> &a, const Right<A> &b, const float *base, int64_t base_row,
               const float *more, Out *to, float *scratch, const Kept &kept, int64_t row) const {
        const Hidden<T> &own = hidden[l];
        const int64_t at = l * kept.rows + row;
        const auto activate = [&](int64_t r, int64_t c, Vector x) {
            if constexpr (keep) {
                Vector slope;
                x = mish(x, slope);
                store(kept.slope + (at + r) * stride + c, slope);
            } else
                x = mish(x);
            store(to + (r * stride + c) / PER<Out>, x);
        };
        product(rows, a, b, [&](int64_t r, int64_t c, Vector x) {
            x += load(base + r * base_row + c);
            if (more) x += load(more + c);
            if (own.scale)
                store(scratch + r * stride + c, x);
            else
                activate(r, c, x);
        });
        if (!own.scale) return;
        float means[TILE], factors[TILE];  // of all rows first: each alone would wait for its sums
        for (int64_t r = 0; r < rows; ++r) {
            const float *x = scratch + r * stride;
            const float mean = sum_row(own.width, [&](int64_t c) { return load(x + c); }) / own.width;
            const float squares = sum_row(own.width, [&](int64_t c) { return (load(x + c) - mean) * (load(x + c) - mean); });
            means[r] = mean, factors[r] = 1 / std::sqrt(squares / own.width + own.epsilon);
            if constexpr (keep) kept.factor[at + r] = factors[r];
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < own.width; c += LANES) {
                const Vector normal = (load(scratch + r * stride + c) - means[r]) * factors[r];
                if constexpr (keep) store(kept.normal + (at + r) * stride + c, normal);
                activate(r, c, normal * load(own.scale + c) + load(own.shift + c));
            }
    }
};
