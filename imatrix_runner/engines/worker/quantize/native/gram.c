// Adds X^T X to sums: X is a block of rows of activations, n numbers each, scaled so that each row's mean square is 1; the sums are
// the upper triangle of an n x n matrix in float64, row by row (row i holds columns i .. n - 1).
//
// Why rows are scaled: in most models a few tokens (the first one, separators) have activations hundreds of times as large as
// those of others. Left as they are, they alone decide the sums, and the model hardly cares: what a block adds to the residual
// stream is divided by the stream's own magnitude before the next block reads it.
//
// Products are added in float32 over at most RUN rows, from the first row to the last, and then to the float64 sum. So each
// element has one order of operations, whatever the vectors' width and the number of threads. The float32 sum of RUN terms is off
// by at most RUN * 2^-24 = 7.7e-6 of the sum of the terms' absolute values (Higham, Accuracy and Stability of Numerical
// Algorithms, 3.1); float64 adds less than 2^-52 per RUN rows.
#include "lanes.h"

enum {
    RUN = 128,
    PANEL = 2 * LANES,  // columns that are read together
    ROWS = 4,           // rows of sums in registers, PANEL columns each
    SIDE = 128,         // rows and columns of a tile, the unit of a thread's work: its two operands stay in the L2 cache
    PER_SIDE = SIDE / PANEL
};

typedef floats loose __attribute__((aligned(4)));
typedef float halves __attribute__((vector_size(2 * LANES)));
typedef double doubles __attribute__((vector_size(4 * LANES)));
typedef doubles loose_doubles __attribute__((aligned(8)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t count_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Number of floats that n_rows rows of n columns take when they are packed.
int64_t imatrix_runner_gram_packed(int64_t n_rows, int64_t n) { return count_of(n, PANEL) * PANEL * n_rows; }

// Writes the factor of each row that makes its mean square 1; 0 for a row of zeros, or of numbers too small to be scaled. Squares
// of float32 are exact in float64, and are added in one order. `at`: where each row begins, in bytes from `base`. Does every
// `step`-th row from `first` on.
void imatrix_runner_gram_scales(const char *base, const int64_t *at, int64_t n_rows, int64_t n, float *scales, int64_t first,
                                int64_t step) {
    enum { SUMS = 8 };
    for (int64_t row = first; row < n_rows; row += step) {
        const float *values = (const float *)(base + at[row]);
        double sums[SUMS] = {0};
        int64_t i = 0;
        for (; i + SUMS <= n; i += SUMS)
            for (int j = 0; j < SUMS; ++j) sums[j] += (double)values[i + j] * values[i + j];
        for (; i < n; ++i) sums[0] += (double)values[i] * values[i];
        const double total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        scales[row] = total < 1e-60 * n ? 0.0f : (float)(1.0 / sqrt(total / n));
    }
}

// Packs scaled rows into panels of PANEL columns: packed[panel][row][column], filled up with zeros. `at`: where each row begins, in
// bytes from `base`. Does every `step`-th panel from `first` on.
void imatrix_runner_gram_pack(const char *base, const int64_t *at, const float *scales, int64_t n_rows, int64_t n, float *packed,
                              int64_t first, int64_t step) {
    for (int64_t panel = first; panel < count_of(n, PANEL); panel += step) {
        const int64_t size = least(PANEL, n - panel * PANEL);
        for (int64_t row = 0; row < n_rows; ++row) {
            float *to = packed + (panel * n_rows + row) * PANEL;
            const float *from = (const float *)(base + at[row]) + panel * PANEL;
            for (int64_t i = 0; i < size; ++i) to[i] = from[i] * scales[row];
            for (int64_t i = size; i < PANEL; ++i) to[i] = 0;
        }
    }
}

static inline void add(double *to, floats value) {
    halves parts[2];
    memcpy(parts, &value, sizeof parts);
    for (int i = 0; i < 2; ++i) {
        loose_doubles *sum = (loose_doubles *)(to + i * LANES / 2);
        *sum += __builtin_convertvector(parts[i], doubles);
    }
}

// Adds the products of `n_rows` rows: ROWS columns from `a` on with the PANEL columns at `b`. `sums[r]`: where row r has the
// panel's first column; only columns from `skip + r` on and before `end` exist there.
static inline void products(const float *a, const float *b, int64_t n_rows, double *const sums[ROWS], int skip, int end) {
    floats c00 = {}, c01 = {}, c10 = {}, c11 = {}, c20 = {}, c21 = {}, c30 = {}, c31 = {};
    for (int64_t k = 0; k < n_rows; ++k, a += PANEL, b += PANEL) {
        const floats b0 = *(const loose *)b, b1 = *(const loose *)(b + LANES);
        const floats a0 = splat(a[0]), a1 = splat(a[1]), a2 = splat(a[2]), a3 = splat(a[3]);
        c00 += a0 * b0, c01 += a0 * b1;
        c10 += a1 * b0, c11 += a1 * b1;
        c20 += a2 * b0, c21 += a2 * b1;
        c30 += a3 * b0, c31 += a3 * b1;
    }
    const floats c[ROWS][2] = {{c00, c01}, {c10, c11}, {c20, c21}, {c30, c31}};
    for (int r = 0; r < ROWS; ++r) {
        if (sums[r] == NULL) continue;
        if (skip + r <= 0 && end == PANEL) {
            add(sums[r], c[r][0]);
            add(sums[r] + LANES, c[r][1]);
        } else {
            float values[PANEL];
            memcpy(values, c[r], sizeof values);
            for (int j = skip + r > 0 ? skip + r : 0; j < end; ++j) sums[r][j] += values[j];
        }
    }
}

// Adds the products of panels p <= q to the sums of an n x n matrix.
static void pair(const float *packed, int64_t n_rows, int64_t n, double *sums, int64_t p, int64_t q) {
    const float *a = packed + p * n_rows * PANEL, *b = packed + q * n_rows * PANEL;
    const int end = (int)least(PANEL, n - q * PANEL);
    for (int64_t run = 0; run < n_rows; run += RUN) {
        const int64_t size = least(RUN, n_rows - run);
        for (int first = 0; first < PANEL; first += ROWS) {
            double *rows[ROWS];
            for (int r = 0; r < ROWS; ++r) {
                const int64_t i = p * PANEL + first + r;  // row i begins at its diagonal, after i rows of n, n - 1, … numbers
                rows[r] = i < n ? sums + i * n - i * (i - 1) / 2 - i + q * PANEL : NULL;
            }
            products(a + run * PANEL + first, b + run * PANEL, size, rows, p == q ? first : -PANEL, end);
        }
    }
}

// Adds the packed rows' products to `sums`. Does every `step`-th tile from `first` on.
void imatrix_runner_gram_add(const float *packed, int64_t n_rows, int64_t n, double *sums, int64_t first, int64_t step) {
    const int64_t n_panels = count_of(n, PANEL), n_tiles = count_of(n_panels, PER_SIDE);
    int64_t number = 0;
    for (int64_t right = 0; right < n_tiles; ++right)
        for (int64_t left = 0; left <= right; ++left)
            if (number++ % step == first)
                for (int64_t q = right * PER_SIDE; q < least(n_panels, (right + 1) * PER_SIDE); ++q)
                    for (int64_t p = left * PER_SIDE; p < least(q + 1, (left + 1) * PER_SIDE); ++p)
                        pair(packed, n_rows, n, sums, p, q);
}
