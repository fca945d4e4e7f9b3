// Error feedback into stock blocks: rows in the lanes, column after column.
//
// With H + damping = U D U^T (factor.c) the error of a row is e H e^T = sum over columns i of D_i (t_i - q_i)^2, where q_i is the rounded
// number, e_i = w_i - q_i, and the target t_i = w_i + sum over k < i of e_k U_ki. So each column is rounded to what is nearest to its
// target. Scales come from ggml's search on a block's targets, and from trying their neighbours on the columns in question.
//
// Every row is computed in a lane of its own by the same operations in the same order, whatever rows are next to it.

#include <stdlib.h>

#include "blocks.h"
#include "grids.h"
#include "panels.h"

// Rows of one group: VECTORS vectors. All arrays over columns hold a number of each row per column.
enum { VECTORS = 4, GROUP = VECTORS * LANES };

typedef size_t (*Search)(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights);
typedef void (*Widen)(const void *blocks, float *numbers, int64_t count);

// A target may be so many times as great as the row's greatest number; beyond MOST ggml's search may overflow (ggml_rows.py).
static const float ASTRAY = 64, MOST = 1e8f;
static const float ROUNDER = 12582912.f;

// How often a sub-block's scale is fitted again to the targets that its levels led to, and how many rings of neighbours are tried.
enum { REFITS = 1, RINGS = 2 };

// Columns [from, to) of a panel, multiples of 4: t[j] += sum over `count` rows k of u[k][j] * e[k], in order, for the first `used` vectors.
static void add_errors(floats *t, const floats *e, const float *u, int64_t count, int from, int to, int used) {
    for (int v = 0; v < used; v += 2)
        for (int j = from; j < to; j += 4) {
            floats *at = t + j * VECTORS + v;
            floats a0 = at[0], a1 = at[1], b0 = at[VECTORS], b1 = at[VECTORS + 1];
            floats c0 = at[2 * VECTORS], c1 = at[2 * VECTORS + 1], d0 = at[3 * VECTORS], d1 = at[3 * VECTORS + 1];
            const float *row = u + j;
            const floats *error = e + v;
            for (int64_t k = 0; k < count; ++k, row += PANEL, error += VECTORS) {
                const floats e0 = error[0], e1 = error[1];
                a0 += row[0] * e0, a1 += row[0] * e1;
                b0 += row[1] * e0, b1 += row[1] * e1;
                c0 += row[2] * e0, c1 += row[2] * e1;
                d0 += row[3] * e0, d1 += row[3] * e1;
            }
            at[0] = a0, at[1] = a1, at[VECTORS] = b0, at[VECTORS + 1] = b1;
            at[2 * VECTORS] = c0, at[2 * VECTORS + 1] = c1, at[3 * VECTORS] = d0, at[3 * VECTORS + 1] = d1;
        }
}

// A sub-block's numbers that can be expressed: scale * level - low.
typedef struct { floats scale, low, inverse; } Grid;

static inline Grid grid_of(floats scale, floats low) {
    const floats inverse = 1 / scale;
    return (Grid){scale, low, select_float(absolute(inverse) <= 0x1p126f, inverse, splat(0))};
}

static inline floats nearest_value(floats x) {
    ints value = splat_int(IQ4_VALUES[0]);
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i)
        value += (x >= 0.5f * (float)(IQ4_VALUES[i] + IQ4_VALUES[i + 1])) & (IQ4_VALUES[i + 1] - IQ4_VALUES[i]);
    return to_float(value);
}

// The level nearest to a target.
static inline floats nearest_level(const int is_table, const float least, const float most, const Grid *grid, floats target) {
    floats level = (target + grid->low) * grid->inverse;
    if (is_table) return nearest_value(level);
    level = select_float(level > least, level, splat(least));
    level = select_float(level < most, level, splat(most));
    return (level + ROUNDER) - ROUNDER;
}

