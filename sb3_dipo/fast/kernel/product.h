// Products of matrices in blocks that stay in registers; what becomes of each block is up to the caller.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "vectors.h"

#define NOINLINE __attribute__((noinline))

// Memory of a call, aligned for vectors and freed at its end.
class Memory {
  public:
    template <class T = float> T *get(int64_t count) {
        const size_t size = (count * sizeof(T) + 127) / 64 * 64;
        void *block = std::aligned_alloc(64, size);
        if (!block) throw std::bad_alloc();
        blocks.emplace_back(block, std::free);
        return static_cast<T *>(block);
    }
    template <class T = float> T *zeros(int64_t count) {
        return static_cast<T *>(std::memset(static_cast<void *>(get<T>(count)), 0, count * sizeof(T)));
    }
    template <class T = float> T *zeros_unless(bool filled, int64_t count) {
        return filled ? get<T>(count) : zeros<T>(count);
    }
    float *copy(const float *from, int64_t count, int64_t padded) {
        return static_cast<float *>(std::memcpy(zeros(padded), from, count * sizeof(float)));
    }

  private:
    std::vector<std::unique_ptr<void, void (*)(void *)>> blocks;
};

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A block is ROWS rows by two vectors: of 32 registers 28 hold sums, of 16 registers 12. (Where numbers of the left factor
// need a register, too, there are fewer.) Few rows take several panels at once, up to SUMS sums.
#if defined(__AVX512F__)
constexpr int ROWS = 14, SUMS = 16;
#elif defined(__aarch64__)
constexpr int ROWS = 8, SUMS = 16;
#else
constexpr int ROWS = 6, SUMS = 8;
#endif
constexpr int WIDE = 2 * LANES;

// The left factor, (rows, depth): rows lie `row` apart in memory and numbers of a row `step`. With bfloat16, T is a Pair and
// depth counts pairs.
template <class T> struct Left {
    const T *at;
    int64_t row, step;
};

// The right factor, (depth, columns), in panels of `width` columns, one or two vectors; panels lie `panel` apart in memory
// and rows of a panel `step`. With width 0 it is not packed, for a single row: columns lie `panel` apart, and
// their numbers side by side.
template <class T> struct Right {
    const T *at;
    int64_t depth, columns, panel, step, width;
};

static inline Vector multiply_add(Vector x, const float *a, Vector y) { return x + y * *a; }
#if defined(__AVX512BF16__)
static inline Vector multiply_add(Vector x, const Pair *a, Vector y) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return (Vector)_mm512_dpbf16_ps((__m512)x, (__m512bh)y, (__m512bh)_mm512_set1_epi32(pair));
}
#endif

// The product of R rows and P panels of V vectors each.
template <int R, int P, int V, class T>
static NOINLINE void multiply(const Left<T> &a, const Right<T> &b, Vector (&result)[R][P * V]) {
    Vector sums[R][P * V] = {};
    const T *rows[R], *panels[P];
    for (int r = 0; r < R; ++r) rows[r] = a.at + r * a.row;
    for (int p = 0; p < P; ++p) panels[p] = b.at + p * b.panel;
    const int64_t depth = b.depth, a_step = a.step, b_step = b.step;
    for (int64_t i = 0, j = 0, k = 0; k < depth; i += a_step, j += b_step, ++k) {
        Vector right[P * V];
#pragma GCC unroll 16
        for (int v = 0; v < P * V; ++v) right[v] = *reinterpret_cast<const Vector *>(panels[v / V] + j + v % V * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < P * V; ++v) sums[r][v] = multiply_add(sums[r][v], rows[r] + i, right[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < P * V; ++v) result[r][v] = sums[r][v];
}

template <int R, int P, int V, class T, class Use>
static void block(int64_t row, int64_t column, const Left<T> &a, const Right<T> &b, const Use &use) {
    Vector result[R][P * V];
    multiply<R, P, V>(Left<T>{a.at + row * a.row, a.row, a.step},
                      Right<T>{b.at + column / (V * LANES) * b.panel, b.depth, b.columns, b.panel, b.step, b.width}, result);
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 1
        for (int v = 0; v < P * V; ++v) use(row + r, column + v * LANES, result[r][v]);
}

// R rows and all columns: with few rows, several panels at once.
template <int R, int V, class T, class Use>
static void few_rows(int64_t row, const Left<T> &a, const Right<T> &b, const Use &use) {
    constexpr int P = V == 1 ? 1 : SUMS / (R * V);
    int64_t column = 0;
    for (; column + (P - 1) * b.width < b.columns; column += P * b.width) block<R, P, V>(row, column, a, b, use);
    if constexpr (P > 1)
        for (; column < b.columns; column += b.width) block<R, 1, V>(row, column, a, b, use);
}

template <int V, class T, class Use>
static void product_of(int64_t rows, const Left<T> &a, const Right<T> &b, const Use &use) {
    const int64_t whole = rows / ROWS * ROWS;
    for (int64_t column = 0; column < b.columns; column += b.width)  // a panel serves all rows while it is in the cache
        for (int64_t row = 0; row < whole; row += ROWS) block<ROWS, 1, V>(row, column, a, b, use);
    int64_t row = whole;
    if constexpr (ROWS > 8)
        if (rows - row >= 8) few_rows<8, V>(row, a, b, use), row += 8;
    if (rows - row >= 4) few_rows<4, V>(row, a, b, use), row += 4;
    if (rows - row >= 2) few_rows<2, V>(row, a, b, use), row += 2;
    if (rows - row >= 1) few_rows<1, V>(row, a, b, use);
}

// One row, whose numbers lie side by side, times a factor that is not packed: SUMS dot products at once.
template <class Use> static void dot_products(const float *a, const Right<float> &b, const Use &use) {
    constexpr int C = SUMS < LANES ? SUMS : LANES;
    for (int64_t column = 0; column < b.columns; column += LANES) {
        alignas(64) float result[LANES] = {};
        for (int64_t start = column; start < std::min(column + LANES, b.columns); start += C) {
            Vector sums[C] = {};
            const float *columns[C];
            for (int c = 0; c < C; ++c) columns[c] = b.at + std::min(start + c, b.columns - 1) * b.panel;
            for (int64_t k = 0; k < b.depth; k += LANES) {
                const Vector left = load_first(a + k, b.depth - k);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) sums[c] += left * load_first(columns[c] + k, b.depth - k);
            }
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) result[start - column + c] = sum(sums[c]);
        }
        use(0, column, load(result));
    }
}

// Multiply, and call use(row, column, vector) for each vector of the product, whose first number is at that row and column;
// columns beyond the last one hold anything. A number of it does not depend on the other rows, nor, where
// the factor is packed, on how many there are.
template <class T, class Use> static void product(int64_t rows, const Left<T> &a, const Right<T> &b, const Use &use) {
    if constexpr (std::is_same<T, float>::value)
        if (b.width == 0) return dot_products(a.at, b, use);
    if (b.width == LANES)
        product_of<1>(rows, a, b, use);
    else
        product_of<2>(rows, a, b, use);
}
