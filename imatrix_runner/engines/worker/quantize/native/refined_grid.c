// Refined searches of the types whose codes are points of a grid: IQ2 and IQ3. As in refined.c, but for one scale of a sub-block after
// another every group of eight (IQ2) or four (IQ3) numbers gets the best point of the whole grid, by the weights of the imatrix as
// they are and by the values that points really have. (ggml takes levels for 1, 3, 5, … and searches near the rounded numbers.)
//
// One super-block in each lane. The grid is read out of the library in use, see `imatrix_runner_refined_grid`.

#include <stdlib.h>

#include "refined.h"

enum { MOST_POINTS = 1024, MOST_LEVELS = 8, WIDEST = 8, MOST_GROUPS = 64 };

// The points' numbers, and the levels that occur, as multiples of the scale of a sub-block with integer scale 0. half: the levels of
// the first and of the second half of a point as digits of one number.
typedef struct {
    int points, levels;
    float level[MOST_LEVELS], value[MOST_POINTS][WIDEST];
    uint8_t half[MOST_POINTS][2];
} Grid;

static Grid grid_iq2_xxs, grid_iq2_xs, grid_iq2_s, grid_iq3_xxs, grid_iq3_s;

// Must be called before a type is searched, with the numbers of all points of the library's own grid, as they are for d = 1 and
// integer scales of 0. The number of points and of numbers per point tell which type it is. Returns 0 if the grid can be used.
int imatrix_runner_refined_grid(int points, int width, const float *values) {
    Grid *grid = width == 8   ? points == 256 ? &grid_iq2_xxs : points == 512 ? &grid_iq2_xs : points == 1024 ? &grid_iq2_s : NULL
                 : width == 4 ? points == 256 ? &grid_iq3_xxs : points == 512 ? &grid_iq3_s : NULL
                              : NULL;
    const int levels = width == 8 ? 3 : MOST_LEVELS;
    if (!grid) return 1;
    memset(grid, 0, sizeof *grid);
    for (int i = 0; i < points * width; ++i) {
        int l = 0;
        while (l < grid->levels && grid->level[l] < values[i]) ++l;
        if (l < grid->levels && grid->level[l] == values[i]) continue;
        if (grid->levels == levels || !(values[i] > 0)) return 1;
        memmove(grid->level + l + 1, grid->level + l, sizeof(float) * (grid->levels++ - l));
        grid->level[l] = values[i];
    }
    if (grid->levels != levels) return 1;
    for (int p = 0; p < points; ++p)
        for (int i = 0; i < width; ++i) {
            int l = 0;
            while (grid->level[l] < values[width * p + i]) ++l;
            grid->value[p][i] = values[width * p + i];
            uint8_t *half = &grid->half[p][2 * i / width];
            *half = (uint8_t)(*half * grid->levels + l);
        }
    grid->points = points;
    return 0;
}

// A block as numbers. A sign's bit is set for a negative number; eight numbers per byte.
typedef struct {
    float d;
    int scales[16];
    uint16_t points[MOST_GROUPS];
    uint8_t signs[SUPER / 8];
} GridParts;

typedef struct { uint16_t d, qs[32]; } BlockIQ2XXS;
typedef struct { uint16_t d, qs[32]; uint8_t scales[8]; } BlockIQ2XS;
typedef struct { uint16_t d; uint8_t qs[32], signs[32], qh[8], scales[8]; } BlockIQ2S;
typedef struct { uint16_t d; uint8_t qs[64], scales_and_signs[32]; } BlockIQ3XXS;
typedef struct { uint16_t d; uint8_t qs[64], qh[8], signs[32], scales[4]; } BlockIQ3S;

// Seven stored signs; the eighth makes their number even.
INLINED uint8_t even_signs(int stored) { return (uint8_t)(stored | __builtin_parity(stored) << 7); }

INLINED void take_scale_and_signs(GridParts *parts, int j, uint32_t word) {
    parts->scales[j] = word >> 28;
    for (int g = 0; g < 4; ++g) parts->signs[4 * j + g] = even_signs(word >> 7 * g & 127);
}

INLINED uint32_t put_scale_and_signs(const GridParts *parts, int j) {
    uint32_t word = (uint32_t)parts->scales[j] << 28;
    for (int g = 0; g < 4; ++g) word |= (uint32_t)(parts->signs[4 * j + g] & 127) << 7 * g;
    return word;
}

