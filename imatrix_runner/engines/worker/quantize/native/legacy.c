// Q4_0, Q4_1, Q5_0 and Q5_1 with weights: several blocks in parallel, one in each lane of a vector, as in kquants.c.

#include "blocks.h"
#include "fits.h"

enum { BLOCK = 32, HALF = BLOCK / 2 };

typedef struct {
    ints l[BLOCK];
    uint16_t d[LANES], m[LANES];
} Fit;

static inline void search_symmetric(Fit *fit, const int nmax, const floats *x, const floats *w) {
    halved(fit_symmetric(BLOCK, nmax, x, w, fit->l), fit->d);
}

static inline void search_affine(Fit *fit, const int nmax, const floats *x, const floats *w) {
    floats low;
    halved(fit_affine(BLOCK, nmax, THOROUGH, x, w, fit->l, &low), fit->d);
    halved(-low, fit->m);
}

static inline void pack(uint8_t *qs, const Fit *fit, int k) {
    for (int i = 0; i < HALF; ++i) qs[i] = (fit->l[i][k] & 15) | (fit->l[i + HALF][k] & 15) << 4;
}

static inline void pack_fifth_bits(uint8_t *qh, const Fit *fit, int k) {
    memset(qh, 0, BLOCK / 8);
    for (int i = 0; i < BLOCK; ++i) qh[i / 8] |= (fit->l[i][k] >> 4) << i % 8;
}

static inline void write_q4_0(BlockQ4_0 *block, const Fit *fit, int k) {
    block->d = fit->d[k];
    pack(block->qs, fit, k);
}

static inline void write_q4_1(BlockQ4_1 *block, const Fit *fit, int k) {
    block->d = fit->d[k];
    block->m = fit->m[k];
    pack(block->qs, fit, k);
}

static inline void write_q5_0(BlockQ5_0 *block, const Fit *fit, int k) {
    block->d = fit->d[k];
    pack_fifth_bits(block->qh, fit, k);
    pack(block->qs, fit, k);
}

static inline void write_q5_1(BlockQ5_1 *block, const Fit *fit, int k) {
    block->d = fit->d[k];
    block->m = fit->m[k];
    pack_fifth_bits(block->qh, fit, k);
    pack(block->qs, fit, k);
}

// The mean squares of LANES rows; each row is summed in order.
static inline void mean_squares(float *means, const float *rows, int64_t n_rows, int64_t n_per_row) {
    for (int k = 0; k < LANES; ++k) means[k] = 0;
    for (int64_t i = 0; i < n_per_row; ++i)
        for (int k = 0; k < LANES; ++k) {
            const float x = rows[(k < n_rows ? k : 0) * n_per_row + i];
            means[k] += x * x;
        }
    for (int k = 0; k < LANES; ++k) means[k] /= (float)n_per_row;
}

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights), as in kquants.c. LANES rows at a time: first
// their spreads with one row per lane, then their blocks with one block per lane.
#define KERNEL(name, Block, search, nmax)                                                                             \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t per_row = n_per_row / BLOCK;                                                                    \
        Block *block = out;                                                                                           \
        for (int64_t row = 0; row < n_rows; row += LANES) {                                                           \
            const int64_t taken = n_rows - row < LANES ? n_rows - row : LANES, blocks = taken * per_row;              \
            const float *numbers = rows + row * n_per_row;                                                            \
            float means[LANES];                                                                                       \
            mean_squares(means, numbers, taken, n_per_row);                                                           \
            for (int64_t first = 0; first < blocks; first += LANES) {                                                 \
                const int64_t count = blocks - first < LANES ? blocks - first : LANES;                                \
                floats x[BLOCK], w[BLOCK], spread;                                                                    \
                Fit fit;                                                                                              \
                gather(BLOCK, x, numbers, taken * n_per_row, first, count);                                           \
                gather(BLOCK, w, weights, n_per_row, first, count);                                                   \
                for (int k = 0; k < LANES; ++k) spread[k] = means[(first + (k < count ? k : 0)) / per_row];           \
                for (int i = 0; i < BLOCK; ++i) w[i] *= square_root(spread + x[i] * x[i]);                            \
                search(&fit, nmax, x, w);                                                                             \
                for (int k = 0; k < count; ++k) write_##name(block++, &fit, k);                                       \
            }                                                                                                         \
        }                                                                                                             \
        return n_rows * per_row * sizeof(Block);                                                                      \
    }

KERNEL(q4_0, BlockQ4_0, search_symmetric, 8)
KERNEL(q4_1, BlockQ4_1, search_affine, 15)
KERNEL(q5_0, BlockQ5_0, search_symmetric, 16)
KERNEL(q5_1, BlockQ5_1, search_affine, 31)
