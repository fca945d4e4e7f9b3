// Vectors: one lane for each of some super-blocks that are searched side by side.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// As many as the machine's own vectors hold: GCC takes longer ones apart into single numbers.
#if defined __AVX512F__
enum { LANES = 16 };
#elif defined __AVX2__
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { SUPER = 256 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static inline floats all(float value) { return value - (floats){}; }
static inline ints whole(int value) { return value - (ints){}; }
static inline ints choose(ints mask, ints yes, ints no) { return (mask & yes) | (~mask & no); }
static inline floats pick(ints mask, floats yes, floats no) { return (floats)choose(mask, (ints)yes, (ints)no); }
static inline floats real(ints value) { return __builtin_convertvector(value, floats); }
static inline floats magnitude(floats value) { return (floats)((ints)value & 0x7fffffff); }

static inline ints clamp(ints value, int low, int high) {
    value = choose(value < high, value, whole(high));
    return choose(value > low, value, whole(low));
}

static inline int any(ints mask) {
    int found = 0;
    for (int k = 0; k < LANES; ++k) found |= mask[k];
    return found;
}

static inline floats root(floats value) {
    floats result;
    for (int k = 0; k < LANES; ++k) result[k] = sqrtf(value[k]);
    return result;
}

// To the nearest whole number, halves to even, for magnitudes below 2^22; as ggml does it.
static inline ints nearest(floats value) {
    return ((ints)(value + 12582912.f) & 0x007fffff) - 0x00400000;
}

// Half precision and back, rounded to nearest even; in whole numbers, for not every compiler has _Float16.
static inline floats halved(floats value, uint16_t *bits) {
    const ints size = (ints)value & 0x7fffffff, sign = (ints)value & ~0x7fffffff;
    const ints normal = (size - ((112 << 23) - 0xfff) + ((size >> 13) & 1)) >> 13;
    const ints small = (ints)((floats)size + 0.5f) - (ints)all(0.5f);  // the sum keeps multiples of 2^-24
    ints stored = choose(size < 0x38800000, small, normal);
    stored = choose(size > 0x477fefff, choose(size > 0x7f800000, whole(0x7e00), whole(0x7c00)), stored);
    const ints both = stored | ((sign >> 16) & 0x8000);
    for (int k = 0; k < LANES; ++k) bits[k] = (uint16_t)both[k];
    const floats result = (floats)(stored << 13) * 0x1p112f;
    return (floats)(choose(stored > 0x7bff, stored << 13 | 0x7f800000, (ints)result) | sign);
}

static inline uint16_t half(float value) {
    uint16_t bits[LANES];
    halved(all(value), bits);
    return bits[0];
}

// The super-blocks of some rows, taken in groups of LANES whatever row they are of. Lanes beyond the end repeat the last block.
typedef struct {
    floats x[SUPER], w[SUPER];
    int64_t block[LANES];
} Group;

static inline void load(Group *group, const float *rows, const float *weights, int64_t n_per_row, int64_t first, int64_t count) {
    for (int k = 0; k < LANES; ++k) {
        const int64_t block = first + (k < count ? k : count - 1);
        const float *x = rows + block * SUPER, *w = weights + block * SUPER % n_per_row;
        group->block[k] = block;
        for (int i = 0; i < SUPER; ++i) group->x[i][k] = x[i];
        for (int i = 0; i < SUPER; ++i) group->w[i][k] = w[i];
    }
}

// n numbers per lane out of those that repeat every `period`: block after block from the first on, beyond the end the last again.
static inline void take(const int n, floats *to, const float *from, int64_t period, int64_t first, int64_t count) {
    for (int k = 0; k < LANES; ++k) {
        const float *block = from + (first + (k < count ? k : count - 1)) * n % period;
        for (int i = 0; i < n; ++i) to[i][k] = block[i];
    }
}