// What rounding a sub-block led to, for two vectors of rows.
typedef struct {
    floats levels[32][2], targets[32][2], errors[32][2], loss[2];
} Walk;

// Rounds the `count` columns of a sub-block. u: the panel's row of its first column, at that column; t: its targets so far, x its
// numbers, for two vectors; d: D of its columns.
static inline __attribute__((always_inline)) void walk_columns(const int is_table, Walk *walk, const Format *format, int count,
                                                               const floats *t, const floats *x, const float *u, const float *d,
                                                               const Grid *grid) {
    const float least = (float)format->least, most = (float)format->most;
    const Grid g0 = grid[0], g1 = grid[1];
    floats loss0 = splat(0), loss1 = splat(0);
    for (int j = 0; j < count; j += 4) {
        floats r[4][2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) r[i][0] = t[(j + i) * VECTORS], r[i][1] = t[(j + i) * VECTORS + 1];
        for (int k = 0; k < j; ++k) {
            const floats e0 = walk->errors[k][0], e1 = walk->errors[k][1];
            const float *row = u + k * PANEL + j;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) r[i][0] += row[i] * e0, r[i][1] += row[i] * e1;
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const floats l0 = nearest_level(is_table, least, most, &g0, r[i][0]);
            const floats l1 = nearest_level(is_table, least, most, &g1, r[i][1]);
            const floats q0 = g0.scale * l0 - g0.low, q1 = g1.scale * l1 - g1.low;
            const floats e0 = x[(j + i) * VECTORS] - q0, e1 = x[(j + i) * VECTORS + 1] - q1;
            const floats off0 = r[i][0] - q0, off1 = r[i][1] - q1;
            walk->levels[j + i][0] = l0, walk->levels[j + i][1] = l1;
            walk->targets[j + i][0] = r[i][0], walk->targets[j + i][1] = r[i][1];
            walk->errors[j + i][0] = e0, walk->errors[j + i][1] = e1;
            loss0 += d[j + i] * (off0 * off0), loss1 += d[j + i] * (off1 * off1);
            const float *row = u + (j + i) * PANEL + j;
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
                if (k > i) r[k][0] += row[k] * e0, r[k][1] += row[k] * e1;
        }
    }
    walk->loss[0] = loss0, walk->loss[1] = loss1;
}

static void walk_block(Walk *walk, const Format *format, const floats *t, const floats *x, const float *u, const float *d,
                       const Grid *grid) {
    if (format->is_table)
        walk_columns(1, walk, format, format->sub, t, x, u, d, grid);
    else
        walk_columns(0, walk, format, format->sub, t, x, u, d, grid);
}

// The scale and minimum of a sub-block as stored, for two vectors: integers, or what a half-precision number holds.
typedef struct { floats scale[2], min[2]; } Stored;

static inline floats storable(floats value, int least, int most) {
    if (least == most) {
        uint16_t bits[LANES];
        return halved(value, bits);
    }
    value = select_float(value > (float)least, value, splat((float)least));
    value = select_float(value < (float)most, value, splat((float)most));
    return (value + ROUNDER) - ROUNDER;
}

typedef struct {
    int64_t n;
    const Format *format;   // and grid_format: what blocks consist of; both NULL: blocks stay as the search makes them
    const GridFormat *grid_format;
    int width;              // columns of a block
    size_t bytes;           // of a block
    Search search;
    Widen widen;
    const float *panels, *weights;
} Task;

enum { MOST_BYTES = 320 };  // of a block

// Sums over a block for the least squares fit of its d and dmin, the factors of what is stored: its numbers are d * a - dmin * b.
typedef struct { floats loss, aa, ab, bb, at, bt; } Whole;

// The buffers of one group of rows.
typedef struct {
    floats *errors;                                      // [n][VECTORS]
    floats targets[SUPER * VECTORS], numbers[SUPER * VECTORS];
    floats ideal[SUPER * VECTORS];
    float rows[GROUP * SUPER];                           // ideal numbers row by row, for the search
    uint8_t blocks[GROUP * MOST_BYTES];                  // what the search made of them
    union {
        Parts parts[GROUP];
        Pointed pointed[GROUP];
    };
    float limits[GROUP];                                 // of targets
    Whole whole[VECTORS];
    floats first_targets[SUPER * VECTORS], first_errors[SUPER * VECTORS];
    Parts first_parts[GROUP];
} Buffers;