INLINED void take_iq2_xxs(GridParts *parts, const BlockIQ2XXS *block) {
    parts->d = widened(block->d);
    for (int j = 0; j < 8; ++j) {
        uint32_t words[2];
        memcpy(words, block->qs + 4 * j, sizeof words);
        for (int g = 0; g < 4; ++g) parts->points[4 * j + g] = words[0] >> 8 * g & 255;
        take_scale_and_signs(parts, j, words[1]);
    }
}

INLINED void put_iq2_xxs(const GridParts *parts, BlockIQ2XXS *block) {
    block->d = half(parts->d);
    for (int j = 0; j < 8; ++j) {
        uint32_t words[2] = {0, put_scale_and_signs(parts, j)};
        for (int g = 0; g < 4; ++g) words[0] |= (uint32_t)parts->points[4 * j + g] << 8 * g;
        memcpy(block->qs + 4 * j, words, sizeof words);
    }
}

INLINED void take_iq2_xs(GridParts *parts, const BlockIQ2XS *block) {
    parts->d = widened(block->d);
    for (int j = 0; j < 16; ++j) parts->scales[j] = block->scales[j / 2] >> 4 * (j % 2) & 15;
    for (int g = 0; g < 32; ++g) {
        parts->points[g] = block->qs[g] & 511;
        parts->signs[g] = even_signs(block->qs[g] >> 9);
    }
}

INLINED void put_iq2_xs(const GridParts *parts, BlockIQ2XS *block) {
    block->d = half(parts->d);
    for (int j = 0; j < 8; ++j) block->scales[j] = parts->scales[2 * j] | parts->scales[2 * j + 1] << 4;
    for (int g = 0; g < 32; ++g) block->qs[g] = parts->points[g] | (parts->signs[g] & 127) << 9;
}

INLINED void take_iq2_s(GridParts *parts, const BlockIQ2S *block) {
    parts->d = widened(block->d);
    for (int j = 0; j < 16; ++j) parts->scales[j] = block->scales[j / 2] >> 4 * (j % 2) & 15;
    for (int g = 0; g < 32; ++g) parts->points[g] = block->qs[g] | (block->qh[g / 4] >> 2 * (g % 4) & 3) << 8;
    memcpy(parts->signs, block->signs, sizeof parts->signs);
}

INLINED void put_iq2_s(const GridParts *parts, BlockIQ2S *block) {
    memset(block, 0, sizeof *block);
    block->d = half(parts->d);
    for (int j = 0; j < 8; ++j) block->scales[j] = parts->scales[2 * j] | parts->scales[2 * j + 1] << 4;
    for (int g = 0; g < 32; ++g) {
        block->qs[g] = parts->points[g] & 255;
        block->qh[g / 4] |= (parts->points[g] >> 8) << 2 * (g % 4);
    }
    memcpy(block->signs, parts->signs, sizeof parts->signs);
}

INLINED void take_iq3_xxs(GridParts *parts, const BlockIQ3XXS *block) {
    parts->d = widened(block->d);
    for (int g = 0; g < 64; ++g) parts->points[g] = block->qs[g];
    for (int j = 0; j < 8; ++j) {
        uint32_t word;
        memcpy(&word, block->scales_and_signs + 4 * j, sizeof word);
        take_scale_and_signs(parts, j, word);
    }
}

INLINED void put_iq3_xxs(const GridParts *parts, BlockIQ3XXS *block) {
    block->d = half(parts->d);
    for (int g = 0; g < 64; ++g) block->qs[g] = (uint8_t)parts->points[g];
    for (int j = 0; j < 8; ++j) {
        const uint32_t word = put_scale_and_signs(parts, j);
        memcpy(block->scales_and_signs + 4 * j, &word, sizeof word);
    }
}

INLINED void take_iq3_s(GridParts *parts, const BlockIQ3S *block) {
    parts->d = widened(block->d);
    for (int j = 0; j < 8; ++j) parts->scales[j] = block->scales[j / 2] >> 4 * (j % 2) & 15;
    for (int g = 0; g < 64; ++g) parts->points[g] = block->qs[g] | (block->qh[g / 8] >> g % 8 & 1) << 8;
    memcpy(parts->signs, block->signs, sizeof parts->signs);
}

INLINED void put_iq3_s(const GridParts *parts, BlockIQ3S *block) {
    memset(block, 0, sizeof *block);
    block->d = half(parts->d);
    for (int j = 0; j < 8; ++j) block->scales[j / 2] |= parts->scales[j] << 4 * (j % 2);
    for (int g = 0; g < 64; ++g) {
        block->qs[g] = parts->points[g] & 255;
        block->qh[g / 8] |= (parts->points[g] >> 8) << g % 8;
    }
    memcpy(block->signs, parts->signs, sizeof parts->signs);
}

