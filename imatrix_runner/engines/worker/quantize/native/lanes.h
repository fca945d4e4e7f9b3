// Vectors: super-blocks are searched in parallel, one in each lane.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// As many lanes as the machine's vectors have: GCC splits longer vectors into scalars.
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

static inline floats splat(float value) { return value - (floats){}; }
static inline ints splat_int(int value) { return value - (ints){}; }
static inline ints select_int(ints mask, ints yes, ints no) { return (mask & yes) | (~mask & no); }
static inline floats select_float(ints mask, floats yes, floats no) { return (floats)select_int(mask, (ints)yes, (ints)no); }
static inline floats to_float(ints value) { return __builtin_convertvector(value, floats); }
static inline floats absolute(floats value) { return (floats)((ints)value & 0x7fffffff); }

static inline ints clamp(ints value, int low, int high) {
    value = select_int(value < high, value, splat_int(high));
    return select_int(value > low, value, splat_int(low));
}

static inline int any(ints mask) {
    int found = 0;
    for (int k = 0; k < LANES; ++k) found |= mask[k];
    return found;
}

static inline floats square_root(floats value) {
    floats result;
    for (int k = 0; k < LANES; ++k) result[k] = sqrtf(value[k]);
    return result;
}

// Rounds to nearest even, for absolute values below 2^22; the same operations as in ggml.
static inline ints round_even(floats value) {
    return ((ints)(value + 12582912.f) & 0x007fffff) - 0x00400000;
}

// Converts to half precision (bits), rounded to nearest even, and back; with integers, because not every compiler has _Float16.
static inline floats halved(floats value, uint16_t *bits) {
    const ints size = (ints)value & 0x7fffffff, sign = (ints)value & ~0x7fffffff;
    const ints normal = (size - ((112 << 23) - 0xfff) + ((size >> 13) & 1)) >> 13;
    const ints small = (ints)((floats)size + 0.5f) - (ints)splat(0.5f);  // the sum keeps multiples of 2^-24
    ints stored = select_int(size < 0x38800000, small, normal);
    stored = select_int(size > 0x477fefff, select_int(size > 0x7f800000, splat_int(0x7e00), splat_int(0x7c00)), stored);
    const ints both = stored | ((sign >> 16) & 0x8000);
    for (int k = 0; k < LANES; ++k) bits[k] = (uint16_t)both[k];
    const floats result = (floats)(stored << 13) * 0x1p112f;
    return (floats)(select_int(stored > 0x7bff, stored << 13 | 0x7f800000, (ints)result) | sign);
}

static inline uint16_t half(float value) {
    uint16_t bits[LANES];
    halved(splat(value), bits);
    return bits[0];
}

// The numbers and weights of LANES super-blocks.
typedef struct { floats x[SUPER], w[SUPER]; } Group;

// Gathers n numbers per lane from data that repeats every `period`: consecutive blocks from the first on, beyond the end the last.
static inline void gather(const int n, floats *to, const float *from, int64_t period, int64_t first, int64_t count) {
    for (int k = 0; k < LANES; ++k) {
        const float *block = from + (first + (k < count ? k : count - 1)) * n % period;
        for (int i = 0; i < n; ++i) to[i][k] = block[i];
    }
}
