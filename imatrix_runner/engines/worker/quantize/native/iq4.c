// IQ4_XS and IQ4_NL: several super-blocks or blocks in parallel, one in each lane of a vector, as in kquants.c.

#include "blocks.h"
#include "fits.h"

enum { BLOCK = 32, STEPS = 7 };

// The midpoint of two neighbours is a float, and near it ggml's differences to both are exact: ggml takes the nearer one, the upper
// one of equals, and a comparison with the midpoint does the same.
static inline float midway(int i) { return 0.5f * (float)(IQ4_VALUES[i] + IQ4_VALUES[i + 1]); }

static inline ints nearest_index(floats x) {
    ints index = splat_int(0);
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i) index -= ~(x < midway(i));  // not >=: NaN gets the last index, as in ggml
    return index;
}

static inline floats nearest_value(floats x) {
    ints value = splat_int(IQ4_VALUES[0]);
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i) value += ~(x < midway(i)) & (IQ4_VALUES[i + 1] - IQ4_VALUES[i]);
    return to_float(value);
}

// Fits 32 numbers per lane as scale * value: the best of the scales that map the extreme number to about the first value.
static inline floats fit_values(const floats *x, const floats *w) {
    const floats max = extreme(BLOCK, x);
    floats scale = splat(0), best = splat(0);
    for (int step = -STEPS - 1; step <= STEPS; ++step) {
        // The first candidate is always taken; the others must be better.
        const int first = step < -STEPS;
        const floats inverse = first ? 1 / (-max / (float)IQ4_VALUES[0]) : (float)(step + IQ4_VALUES[0]) / max;
        floats sum_qx = splat(0), sum_q2 = splat(0);
        for (int i = 0; i < BLOCK; ++i) {
            const floats value = nearest_value(inverse * x[i]), weighted = w[i] * value;
            sum_qx += weighted * x[i];
            sum_q2 += weighted * value;
        }
        const ints better = (sum_q2 > 0) & (first ? splat_int(-1) : sum_qx * sum_qx > best * sum_q2);
        scale = select_float(better, sum_qx / sum_q2, scale);
        best = select_float(better, scale * sum_qx, best);
    }
    return select_float(absolute(max) < ALL_ZERO, splat(0), scale);
}

// The weights of n numbers: imatrix weight times sqrt(spread + x^2); without an imatrix the square.
static inline void weigh(const int n, const int weighted, const floats *x, floats *w) {
    floats squares = splat(0);
    for (int i = 0; i < n; ++i) squares += x[i] * x[i];
    const floats spread = squares * (2.f / (float)n);
    for (int i = 0; i < n; ++i) w[i] = weighted ? w[i] * square_root(spread + x[i] * x[i]) : x[i] * x[i];
}

static inline floats inverted(floats value) { return select_float(value != 0, 1 / value, splat(0)); }

// Packs 32 indices of one lane, two in a byte.
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
        const ints near = clamp(round_even(inverse * scales[j]), -32, 31);
        const floats own = inverted(scale * to_float(near));
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
            gather(size, x, rows, numbers, first, count);                                                             \
            if (weighted) gather(size, w, weights, n_per_row, first, count);                                          \
            weigh(size, weighted, x, w);                                                                              \
            quantize((Block *)out + first, x, w, count);                                                              \
        }                                                                                                             \
        return blocks * sizeof(Block);                                                                                \
    }

KERNEL(iq4_xs, BlockXS, SUPER, quantize_xs, 1)
KERNEL(iq4_xs_unweighted, BlockXS, SUPER, quantize_xs, 0)
KERNEL(iq4_nl, BlockNL, BLOCK, quantize_nl, 1)
KERNEL(iq4_nl_unweighted, BlockNL, BLOCK, quantize_nl, 0)