static inline void try_grid(Walk *walk, const Task *task, const Stored *stored, const floats *d, const floats *dmin,
                            const floats *t, const floats *x, const float *u, const float *weights, Stored *best, floats *least) {
    Grid grid[2];
    for (int v = 0; v < 2; ++v) grid[v] = grid_of(d[v] * stored->scale[v], dmin[v] * stored->min[v]);
    walk_block(walk, task->format, t, x, u, weights, grid);
    for (int v = 0; v < 2; ++v) {
        const ints better = walk->loss[v] < least[v];
        best->scale[v] = select_float(better, stored->scale[v], best->scale[v]);
        best->min[v] = select_float(better, stored->min[v], best->min[v]);
        least[v] = select_float(better, walk->loss[v], least[v]);
    }
}

// The stored scale and minimum nearest to the least squares fit of a walk's targets by its levels.
static inline Stored refitted(const Walk *walk, const Task *task, const Stored *now, const floats *d, const floats *dmin,
                              const float *weights) {
    const Format *format = task->format;
    Stored fit;
    for (int v = 0; v < 2; ++v) {
        floats w = splat(0), l = splat(0), ll = splat(0), t = splat(0), lt = splat(0);
        for (int j = 0; j < format->sub; ++j) {
            const floats level = walk->levels[j][v], weighted = weights[j] * level;
            w += weights[j];
            l += weighted;
            ll += weighted * level;
            t += weights[j] * walk->targets[j][v];
            lt += weighted * walk->targets[j][v];
        }
        floats scale = lt / ll, min = splat(0);
        if (format->has_min) {
            const floats determinant = w * ll - l * l;
            scale = (w * lt - l * t) / determinant;
            min = (l * lt - ll * t) / determinant;
            if (format->most_min) {  // minimums are not negative
                const ints below = ~(min >= 0);
                min = select_float(below, splat(0), min);
                scale = select_float(below, lt / ll, scale);
            }
        }
        scale = storable(scale / d[v], format->least_scale, format->most_scale);
        min = format->has_min ? storable(min / dmin[v], 0, format->most_min) : min;
        const ints sound = (absolute(scale) <= 65504) & (absolute(min) <= 65504);
        fit.scale[v] = select_float(sound, scale, now->scale[v]);
        fit.min[v] = select_float(sound, min, now->min[v]);
    }
    return fit;
}

// The neighbour of a stored scale and minimum in a direction.
static inline Stored neighbour(const Task *task, const Stored *from, float by_scale, float by_min) {
    const Format *format = task->format;
    Stored to = *from;
    for (int v = 0; v < 2; ++v) {
        if (format->most_scale != format->least_scale) {
            to.scale[v] = storable(from->scale[v] + by_scale, format->least_scale, format->most_scale);
            if (format->most_min) to.min[v] = storable(from->min[v] + by_min, 0, format->most_min);
        } else {
            const float part = 0.5f / (float)(format->most - format->least);
            to.scale[v] = storable(from->scale[v] * (1 + by_scale * part), 0, 0);
            if (format->has_min) to.min[v] = storable(from->min[v] + 0.25f * by_min * from->scale[v], 0, 0);
        }
    }
    return to;
}

