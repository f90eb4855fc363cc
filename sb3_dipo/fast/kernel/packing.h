// Weights as right factors of products, in panels.
#pragma once

#include <type_traits>
#include <utility>

#include "product.h"

typedef uint32_t Words __attribute__((vector_size(4 * LANES), may_alias));
typedef Words AnyWords __attribute__((aligned(4)));
#if defined(__clang__)
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Of rows a and b, S apart, the one above or below after blocks of S columns off the diagonal have changed places.
template <uint32_t S, bool BELOW, uint32_t... J>
static inline Words swapped(Words a, Words b, std::integer_sequence<uint32_t, J...>) {
    return SHUFFLE(a, b, (J & S ? LANES + (BELOW ? J : J - S) : (BELOW ? J + S : J))...);
}

template <uint32_t S> static inline void swap_blocks(Words (&x)[LANES]) {
    const std::make_integer_sequence<uint32_t, LANES> all{};
#pragma GCC unroll 16
    for (uint32_t i = 0; i < LANES; ++i)
        if (!(i & S)) {
            const Words a = x[i], b = x[i + S];
            x[i] = swapped<S, false>(a, b, all), x[i + S] = swapped<S, true>(a, b, all);
        }
    if constexpr (S > 1) swap_blocks<S / 2>(x);
}

// LANES rows of as many words, `stride` apart, to columns that are `step` apart.
static inline void transpose(const uint32_t *from, int64_t stride, uint32_t *to, int64_t step) {
    Words x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = *reinterpret_cast<const AnyWords *>(from + i * stride);
    swap_blocks<LANES / 2>(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) *reinterpret_cast<Words *>(to + i * step) = x[i];
}

static inline int64_t panel_width(int64_t columns) { return columns <= LANES ? LANES : WIDE; }

// Words (columns, depth), rows `stride` apart, as the factor (depth, columns).
template <class T>
static Right<T> pack_transposed(Memory &memory, const T *words, int64_t depth, int64_t columns, int64_t stride) {
    const int64_t width = panel_width(columns), squares = depth / LANES * LANES;
    const uint32_t *from = reinterpret_cast<const uint32_t *>(words);
    uint32_t *to = memory.zeros_unless<uint32_t>(columns % width == 0, round_up(columns, width) * depth);
    for (int64_t start = 0; start < columns; start += width) {  // panels are written in the order of memory
        const uint32_t *rows = from + start * stride;
        uint32_t *panel = to + start * depth;
        const int64_t some = std::min(width, columns - start), whole = some / LANES * LANES;
        for (int64_t i = 0; i < squares; i += LANES)
            for (int64_t j = 0; j < whole; j += LANES) transpose(rows + j * stride + i, stride, panel + i * width + j, width);
        for (int64_t i = 0; i < depth; ++i)
            for (int64_t j = i < squares ? whole : 0; j < some; ++j) panel[i * width + j] = rows[j * stride + i];
    }
    return {reinterpret_cast<const T *>(to), depth, columns, width * depth, width, width};
}

// Words (depth, columns), rows `stride` apart.
template <class T> static Right<T> pack(Memory &memory, const T *from, int64_t depth, int64_t columns, int64_t stride) {
    const int64_t width = panel_width(columns);
    T *to = memory.zeros_unless<T>(columns % width == 0, round_up(columns, width) * depth);
    for (int64_t column = 0; column < columns; column += width)
        for (int64_t i = 0; i < depth; ++i)
            std::memcpy(to + column * depth + i * width, from + i * stride + column, 4 * std::min(width, columns - column));
    return {to, depth, columns, width * depth, width, width};
}

// (Of T, so that it is compiled only where it is used.)
template <class T> static T *round_to_pairs(Memory &memory, const float *from, int64_t count) {
    T *pairs = memory.get<T>(round_up(count, LANES) / 2);
    for (int64_t i = 0; i < count; i += LANES) store(pairs + i / 2, load_first(from + i, count - i));
    return pairs;
}

// The weight of a linear layer, (outputs, inputs), for x W^T, as it is for a single row, and for the gradient at x.
template <class T>
static Right<T> pack_weight(Memory &memory, const float *weight, int64_t outputs, int64_t inputs, bool single) {
    if constexpr (std::is_same<T, float>::value)
        return single ? Right<T>{weight, inputs, outputs, inputs, 1, 0}
                      : pack_transposed(memory, weight, inputs, outputs, inputs);
    else
        return pack_transposed(memory, round_to_pairs<T>(memory, weight, outputs * inputs), inputs / 2, outputs, inputs / 2);
}
template <class T> static Right<T> pack_weight_back(Memory &memory, const float *weight, int64_t outputs, int64_t inputs) {
    if constexpr (std::is_same<T, float>::value)
        return pack(memory, weight, outputs, inputs, inputs);
    else {
        const T *rounded = round_to_pairs<T>(memory, weight, outputs * inputs);
        T *pairs = memory.get<T>(outputs * inputs / 2);
        for (int64_t i = 0; i < outputs / 2; ++i)  // a pair is of two rows
            for (int64_t j = 0; j < inputs / 2; ++j) {
                const T above = rounded[i * inputs + j], below = rounded[i * inputs + inputs / 2 + j];
                pairs[i * inputs + 2 * j] = {above.first, below.first};
                pairs[i * inputs + 2 * j + 1] = {above.second, below.second};
            }
        return pack(memory, pairs, outputs / 2, inputs, inputs);
    }
}