// width: numbers of a point; size: of a sub-block; even: whether of eight signs an even number is negative.
typedef struct { int width, size, even; } GridLayout;

// x holds absolute values here, but for numbers whose sign is the wrong one; `signs` those of each eight.
typedef struct {
    floats d, error, scales[16];
} GridCandidate;

INLINED floats size_of(floats d, floats scale) { return d * (scale + scale + 1); }

// The least error of a group at a scale, and, if it is wanted, the number of the first point that has it.
INLINED floats best_point(const Grid *grid, const int width, const floats *x, const floats *w, floats scale, ints *point) {
    enum { HALF = 81 };  // 64 for IQ3
    const int levels = width == 8 ? 3 : MOST_LEVELS, pairs = levels * levels;
    floats cost[2 * HALF], own[WIDEST][MOST_LEVELS], least = splat(INFINITY);
    for (int i = 0; i < width; ++i)
        for (int l = 0; l < levels; ++l) {
            const floats diff = scale * grid->level[l] - x[i];
            own[i][l] = w[i] * diff * diff;
        }
    for (int h = 0; h < 2; ++h) {
        floats two[2][9];
        for (int i = 0; width == 8 && i < 2; ++i)
            for (int l = 0; l < pairs; ++l) two[i][l] = own[4 * h + 2 * i][l / levels] + own[4 * h + 2 * i + 1][l % levels];
        for (int l = 0; l < (width == 8 ? HALF : pairs); ++l)
            cost[HALF * h + l] = width == 8 ? two[0][l / 9] + two[1][l % 9] : own[2 * h][l / levels] + own[2 * h + 1][l % levels];
    }
    ints best = splat_int(0), place = splat_int(0);
    for (int p = 0; p < grid->points; ++p) {
        const floats sum = cost[grid->half[p][0]] + cost[HALF + grid->half[p][1]];
        if (point) {
            best = select_int(sum < least, place, best);
            place += 1;
        }
        least = lesser(sum, least);
    }
    if (point) *point = best;
    return least;
}

INLINED floats sub_error(const Grid *grid, const GridLayout of, const Group *group, int j, floats scale) {
    floats error = splat(0);
    for (int i = of.size * j; i < of.size * (j + 1); i += of.width)
        error += best_point(grid, of.width, group->x + i, group->w + i, scale, NULL);
    return error;
}

// For every sub-block the best of the scales up to `reach` steps away.
INLINED void try_scales(GridCandidate *parts, const Grid *grid, const GridLayout of, const Group *group, const int reach) {
    parts->error = splat(0);
    for (int j = 0; j < SUPER / of.size; ++j) {
        const floats scale = parts->scales[j];
        floats best = splat(INFINITY);
        for (int s = -reach; s <= reach; ++s) {
            const floats other = whole_between(scale + (float)s, 0, 15);
            const floats error = sub_error(grid, of, group, j, size_of(parts->d, other));
            const ints better = error < best;
            best = select_float(better, error, best);
            parts->scales[j] = select_float(better, other, parts->scales[j]);
        }
        parts->error += best;
    }
}

// The best points, and their values as multiples of the sub-block's scale.
INLINED void choose_points(ints *points, floats *values, const GridCandidate *parts, const Grid *grid, const GridLayout of,
                                 const Group *group) {
    for (int i = 0; i < SUPER; i += of.width) {
        ints *point = points + i / of.width;
        best_point(grid, of.width, group->x + i, group->w + i, size_of(parts->d, parts->scales[i / of.size]), point);
        for (int k = 0; k < LANES; ++k)
            for (int n = 0; n < of.width; ++n) values[i + n][k] = grid->value[(*point)[k]][n];
    }
}

INLINED floats fitted(const floats *values, const GridCandidate *parts, const GridLayout of, const Group *group,
                      const float stretch) {
    floats aa = splat(0), ax = splat(0), xx = splat(0);
    for (int i = 0; i < SUPER; ++i) {
        const floats a = (parts->scales[i / of.size] + parts->scales[i / of.size] + 1) * values[i], weighted = group->w[i] * a;
        aa += weighted * a;
        ax += weighted * group->x[i];
        xx += group->w[i] * group->x[i] * group->x[i];
    }
    const floats d = ax * (1 + stretch) / (aa + stretch * (ax / xx) * ax);
    return select_float((aa > 0) & (ax > 0), to_half(d), parts->d);
}