// Rounds one sub-block of a block for two vectors of rows, the lanes of `parts`.
static void round_sub_block(const Task *task, Buffers *buffers, int64_t column, int64_t block, int v) {
    const Format *format = task->format;
    const int sub = (int)(column - block) / format->sub, at = (int)(column - block);
    floats *t = buffers->targets + at * VECTORS + v, *x = buffers->numbers + at * VECTORS + v;
    const float *u = panel_at(task->panels, column / PANEL) + column * PANEL + column % PANEL, *weights = task->weights + column;
    floats d[2], dmin[2], least[2];
    Stored best;
    const int integers = format->most_scale != format->least_scale;
    for (int p = 0; p < 2; ++p)
        for (int k = 0; k < LANES; ++k) {
            const Parts *parts = buffers->parts + (v + p) * LANES + k;
            d[p][k] = integers ? parts->d : 1;
            dmin[p][k] = integers ? parts->dmin : 1;
            best.scale[p][k] = integers ? (float)parts->scales[sub] : parts->d;
            best.min[p][k] = format->most_min ? (float)parts->mins[sub] : format->has_min ? parts->dmin : 0;
        }
    Walk walk;
    least[0] = least[1] = splat(INFINITY);
    Stored tried = best;
    try_grid(&walk, task, &tried, d, dmin, t, x, u, weights, &best, least);
    for (int i = 0; i < REFITS; ++i) {
        tried = refitted(&walk, task, &tried, d, dmin, weights);
        try_grid(&walk, task, &tried, d, dmin, t, x, u, weights, &best, least);
    }
    for (int ring = 0; ring < RINGS; ++ring) {
        const Stored centre = best;
        for (int i = -1; i <= 1; ++i)
            for (int m = format->has_min ? -1 : 0; m <= (format->has_min ? 1 : 0); ++m)
                if (i || m) {
                    tried = neighbour(task, &centre, (float)i, (float)m);
                    try_grid(&walk, task, &tried, d, dmin, t, x, u, weights, &best, least);
                }
    }
    Grid grid[2];
    for (int p = 0; p < 2; ++p) grid[p] = grid_of(d[p] * best.scale[p], dmin[p] * best.min[p]);
    walk_block(&walk, format, t, x, u, weights, grid);
    for (int j = 0; j < format->sub; ++j)
        for (int p = 0; p < 2; ++p) buffers->errors[(column + j) * VECTORS + v + p] = walk.errors[j][p];
    for (int p = 0; p < 2; ++p) {
        Whole *whole = buffers->whole + v + p;
        whole->loss += walk.loss[p];
        for (int j = 0; j < format->sub; ++j) {
            const floats a = best.scale[p] * walk.levels[j][p], b = best.min[p], weighted = weights[j] * a;
            whole->aa += weighted * a;
            whole->ab += weighted * b;
            whole->at += weighted * walk.targets[j][p];
            whole->bb += weights[j] * (b * b);
            whole->bt += weights[j] * (b * walk.targets[j][p]);
        }
    }
    for (int p = 0; p < 2; ++p)
        for (int k = 0; k < LANES; ++k) {
            Parts *parts = buffers->parts + (v + p) * LANES + k;
            if (integers) {
                parts->scales[sub] = (int)best.scale[p][k];
                parts->mins[sub] = (int)best.min[p][k];
            } else {
                parts->d = best.scale[p][k];
                parts->dmin = best.min[p][k];
            }
            if (grid[p].scale[k] == 0) continue;  // every level is the same number: ggml's codes stay
            for (int j = 0; j < format->sub; ++j) {
                const int level = (int)walk.levels[j][p][k];
                int code = level + format->zero;
                if (format->is_table)
                    for (code = 0; IQ4_VALUES[code] != level;) ++code;
                parts->codes[at + j] = (uint8_t)code;
            }
        }
}

// Adds the errors of columns [from, to) to the targets t of columns [column, column + count) of a block, all in one panel.
static void feed(const Task *task, const Buffers *buffers, floats *t, int64_t block, int64_t column, int count, int64_t from,
                 int64_t to, int used) {
    const int64_t panel = column / PANEL, first = panel * PANEL;
    if (to > from)
        add_errors(t + (first - block) * VECTORS, buffers->errors + from * VECTORS,
                   panel_at(task->panels, panel) + from * PANEL, to - from, (int)(column - first), (int)(column - first) + count, used);
}

