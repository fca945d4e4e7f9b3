// The factor of a covariance for error feedback: H + damping * I = U D U^T, U unit upper triangular, D diagonal.
//
// U is found from the last column to the first, in tiles of 64 columns. A tile's sums over all later columns are made in double
// precision, in the order of the columns, and rounded to single precision once. Every number is computed by one call in one order,
// so it does not depend on how calls are spread over threads.

#include "lanes.h"
#include "panels.h"

enum { TILE = 64, DOUBLES = LANES / 2 };

typedef double doubles __attribute__((vector_size(8 * DOUBLES)));

static inline doubles splat_double(double value) { return value - (doubles){}; }

// The product of `rows` rows of U (first on) with D and the transposed rows of the tile that begins at column `tile`, over the
// columns after that tile, subtracted from s (rows x TILE).
static void subtract_later(doubles *s, const float *panels, const float *diagonal, int64_t n, int64_t first, int64_t rows,
                           int64_t tile) {
    enum { WIDE = TILE / DOUBLES };
    static _Thread_local double left[128 * PANEL];
    static _Thread_local doubles right[PANEL * WIDE];
    const int64_t wide = n - tile < TILE ? n - tile : TILE;
    for (int64_t k = tile + TILE; k < n; k += PANEL) {
        const float *u = panel_at(panels, k / PANEL);
        for (int64_t i = 0; i < rows * PANEL; ++i) left[i] = u[first * PANEL + i];
        double *to = (double *)right;
        for (int64_t j = 0; j < wide; ++j)
            for (int i = 0; i < PANEL; ++i) to[i * TILE + j] = (double)u[(tile + j) * PANEL + i] * (double)diagonal[k + i];
        for (int64_t i = 0; i < rows; i += 4)
            for (int j = 0; j < WIDE; j += 2) {
                const double *a = left + i * PANEL, *b = a + PANEL, *c = b + PANEL, *d = c + PANEL;
                doubles *at = s + i * WIDE + j;
                doubles a0 = at[0], a1 = at[1], b0 = at[WIDE], b1 = at[WIDE + 1];
                doubles c0 = at[2 * WIDE], c1 = at[2 * WIDE + 1], d0 = at[3 * WIDE], d1 = at[3 * WIDE + 1];
                for (int m = 0; m < PANEL; ++m) {
                    const doubles r0 = right[m * WIDE + j], r1 = right[m * WIDE + j + 1];
                    a0 -= a[m] * r0, a1 -= a[m] * r1;
                    b0 -= b[m] * r0, b1 -= b[m] * r1;
                    c0 -= c[m] * r0, c1 -= c[m] * r1;
                    d0 -= d[m] * r0, d1 -= d[m] * r1;
                }
                at[0] = a0, at[1] = a1, at[WIDE] = b0, at[WIDE + 1] = b1;
                at[2 * WIDE] = c0, at[2 * WIDE + 1] = c1, at[3 * WIDE] = d0, at[3 * WIDE + 1] = d1;
            }
    }
}

// Where U[row][column] lies; the column's panel must reach down to the row.
static inline float *at(float *panels, int64_t row, int64_t column) {
    return panel_of(panels, column / PANEL) + row * PANEL + column % PANEL;
}

// Computes the tile on the diagonal that begins at column `tile`: D there, and U between its own columns. All later columns must be
// complete. A column whose D comes out below `damping` gets that: less is rounding, because D >= the least eigenvalue >= damping.
// Returns the first column, from the right, whose D would be far below zero or NaN, which no covariance has; else -1.
int64_t imatrix_runner_factor_diagonal(const float *covariance, int64_t n, float *panels, float *diagonal, int64_t tile,
                                       double damping, double tolerance) {
    doubles sums[TILE * TILE / DOUBLES];
    double *s = (double *)sums;
    const int64_t wide = n - tile < TILE ? n - tile : TILE;
    memset(sums, 0, sizeof sums);
    for (int64_t r = 0; r < wide; ++r)
        for (int64_t c = r; c < wide; ++c) s[r * TILE + c] = covariance[(tile + r) * n + tile + c] + (r == c ? damping : 0);
    subtract_later(sums, panels, diagonal, n, tile, wide, tile);
    for (int64_t c = wide - 1; c >= 0; --c) {
        const double found = s[c * TILE + c], own = covariance[(tile + c) * n + tile + c];
        if (!(found >= damping - tolerance * own)) return tile + c;
        const float kept = (float)(found > damping ? found : damping);
        if (!(kept <= 3.4028234e38f)) return tile + c;
        diagonal[tile + c] = kept;
        double u[TILE];
        for (int64_t r = 0; r < c; ++r) {
            const float rounded = (float)(s[r * TILE + c] / (double)kept);
            *at(panels, tile + r, tile + c) = rounded;
            u[r] = rounded;
        }
        *at(panels, tile + c, tile + c) = 1;
        for (int64_t r = c + 1; r < wide && (tile + r) / PANEL == (tile + c) / PANEL; ++r) *at(panels, tile + r, tile + c) = 0;
        for (int64_t r = 0; r < c; ++r) {
            const double scaled = u[r] * (double)kept;
            for (int64_t k = r; k < c; ++k) s[r * TILE + k] -= scaled * u[k];
        }
    }
    return -1;
}

// Computes U in the rows from `first` on, at most 128 and a multiple of 4, all above the tile that begins at column `tile`, between
// them and that tile's columns. Its tile on the diagonal and all later columns must be complete.
void imatrix_runner_factor_rows(const float *covariance, int64_t n, float *panels, const float *diagonal, int64_t tile,
                                int64_t first, int64_t rows) {
    doubles sums[128 * TILE / DOUBLES];
    double *s = (double *)sums;
    const int64_t wide = n - tile < TILE ? n - tile : TILE;
    memset(sums, 0, sizeof sums);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < wide; ++c) s[r * TILE + c] = covariance[(first + r) * n + tile + c];
    subtract_later(sums, panels, diagonal, n, first, rows, tile);
    // Column c of the tile on the diagonal, times D: what a solved column takes from those before it.
    double scaled[TILE * TILE];
    for (int64_t c = 0; c < wide; ++c)
        for (int64_t r = 0; r < c; ++r) scaled[c * TILE + r] = (double)*at(panels, tile + r, tile + c) * (double)diagonal[tile + c];
    for (int64_t r = 0; r < rows; ++r) {
        double *row = s + r * TILE;
        for (int64_t c = wide - 1; c >= 0; --c) {
            const float rounded = (float)(row[c] / (double)diagonal[tile + c]);
            *at(panels, first + r, tile + c) = rounded;
            for (int64_t k = 0; k < c; ++k) row[k] -= (double)rounded * scaled[c * TILE + k];
        }
    }
}

// Copies the panels of U into a full matrix of n x n, for tests and for whatever needs U as a matrix.
void imatrix_runner_factor_unpack(const float *panels, int64_t n, float *matrix) {
    memset(matrix, 0, sizeof(float) * n * n);
    for (int64_t p = 0; p < n / PANEL; ++p)
        for (int64_t r = 0; r < (p + 1) * PANEL; ++r)
            memcpy(matrix + r * n + p * PANEL, panel_at(panels, p) + r * PANEL, sizeof(float) * PANEL);
}