INLINED void keep_grid(GridCandidate *best, const GridCandidate *parts, const GridLayout of) {
    const ints better = parts->error < best->error;
    best->d = select_float(better, parts->d, best->d);
    best->error = select_float(better, parts->error, best->error);
    for (int j = 0; j < SUPER / of.size; ++j) best->scales[j] = select_float(better, parts->scales[j], best->scales[j]);
}

// Splits off the signs. If their number must be even and is not, the sign that costs least is wrong: for a number x that is rounded
// to v about 4 * weight * |x| * v, where v is at least the smallest value.
INLINED void fold(Group *group, ints *signs, const GridCandidate *parts, const GridLayout of) {
    for (int g = 0; g < SUPER / 8; ++g) {
        floats *x = group->x + 8 * g, least = splat(INFINITY);
        const floats *w = group->w + 8 * g, scale = size_of(parts->d, parts->scales[8 * g / of.size]);
        ints odd = splat_int(0), cheapest = splat_int(0);
        signs[g] = splat_int(0);
        for (int i = 0; i < 8; ++i) {
            const ints negative = x[i] < 0;
            const floats size = absolute(x[i]), price = w[i] * size * greater(size, scale);
            signs[g] |= negative & 1 << i;
            odd ^= negative;
            cheapest = select_int(price < least, splat_int(i), cheapest);
            least = lesser(price, least);
            x[i] = size;
        }
        for (int i = 0; of.even && i < 8; ++i) {
            const ints changed = odd & (cheapest == i);
            x[i] = select_float(changed, -x[i], x[i]);
            signs[g] ^= changed & 1 << i;
        }
    }
}

INLINED floats exact_grid_error(const GridCandidate *parts, const floats *values, const GridLayout of, const Group *group) {
    floats error = splat(0);
    for (int j = 0; j < SUPER / of.size; ++j) {
        const floats scale = size_of(parts->d, parts->scales[j]);
        floats sum = splat(0);
        for (int i = of.size * j; i < of.size * (j + 1); ++i) {
            const floats diff = scale * values[i] - group->x[i];
            sum += group->w[i] * diff * diff;
        }
        error += sum;
    }
    return error;
}

INLINED void grid_to_lanes(GridCandidate *parts, floats *values, const Grid *grid, const GridLayout of, const GridParts *plain) {
    for (int k = 0; k < LANES; ++k) {
        parts->d[k] = plain[k].d;
        for (int j = 0; j < SUPER / of.size; ++j) parts->scales[j][k] = plain[k].scales[j];
        for (int i = 0; i < SUPER; ++i) {
            const float value = grid->value[plain[k].points[i / of.width]][i % of.width];
            values[i][k] = plain[k].signs[i / 8] >> i % 8 & 1 ? -value : value;
        }
    }
}

INLINED void grid_from_lane(GridParts *plain, const GridCandidate *parts, const ints *points, const ints *signs, const GridLayout of,
                            int k) {
    plain->d = parts->d[k];
    for (int j = 0; j < SUPER / of.size; ++j) plain->scales[j] = (int)parts->scales[j][k];
    for (int g = 0; g < SUPER / of.width; ++g) plain->points[g] = points[g][k];
    for (int g = 0; g < SUPER / 8; ++g) plain->signs[g] = signs[g][k];
}

// later: steps from every integer scale in the second turn; in the first it is one. starts: other factors to begin with, `spread` times
// as large or small as the one found.
typedef struct {
    int later, starts;
    float spread;
} GridEffort;

INLINED void improve_grid(GridCandidate *best, GridCandidate *parts, const Grid *grid, const GridLayout of, const Group *group,
                          const GridEffort effort) {
    ints points[MOST_GROUPS];
    floats values[SUPER];
    for (int turn = 0; turn < 2; ++turn) {
        if (turn) {
            choose_points(points, values, parts, grid, of, group);
            parts->d = fitted(values, parts, of, group, 0);
        }
        try_scales(parts, grid, of, group, turn ? effort.later : 1);
        keep_grid(best, parts, of);
    }
}

INLINED GridCandidate search_grid(const GridCandidate *first, const Grid *grid, const GridLayout of, const Group *group,
                                  const GridEffort effort) {
    GridCandidate best = *first, parts = *first;
    best.error = splat(INFINITY);
    GridCandidate found = best;
    for (int start = 0; start <= effort.starts; ++start) {
        if (start) {
            parts.d = to_half(found.d * (start == 1 ? effort.spread : 1 / effort.spread));
            const floats ratio = select_float(parts.d != 0, found.d / parts.d, splat(0));
            for (int j = 0; j < SUPER / of.size; ++j) parts.scales[j] = whole_between((found.scales[j] + 0.5f) * ratio - 0.5f, 0, 15);
        }
        improve_grid(&best, &parts, grid, of, group, effort);
        if (!start) found = best;
    }
    return best;
}