// The numbers that a block would be rounded to if every number could be expressed: each column's target, with the errors that the
// columns before it would then have. This is what the search sees; the targets alone make up for the same errors in every column.
static void settle(const Task *task, Buffers *buffers, int64_t block, int used) {
    floats *t = buffers->ideal, *x = buffers->numbers, *e = buffers->errors + block * VECTORS;
    memcpy(t, buffers->targets, sizeof(floats) * task->width * VECTORS);
    for (int i = 0; i < task->width; i += 4) {
        const float *u = panel_at(task->panels, (block + i) / PANEL) + (block + i) * PANEL + i % PANEL;
        if (i % PANEL == 0) feed(task, buffers, t, block, block + i, PANEL, block, block + i, used);
        else feed(task, buffers, t, block, block + i, 4, block + i / PANEL * PANEL, block + i, used);
        for (int v = 0; v < used; ++v)
            for (int j = i; j < i + 4; ++j) {
                e[j * VECTORS + v] = x[j * VECTORS + v] - t[j * VECTORS + v];
                for (int k = j + 1; k < i + 4; ++k) t[k * VECTORS + v] += u[(j - i) * PANEL + k - i] * e[j * VECTORS + v];
            }
    }
}

enum { CHUNK = 64 };

// Collects the targets of the block that begins at column `block`, and lets the search round the ideal numbers.
static void search_block(const Task *task, Buffers *buffers, const float *rows, int64_t block, int count, int used) {
    const int width = task->width, lanes = used * LANES;
    for (int r = 0; r < lanes; ++r) {
        const float *row = rows + (r < count ? r : count - 1) * task->n + block;
        for (int i = 0; i < width; ++i) buffers->numbers[i * VECTORS + r / LANES][r % LANES] = row[i];
    }
    memcpy(buffers->targets, buffers->numbers, sizeof(floats) * width * VECTORS);
    for (int64_t k = 0; k < block; k += CHUNK)
        for (int i = 0; i < width; i += PANEL)
            feed(task, buffers, buffers->targets, block, block + i, PANEL, k, k + CHUNK < block ? k + CHUNK : block, used);
    settle(task, buffers, block, used);
    for (int r = 0; r < lanes; ++r) {
        int sound = 1;
        float *row = buffers->rows + r * width;
        const float limit = buffers->limits[r];
        for (int i = 0; i < width; ++i) {
            row[i] = buffers->ideal[i * VECTORS + r / LANES][r % LANES];
            sound &= fabsf(row[i]) <= limit && fabsf(buffers->targets[i * VECTORS + r / LANES][r % LANES]) <= limit;
        }
        if (!sound)  // feedback went astray: this block starts from its own numbers
            for (int i = 0; i < width; ++i)
                row[i] = buffers->targets[i * VECTORS + r / LANES][r % LANES] = buffers->numbers[i * VECTORS + r / LANES][r % LANES];
    }
    task->search(buffers->rows, buffers->blocks, lanes, width, task->weights + block);
}

// The columns of a block, sub-block after sub-block.
static void round_sub_blocks(const Task *task, Buffers *buffers, int64_t block, int used) {
    const Format *format = task->format;
    memset(buffers->whole, 0, sizeof buffers->whole);
    for (int64_t column = block; column < block + task->width; column += format->sub) {
        feed(task, buffers, buffers->targets, block, column, format->sub, block, column, used);
        for (int v = 0; v < used; v += 2) round_sub_block(task, buffers, column, block, v);
    }
}

