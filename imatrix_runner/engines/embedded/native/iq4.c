// IQ4_XS and IQ4_NL, several super-blocks or blocks side by side: one in each lane of a vector, as in kquants.c.

#include "fits.h"

enum { BLOCK = 32, STEPS = 7 };

// What the sixteen indices stand for.
static const int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The midway points of two neighbours are floats, and near them ggml's differences to both are exact: where it takes the nearer of
// two by difference, the upper one if neither is, a comparison with the midway point does the same.
static inline float midway(int i) { return 0.5f * (float)(VALUES[i] + VALUES[i + 1]); }

static inline ints nearest_index(floats x) {
    ints index = whole(0);
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i) index -= ~(x < midway(i));  // not >=: what is no number gets the last, as in ggml
    return index;
}

static inline floats nearest_value(floats x) {
    ints value = whole(VALUES[0]);
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i) value += ~(x < midway(i)) & (VALUES[i + 1] - VALUES[i]);
    return real(value);
}

// 32 numbers per lane as scale * value: the best of the scales that take the greatest number to about the first value.
static inline floats fit_values(const floats *x, const floats *w) {
    const floats max = extreme(BLOCK, x);
    floats scale = all(0), best = all(0);
    for (int step = -STEPS - 1; step <= STEPS; ++step) {
        // The first is taken as it is; the others have to be better.
        const int first = step < -STEPS;
        const floats inverse = first ? 1 / (-max / (float)VALUES[0]) : (float)(step + VALUES[0]) / max;
        floats sum_qx = all(0), sum_q2 = all(0);
        for (int i = 0; i < BLOCK; ++i) {
            const floats value = nearest_value(inverse * x[i]), weighted = w[i] * value;
            sum_qx += weighted * x[i];
            sum_q2 += weighted * value;
        }
        const ints better = (sum_q2 > 0) & (first ? whole(-1) : sum_qx * sum_qx > best * sum_q2);
        scale = pick(better, sum_qx / sum_q2, scale);
        best = pick(better, scale * sum_qx, best);
    }
    return pick(magnitude(max) < ALL_ZERO, all(0), scale);
}

// Every number's weight in n of them: the imatrix's times its own size, as seen from their spread; without one its square.
static inline void weigh(const int n, const int weighted, const floats *x, floats *w) {
    floats squares = all(0);
    for (int i = 0; i < n; ++i) squares += x[i] * x[i];
    const floats spread = squares * (2.f / (float)n);
    for (int i = 0; i < n; ++i) w[i] = weighted ? w[i] * root(spread + x[i] * x[i]) : x[i] * x[i];
}

static inline floats inverted(floats value) { return pick(value != 0, 1 / value, all(0)); }

typedef struct { uint16_t d, scales_h; uint8_t scales_l[SUPER / 64], qs[SUPER / 2]; } BlockXS;
typedef struct { uint16_t d; uint8_t qs[BLOCK / 2]; } BlockNL;

// Thirty-two indices of one lane, two in a byte.
static inline void pack(uint8_t *qs, const ints *l, int k) {
    for (int i = 0; i < 16; ++i) qs[i] = l[i][k] | l[i + 16][k] << 4;
}

static inline void quantize_xs(BlockXS *out, const floats *x, const floats *w, int64_t count) {
    enum { N = SUPER / BLOCK };
    floats scales[N];
    ints stored[N], l[SUPER];
    uint16_t d[LANES];
    for (int j = 0; j < N; ++j) scales[j] = fit_values(x + BLOCK * j, w + BLOCK * j);
    const floats scale = -extreme(N, scales) / 32, inverse = inverted(scale);
    halved(scale, d);
    for (int j = 0; j < N; ++j) {
        const ints near = clamp(nearest(inverse * scales[j]), -32, 31);
        const floats own = inverted(scale * real(near));
        for (int i = BLOCK * j; i < BLOCK * (j + 1); ++i) l[i] = nearest_index(own * x[i]);
        stored[j] = near + 32;
    }
    for (int k = 0; k < count; ++k) {
        BlockXS *block = out + k;
        memset(block, 0, sizeof *block);
        block->d = d[k];
        for (int j = 0; j < N; ++j) {
            const int value = stored[j][k];
            block->scales_l[j / 2] |= (value & 15) << 4 * (j % 2);
            block->scales_h |= (value >> 4) << 2 * j;
            pack(block->qs + 16 * j, l + BLOCK * j, k);
        }
    }
}

static inline void quantize_nl(BlockNL *out, const floats *x, const floats *w, int64_t count) {
    const floats scale = fit_values(x, w), inverse = inverted(scale);
    ints l[BLOCK];
    uint16_t d[LANES];
    for (int i = 0; i < BLOCK; ++i) l[i] = nearest_index(inverse * x[i]);
    halved(scale, d);
    for (int k = 0; k < count; ++k) {
        out[k].d = d[k];
        pack(out[k].qs, l, k);
    }
}

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights), as in kquants.c.
#define KERNEL(name, Block, size, quantize, weighted)                                                                 \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t numbers = n_rows * n_per_row, blocks = numbers / size;                                          \
        floats x[size], w[size];                                                                                      \
        for (int64_t first = 0; first < blocks; first += LANES) {                                                     \
            const int64_t count = blocks - first < LANES ? blocks - first : LANES;                                    \
            take(size, x, rows, numbers, first, count);                                                               \
            if (weighted) take(size, w, weights, n_per_row, first, count);                                            \
            weigh(size, weighted, x, w);                                                                              \
            quantize((Block *)out + first, x, w, count);                                                              \
        }                                                                                                             \
        return blocks * sizeof(Block);                                                                                \
    }

KERNEL(iq4_xs, BlockXS, SUPER, quantize_xs, 1)
KERNEL(iq4_xs_unweighted, BlockXS, SUPER, quantize_xs, 0)
KERNEL(iq4_nl, BlockNL, BLOCK, quantize_nl, 1)
KERNEL(iq4_nl_unweighted, BlockNL, BLOCK, quantize_nl, 0)
