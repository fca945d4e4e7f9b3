// Error feedback for the IQ2 and IQ3 types: points of a grid are chosen group by group, for one vector of rows. Part of feedback.c.

// The magnitudes of a grid's points: each is one of few levels.
typedef struct {
    int levels;
    float magnitudes[MOST_LEVELS];
    uint8_t level[MOST_POINTS][8], pair[MOST_POINTS][4];  // of each number; of each two numbers, first + levels * second
} Magnitudes;

static Magnitudes grids[GRID_FORMAT_COUNT];

// What rounding a sub-block led to. ll, lt: sums for the least squares fit of a scale.
typedef struct {
    floats errors[32], loss, ll, lt;
    ints points[8], negative[4];
} PointWalk;

// The grid point whose numbers, scaled, are nearest to y, where number i weighs g[i].
static inline __attribute__((always_inline)) ints nearest_point(const int size, const Magnitudes *grid, const int points,
                                                                const floats *y, const float *g, floats scale) {
    floats costs[8][MOST_LEVELS], pairs[4][MOST_LEVELS * MOST_LEVELS];
    const int levels = grid->levels;
    for (int l = 0; l < levels; ++l) {
        const floats number = scale * grid->magnitudes[l];
        for (int i = 0; i < size; ++i) costs[i][l] = g[i] * ((number - y[i]) * (number - y[i]));
    }
    for (int i = 0; i < size; i += 2)
        for (int b = 0; b < levels; ++b)
            for (int a = 0; a < levels; ++a) pairs[i / 2][a + levels * b] = costs[i][a] + costs[i + 1][b];
    ints best = splat_int(0);
    floats least = splat(INFINITY);
    for (int p = 0; p < points; ++p) {
        const uint8_t *pair = grid->pair[p];
        floats cost = pairs[0][pair[0]] + pairs[1][pair[1]];
        if (size == 8) cost += pairs[2][pair[2]] + pairs[3][pair[3]];
        const ints better = cost < least;
        least = select_float(better, cost, least);
        best = select_int(better, splat_int(p), best);
    }
    return best;
}

// The ideal numbers of columns [from, to) of eight, given their targets r: see settle().
static inline void settle_eight(floats *ideal, const floats *r, const floats *x, const float *u, int from, int to) {
    for (int i = from; i < to; ++i) {
        ideal[i] = r[i];
        for (int k = from; k < i; ++k) ideal[i] += u[k * PANEL + i] * (x[k * VECTORS] - ideal[k]);
    }
}

// Rounds a sub-block. t, x, u and d as in walk_columns; g: what an error of a number costs when the others of its group make up for it.
static void walk_points(PointWalk *walk, const GridFormat *format, const Magnitudes *grid, const floats *t, const floats *x,
                        const float *u, const float *d, const float *g, floats scale) {
    const int size = format->size;
    walk->loss = walk->ll = walk->lt = splat(0);
    for (int o = 0; o < format->sub; o += 8) {
        floats r[8], ideal[8], y[8];
        ints negative[8], odd = splat_int(0), bits = splat_int(0);
        for (int i = 0; i < 8; ++i) {
            r[i] = t[(o + i) * VECTORS];
            for (int k = 0; k < o; ++k) r[i] += u[k * PANEL + o + i] * walk->errors[k];
        }
        const float *own = u + o * PANEL + o;
        settle_eight(ideal, r, x + o * VECTORS, own, 0, 8);
        for (int i = 0; i < 8; ++i) {
            negative[i] = ideal[i] < 0;
            odd ^= negative[i];
        }
        if (format->is_even) {  // the number to which its sign matters least gets the other one
            floats least = splat(INFINITY);
            ints which = splat_int(0);
            for (int i = 0; i < 8; ++i) {
                const floats cost = g[o + i] * (ideal[i] * ideal[i]);
                const ints better = cost < least;
                least = select_float(better, cost, least);
                which = select_int(better, splat_int(i), which);
            }
            for (int i = 0; i < 8; ++i) negative[i] ^= odd & (which == i);
        }
        for (int i = 0; i < 8; ++i) bits |= negative[i] & 1 << i;
        walk->negative[o / 8] = bits;
        for (int from = 0; from < 8; from += size) {
            if (from) settle_eight(ideal, r, x + o * VECTORS, own, from, from + size);
            for (int i = from; i < from + size; ++i) y[i] = (floats)((ints)ideal[i] ^ (negative[i] & (int32_t)0x80000000));
            const ints point = size == 8 ? nearest_point(8, grid, format->points, y, g + o, scale)
                                         : nearest_point(4, grid, format->points, y + from, g + o + from, scale);
            walk->points[(o + from) / size] = point;
            floats magnitude[8];
            for (int k = 0; k < LANES; ++k)
                for (int i = 0; i < size; ++i) magnitude[i][k] = grid->magnitudes[grid->level[point[k]][i]];
            for (int i = from; i < from + size; ++i) {
                const floats m = (floats)((ints)magnitude[i - from] ^ (negative[i] & (int32_t)0x80000000));
                const floats q = scale * m, off = r[i] - q, e = x[(o + i) * VECTORS] - q, weighted = d[o + i] * m;
                walk->errors[o + i] = e;
                walk->loss += d[o + i] * (off * off);
                walk->ll += weighted * m;
                walk->lt += weighted * r[i];
                for (int k = i + 1; k < 8; ++k) r[k] += own[i * PANEL + k] * e;
            }
        }
    }
}