// Sets d and dmin of a row's block to the least squares fit of its targets by its levels and integer scales.
static void refit_block(Parts *parts, const Whole *whole, int k, int has_min) {
    const double aa = whole->aa[k], ab = whole->ab[k], bb = whole->bb[k], at = whole->at[k], bt = whole->bt[k];
    double d = at / aa, dmin = parts->dmin;
    if (has_min && bb > 0) {
        const double determinant = aa * bb - ab * ab;
        d = (at * bb - bt * ab) / determinant;
        dmin = (at * ab - bt * aa) / determinant;
        if (!(dmin >= 0)) d = at / aa, dmin = 0;
    }
    if (!(fabs(d) <= 65504 && dmin <= 65504)) return;
    const float new_d = widened(half((float)d)), new_dmin = widened(half((float)dmin));
    if (new_d == 0) return;
    parts->d = new_d;
    if (has_min) parts->dmin = new_dmin;
}

// Rounds a block code by code in all rows of a group. A block with integer scales is rounded twice, the second time with d and dmin
// fitted to what the first led to; the better one is kept, row by row.
static void round_codes(const Task *task, Buffers *buffers, uint8_t *out, int64_t row_bytes, int64_t block, int count, int used) {
    const Format *format = task->format;
    for (int r = 0; r < used * LANES; ++r) format->take(buffers->parts + r, buffers->blocks + r * task->bytes);
    if (format->block == format->sub) {
        round_sub_blocks(task, buffers, block, used);
    } else {
        const size_t columns = sizeof(floats) * task->width * VECTORS;
        floats *errors = buffers->errors + block * VECTORS, first_loss[VECTORS];
        memcpy(buffers->first_targets, buffers->targets, columns);
        round_sub_blocks(task, buffers, block, used);
        memcpy(buffers->first_errors, errors, columns);
        memcpy(buffers->first_parts, buffers->parts, sizeof(Parts) * used * LANES);
        memcpy(buffers->targets, buffers->first_targets, columns);
        for (int v = 0; v < used; ++v) first_loss[v] = buffers->whole[v].loss;
        for (int r = 0; r < used * LANES; ++r)
            refit_block(buffers->parts + r, buffers->whole + r / LANES, r % LANES, format->has_min);
        round_sub_blocks(task, buffers, block, used);
        for (int v = 0; v < used; ++v) {
            const ints better = buffers->whole[v].loss < first_loss[v];
            for (int i = 0; i < task->width; ++i) {
                floats *error = errors + i * VECTORS + v;
                *error = select_float(better, *error, buffers->first_errors[i * VECTORS + v]);
            }
            for (int k = 0; k < LANES; ++k)
                if (!better[k]) buffers->parts[v * LANES + k] = buffers->first_parts[v * LANES + k];
        }
    }
    for (int r = 0; r < count; ++r) format->put(buffers->parts + r, out + r * row_bytes);
}

#include "feedback_points.h"

// The same for a type with a grid.
static void round_grid(const Task *task, Buffers *buffers, uint8_t *out, int64_t row_bytes, int64_t block, int count, int used) {
    const GridFormat *format = task->grid_format;
    for (int r = 0; r < used * LANES; ++r) format->take(buffers->pointed + r, buffers->blocks + r * task->bytes);
    for (int64_t column = block; column < block + task->width; column += format->sub) {
        feed(task, buffers, buffers->targets, block, column, format->sub, block, column, used);
        for (int v = 0; v < used; ++v) round_points(task, buffers, column, block, v);
    }
    for (int r = 0; r < count; ++r) format->put(buffers->pointed + r, out + r * row_bytes);
}

// Takes a block as the search made it; its errors are for later blocks.
static void keep_block(const Task *task, Buffers *buffers, uint8_t *out, int64_t row_bytes, int64_t block, int count, int used) {
    task->widen(buffers->blocks, buffers->rows, used * LANES * task->width);
    for (int r = 0; r < used * LANES; ++r)
        for (int i = 0; i < task->width; ++i) {
            const float number = buffers->numbers[i * VECTORS + r / LANES][r % LANES];
            buffers->errors[(block + i) * VECTORS + r / LANES][r % LANES] = number - buffers->rows[r * task->width + i];
        }
    for (int r = 0; r < count; ++r) memcpy(out + r * row_bytes, buffers->blocks + r * task->bytes, task->bytes);
}