#define REFINED_GRID(name, Block, layout, effort)                                                                     \
    int64_t refine_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {    \
        const GridLayout of = layout;                                                                                 \
        const Grid *grid = &grid_##name;                                                                              \
        const int64_t blocks = grid->points ? n_rows * n_per_row / SUPER : 0;                                         \
        int64_t improved = 0;                                                                                         \
        Block *block = out;                                                                                           \
        Group group;                                                                                                  \
        GridParts plain[LANES];                                                                                       \
        GridCandidate parts;                                                                                          \
        floats values[SUPER];                                                                                         \
        ints points[MOST_GROUPS], signs[SUPER / 8];                                                                   \
        for (int i = 0; i < SUPER; ++i) group.w[i] = splat(1);                                                        \
        for (int64_t first = 0; first < blocks; first += LANES) {                                                     \
            const int64_t count = blocks - first < LANES ? blocks - first : LANES;                                    \
            gather(SUPER, group.x, rows, n_rows * n_per_row, first, count);                                           \
            if (weights) gather(SUPER, group.w, weights, n_per_row, first, count);                                    \
            for (int k = 0; k < LANES; ++k) take_##name(&plain[k], block + first + (k < count ? k : count - 1));      \
            grid_to_lanes(&parts, values, grid, of, plain);                                                           \
            const floats old = exact_grid_error(&parts, values, of, &group);                                          \
            fold(&group, signs, &parts, of);                                                                          \
            parts = search_grid(&parts, grid, of, &group, effort);                                                    \
            choose_points(points, values, &parts, grid, of, &group);                                                  \
            GridCandidate stretched = parts;                                                                          \
            parts.d = fitted(values, &parts, of, &group, 0);                                                          \
            stretched.d = fitted(values, &parts, of, &group, STRETCH);                                                \
            const ints taken = certain(exact_grid_error(&stretched, values, of, &group), old);                        \
            const floats plain_error = exact_grid_error(&parts, values, of, &group);                                  \
            parts.d = select_float(taken, stretched.d, parts.d);                                                      \
            const ints better = (taken | certain(plain_error, old)) & searchable(SUPER, group.x);                     \
            for (int k = 0; k < count; ++k)                                                                           \
                if (better[k]) {                                                                                      \
                    grid_from_lane(&plain[k], &parts, points, signs, of, k);                                          \
                    put_##name(&plain[k], block + first + k);                                                         \
                    ++improved;                                                                                       \
                }                                                                                                     \
        }                                                                                                             \
        return improved;                                                                                              \
    }                                                                                                                 \
    void reread_##name(const void *from, float *numbers, void *to, int64_t blocks) {                                  \
        const GridLayout of = layout;                                                                                 \
        const Grid *grid = &grid_##name;                                                                              \
        for (int64_t block = 0; block < blocks; ++block) {                                                            \
            GridParts plain[LANES];                                                                                   \
            GridCandidate parts;                                                                                      \
            floats values[SUPER];                                                                                     \
            memset(plain, 0, sizeof plain);                                                                           \
            take_##name(&plain[0], (const Block *)from + block);                                                      \
            grid_to_lanes(&parts, values, grid, of, plain);                                                           \
            for (int i = 0; i < SUPER; ++i) *numbers++ = (size_of(parts.d, parts.scales[i / of.size]) * values[i])[0];\
            put_##name(&plain[0], (Block *)to + block);                                                               \
        }                                                                                                             \
    }

#define LAYOUT(...) ((GridLayout){__VA_ARGS__})
#ifndef EFFORT
#define EFFORT(...) ((GridEffort){__VA_ARGS__})
#endif

REFINED_GRID(iq2_xxs, BlockIQ2XXS, LAYOUT(8, 32, 1), EFFORT(1, 2, 1.04f))
REFINED_GRID(iq2_xs, BlockIQ2XS, LAYOUT(8, 16, 1), EFFORT(1, 0, 1))
REFINED_GRID(iq2_s, BlockIQ2S, LAYOUT(8, 16, 0), EFFORT(0, 0, 1))
REFINED_GRID(iq3_xxs, BlockIQ3XXS, LAYOUT(4, 32, 1), EFFORT(1, 2, 1.04f))
REFINED_GRID(iq3_s, BlockIQ3S, LAYOUT(4, 32, 0), EFFORT(1, 0, 1))