// The stored integer of a sub-block's scale nearest to a number.
static inline floats stored_scale(floats value) {
    value = select_float(value > 0, value, splat(0));
    value = select_float(value < 15, value, splat(15));
    return (value + ROUNDER) - ROUNDER;
}

// Rounds one sub-block for one vector of rows; `parts` are those of its lanes.
static void round_points(const Task *task, Buffers *buffers, int64_t column, int64_t block, int v) {
    const GridFormat *format = task->grid_format;
    const Magnitudes *grid = grids + (format - GRID_FORMATS);
    const int sub = (int)(column - block) / format->sub, at = (int)(column - block);
    const floats *t = buffers->targets + at * VECTORS + v, *x = buffers->numbers + at * VECTORS + v;
    const float *u = panel_at(task->panels, column / PANEL) + column * PANEL + column % PANEL, *d = task->weights + column;
    Pointed *parts = buffers->pointed + v * LANES;
    float g[32];
    for (int i = 0; i < format->sub; ++i) {
        g[i] = 0;
        for (int k = i; k < i / format->size * format->size + format->size; ++k) g[i] += u[i * PANEL + k] * u[i * PANEL + k] * d[k];
    }
    floats factor, stored;
    for (int k = 0; k < LANES; ++k) {
        factor[k] = parts[k].d;
        stored[k] = (float)parts[k].scales[sub];
    }
    PointWalk walk;
    floats best = stored, least = splat(INFINITY);
    for (int turn = 0; turn < 4; ++turn) {  // the search's scale, that of the least squares fit, and two neighbours
        const floats centre = best;
        if (turn == 1) stored = stored_scale((walk.lt / walk.ll / factor - format->offset) / format->step);
        if (turn == 2) stored = stored_scale(centre - 1);
        if (turn == 3) stored = stored_scale(best + (select_float(best == stored, splat(2), splat(1))));
        walk_points(&walk, format, grid, t, x, u, d, g, factor * (format->offset + format->step * stored));
        const ints better = walk.loss < least;
        best = select_float(better, stored, best);
        least = select_float(better, walk.loss, least);
    }
    const floats scale = factor * (format->offset + format->step * best);
    walk_points(&walk, format, grid, t, x, u, d, g, scale);
    for (int j = 0; j < format->sub; ++j) buffers->errors[(column + j) * VECTORS + v] = walk.errors[j];
    for (int k = 0; k < LANES; ++k) {
        parts[k].scales[sub] = (int)best[k];
        if (scale[k] == 0) continue;  // every point is the same: ggml's stay
        for (int i = 0; i < format->sub / format->size; ++i) parts[k].points[at / format->size + i] = (uint16_t)walk.points[i][k];
        for (int i = 0; i < format->sub / 8; ++i) parts[k].signs[at / 8 + i] = (uint8_t)walk.negative[i][k];
    }
}

// Sets the grid of a type: the numbers of its points, one after the other, in a block with d = 1 and scales 0. Must be called before
// rows are rounded to that type. Returns 0; 1 if there are more than eight different magnitudes, 2 for an unknown type.
int imatrix_runner_feedback_grid(const char *name, const float *numbers) {
    const GridFormat *format = find_grid_format(name);
    if (!format) return 2;
    Magnitudes *grid = grids + (format - GRID_FORMATS), made = {0};
    for (int p = 0; p < format->points; ++p)
        for (int i = 0; i < format->size; ++i) {
            const float own = numbers[p * format->size + i] / format->offset;
            int l = 0;
            while (l < made.levels && made.magnitudes[l] != own) ++l;
            if (l == MOST_LEVELS) return 1;
            if (l == made.levels) made.magnitudes[made.levels++] = own;
            made.level[p][i] = (uint8_t)l;
        }
    for (int p = 0; p < format->points; ++p)
        for (int i = 0; i < format->size; i += 2) made.pair[p][i / 2] = made.level[p][i] + made.levels * made.level[p][i + 1];
    *grid = made;
    return 0;
}

// As imatrix_runner_feedback_values, for the types with grids.
int imatrix_runner_feedback_grid_values(const char *name, const void *blocks, int64_t count, float *values, void *again) {
    const GridFormat *format = find_grid_format(name);
    if (!format) return 2;
    const Magnitudes *grid = grids + (format - GRID_FORMATS);
    for (int64_t b = 0; b < count; ++b) {
        Pointed parts;
        format->take(&parts, (const uint8_t *)blocks + b * format->bytes);
        for (int i = 0; i < SUPER; ++i) {
            const float scale = parts.d * (format->offset + format->step * (float)parts.scales[i / format->sub]);
            const float number = scale * grid->magnitudes[grid->level[parts.points[i / format->size]][i % format->size]];
            values[b * SUPER + i] = parts.signs[i / 8] >> i % 8 & 1 ? -number : number;
        }
        format->put(&parts, (uint8_t *)again + b * format->bytes);
    }
    return 0;
}
