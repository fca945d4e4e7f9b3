// What both refined searches need.
#pragma once

#include "blocks.h"
#include "fits.h"

// A search is compiled for every type with that type's constants, which GCC does by itself for small functions only.
#define INLINED static inline __attribute__((always_inline))

static inline floats lesser(floats a, floats b) {
    floats result;
    for (int k = 0; k < LANES; ++k) result[k] = a[k] < b[k] ? a[k] : b[k];
    return result;
}

static inline floats greater(floats a, floats b) {
    floats result;
    for (int k = 0; k < LANES; ++k) result[k] = a[k] > b[k] ? a[k] : b[k];
    return result;
}

// The whole number nearest to x in [low, high]; NaN gives low.
static inline floats whole_between(floats x, const int low, const int high) {
    x = lesser(greater(x, splat((float)low)), splat((float)high));
    return (x + 12582912.f) - 12582912.f;  // rounds to nearest even
}

// Rounds to half precision.
static inline floats to_half(floats value) {
    uint16_t bits[LANES];
    return halved(value, bits);
}

// Codes that are nearest to numbers x, with factors fitted to them, are too small altogether: by what is left as error,
// sum w (x - q)^2 = sum w x (x - q). In the products of a model that part is not noise: it has one direction, that of x. So the last
// factors minimise  sum w (x - q)^2 + STRETCH * (sum w x (x - q))^2 / sum w x^2.  What that adds to the first sum is small; what it is
// good for is measured in docs/kernels.md.
enum { STRETCH = 3 };

// Lanes where the new error of a block is lower than the old one without doubt. Each is a sum of at most 256 terms that are rounded
// four times, 16 or 32 of them at a time, then those sums: at most 44 roundings of 2^-24, less than 3e-6 of the sum together. Below
// the smallest error that is taken, terms could be subnormal numbers, which have fewer bits.
static inline ints certain(floats fresh, floats old) { return (fresh < old * (1 - 1e-5f)) & (old > 1e-25f) & (old < 1e30f); }

// Lanes whose numbers are not so large that a search could overflow (MOST in ggml_rows.py); others keep ggml's block.
static inline ints searchable(const int n, const floats *x) {
    ints all = splat_int(-1);
    for (int i = 0; i < n; ++i) all &= absolute(x[i]) <= 1e8f;
    return all;
}
