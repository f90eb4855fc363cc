// Vectors of as many floats as a register of the processor holds, and Mish on them. For GCC and Clang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), may_alias));
typedef Vector AnyVector __attribute__((aligned(4)));

// Two neighbouring numbers in bfloat16, which one instruction multiplies and adds.
struct Pair {
    uint16_t first, second;
};

static inline Vector load(const float *from) { return *reinterpret_cast<const Vector *>(from); }
static inline void store(float *to, Vector x) { *reinterpret_cast<Vector *>(to) = x; }
static inline Vector all(float x) { return Vector{} + x; }

// Where fewer than a vector count: `count` numbers anywhere in memory, and the first `count` of a vector, with 0 in place of
// the others, whatever they are. None where it is negative, all of the vector where it is larger.
static inline int64_t inside(int64_t count) { return count < 0 ? 0 : count < LANES ? count : LANES; }
#if defined(__AVX512F__)
static inline __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1 << inside(count)) - 1); }
static inline Vector load_first(const float *from, int64_t count) { return (Vector)_mm512_maskz_loadu_ps(mask(count), from); }
static inline void store_first(float *to, Vector x, int64_t count) { _mm512_mask_storeu_ps(to, mask(count), (__m512)x); }
static inline Vector first(Vector x, int64_t count) { return (Vector)_mm512_maskz_mov_ps(mask(count), (__m512)x); }
#else
static inline Vector load_first(const float *from, int64_t count) {
    if (count >= LANES) return *reinterpret_cast<const AnyVector *>(from);
    Vector x{};
    std::memcpy(&x, from, 4 * inside(count));
    return x;
}
static inline void store_first(float *to, Vector x, int64_t count) {
    if (count >= LANES)
        *reinterpret_cast<AnyVector *>(to) = x;
    else
        std::memcpy(to, &x, 4 * inside(count));
}
static inline Vector first(Vector x, int64_t count) {
    for (int i = 0; i < LANES; ++i) x[i] = i < count ? x[i] : 0;
    return x;
}
#endif

// min and max are b where a or b is a NaN. (Of `a < b ? a : b` GCC makes a comparison and a blend.)
#if defined(__AVX512F__)
static inline Vector min(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
static inline Vector max(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
static inline float sum(Vector x) { return _mm512_reduce_add_ps((__m512)x); }
static inline Vector square_root(Vector x) { return (Vector)_mm512_sqrt_ps((__m512)x); }
static inline Vector reciprocal(Vector x) {  // to float32 rounding: an estimate of 14 bits and a step of Newton's method
    const Vector y = (Vector)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);
}
#else
#if defined(__AVX__)
static inline Vector min(Vector a, Vector b) { return (Vector)_mm256_min_ps((__m256)a, (__m256)b); }
static inline Vector max(Vector a, Vector b) { return (Vector)_mm256_max_ps((__m256)a, (__m256)b); }
#else
static inline Vector min(Vector a, Vector b) { return a < b ? a : b; }
static inline Vector max(Vector a, Vector b) { return a > b ? a : b; }
#endif
static inline float sum(Vector x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}
static inline Vector square_root(Vector x) {
    for (int i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
    return x;
}
static inline Vector reciprocal(Vector x) { return 1.0f / x; }
#endif

// e^x to float32 rounding for -87 <= x <= 20; a NaN stays one. 2^k times a polynomial on |r| <= log(2) / 2,
// whose own error is 1e-8: (e^r - 1 - r) / r^2 at Chebyshev's nodes.
static inline Vector exponential(Vector x) {
    const Vector shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the low bits are k, rounded
    const Vector k = shifted - 12582912.0f;
#if defined(__FMA__) || defined(__aarch64__)
    const Vector r = x - k * 0.69314718056f;
#else
    const Vector r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
#endif
    Vector p = 1.3926250830e-3f * r + 8.3632328837e-3f;
    p = p * r + 4.1666554213e-2f;
    p = p * r + 1.6666576666e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    return (Vector)((Integers)p + ((Integers)shifted << 23));
}

static inline Vector from_below(Vector x) { return max(all(-87.0f), x); }  // where Mish is 0 in float32

// Mish, x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^2 + 2 e; beyond x = 20 it is x in float32. The last term is 0, or
// the NaN that PyTorch has at minus infinity.
static inline Vector mish(Vector x) {
    const Vector above = from_below(x), e = exponential(min(all(20.0f), above)), n = e * e + 2.0f * e;
    return above * (n * reciprocal(n + 2.0f)) + 0.0f * min(all(0.0f), x);
}

// Mish, and its slope t + 4 x e (1 + e) r^2 with r = 1 / (n + 2), t = n r. PyTorch's slope is NaN at both infinities.
static inline Vector mish(Vector x, Vector &slope) {
    const Vector above = from_below(x), c = min(all(20.0f), above), e = exponential(c), n = e * e + 2.0f * e;
    const Vector r = reciprocal(n + 2.0f), t = n * r;
    slope = t + (4.0f * c) * (e * r) * ((e + 1.0f) * r) + 0.0f * x;
    return above * t + 0.0f * min(all(0.0f), x);
}

#if defined(__AVX512BF16__)
static inline void store(Pair *to, Vector x) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &rounded, sizeof rounded);
}
#endif