static int round_rows(const Task *task, const float *rows, uint8_t *out, int64_t n_rows) {
    const int64_t row_bytes = task->n / task->width * task->bytes;
    Buffers *buffers = aligned_alloc(64, (sizeof *buffers + 63) / 64 * 64);
    floats *errors = aligned_alloc(64, sizeof(floats) * VECTORS * task->n);
    const int failed = !buffers || !errors;
    if (!failed) buffers->errors = errors;
    for (int64_t row = 0; row < n_rows && !failed; row += GROUP) {
        const int count = n_rows - row < GROUP ? n_rows - row : GROUP;
        const int used = (count + 2 * LANES - 1) / (2 * LANES) * 2;
        for (int r = 0; r < used * LANES; ++r) {
            const float *numbers = rows + (row + (r < count ? r : count - 1)) * task->n;
            float most = 0;
            for (int64_t i = 0; i < task->n; ++i) most = fabsf(numbers[i]) > most ? fabsf(numbers[i]) : most;
            buffers->limits[r] = ASTRAY * most < MOST ? ASTRAY * most : MOST;
        }
        for (int64_t block = 0; block < task->n; block += task->width) {
            uint8_t *to = out + row * row_bytes + block / task->width * task->bytes;
            search_block(task, buffers, rows + row * task->n, block, count, used);
            (task->format ? round_codes : task->grid_format ? round_grid : keep_block)(task, buffers, to, row_bytes, block, count, used);
        }
    }
    free(errors);
    free(buffers);
    return failed;
}

// Rounds rows of n float32 each to blocks of the type `name`. search: ggml's search for that type, or a native kernel with the same
// bytes; panels, weights: U of the factor, and D, which may be scaled. n must be a multiple of the block's columns. Returns 0; 1 if
// there is no memory, 2 for an unknown type.
int imatrix_runner_feedback(const char *name, Search search, const float *rows, void *out, int64_t n_rows, int64_t n,
                            const float *panels, const float *weights) {
    const Format *format = find_format(name);
    const GridFormat *grid = find_grid_format(name);
    if (!format && !grid) return 2;
    const Task task = {n, format, grid, format ? format->block : SUPER, format ? format->bytes : grid->bytes, search, NULL, panels, weights};
    return round_rows(&task, rows, out, n_rows);
}

// The same for a type whose blocks of 256 columns and `bytes` bytes stay as the search makes them from their targets. widen: ggml's
// dequantisation of the type.
int imatrix_runner_feedback_whole(Search search, Widen widen, int64_t bytes, const float *rows, void *out, int64_t n_rows, int64_t n,
                                  const float *panels, const float *weights) {
    const Task task = {n, NULL, NULL, SUPER, bytes, search, widen, panels, weights};
    return bytes > MOST_BYTES ? 2 : round_rows(&task, rows, out, n_rows);
}

// Rows that are rounded at a time: fewer take as long.
int imatrix_runner_feedback_rows(void) { return GROUP; }

// Takes blocks apart, for the proof that it is done as the library does it: values gets the numbers that the blocks stand for, again
// the blocks put together. Returns 0; 2 for an unknown type.
int imatrix_runner_feedback_values(const char *name, const void *blocks, int64_t count, float *values, void *again) {
    const Format *format = find_format(name);
    if (!format) return 2;
    for (int64_t b = 0; b < count; ++b) {
        Parts parts;
        format->take(&parts, (const uint8_t *)blocks + b * format->bytes);
        for (int i = 0; i < format->block; ++i) {
            const int sub = i / format->sub, integers = format->most_scale != format->least_scale;
            const float scale = integers ? parts.d * (float)parts.scales[sub] : parts.d;
            const float low = !format->has_min ? 0 : integers ? parts.dmin * (float)parts.mins[sub] : parts.dmin;
            values[b * format->block + i] = scale * (float)level_of(format, parts.codes[i]) - low;
        }
        format->put(&parts, (uint8_t *)again + b * format->bytes);
    }
    return 0;
}
