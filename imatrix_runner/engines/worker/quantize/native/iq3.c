// IQ3_XXS and IQ3_S, with or without weights: a super-block's candidate scales, one in each lane of a vector.
//
// ggml tries 31 (IQ3_XXS) or 19 (IQ3_S) scales per sub-block. For each it rounds groups of four numbers to a point with one of
// eight levels per number, and if that point is not on the type's grid, takes the best of the grid's points near it. From one
// scale to the next the rounded point rarely changes: lanes that share one search its neighbours together, and the cost of a level
// in a lane is computed once. Every number goes through ggml's operations in their order, each rounded on its own, so the results
// are equal to the bit; the loader tests that against the library in use. Search and block layout: ggml/src/ggml-quants.c and
// ggml-common.h of llama.cpp.

#include <float.h>
#include <stdlib.h>

#include "lanes.h"

enum { SUB = 32, SUBS = SUPER / SUB, GROUPS = SUB / 4, LEVELS = 8, POINTS = 4096, OFF_GRID = 0x8000 };

// A point is four levels of three bits. Its list: only itself if it is on the grid, else the grid points near it, nearest first and
// marked OFF_GRID.
typedef struct {
    struct { uint16_t first, count; } of[POINTS];
    uint16_t index[POINTS], *lists;
} Table;

static Table table_xxs, table_s;

static inline int level(int point, int i) { return point >> 3 * i & 7; }

// Builds lists of the grid points at the `wanted` least distances that occur; equally distant ones in the grid's order.
static int build(Table *table, const int size, const int wanted, const uint8_t *levels) {
    uint16_t grid[512], *lists = malloc(sizeof *lists * POINTS * size);
    int used = 0;
    if (!lists) return 1;
    for (int j = 0; j < size; ++j) {
        grid[j] = 0;
        for (int i = 0; i < 4; ++i) grid[j] |= (levels[4 * j + i] & 7) << 3 * i;
        table->index[grid[j]] = j;
    }
    for (int point = 0; point < POINTS; ++point) {
        enum { FARTHEST = 4 * (LEVELS - 1) * (LEVELS - 1) };
        int16_t at[FARTHEST + 1], after[512];  // the first grid point at a distance, and the next as far as this one
        memset(at, -1, sizeof at);
        for (int j = size - 1; j >= 0; --j) {
            int far = 0;
            for (int i = 0; i < 4; ++i) {
                const int diff = level(point, i) - level(grid[j], i);
                far += diff * diff;
            }
            after[j] = at[far];
            at[far] = j;
        }
        const int first = used;
        if (at[0] >= 0) lists[used++] = point;
        for (int far = 1, have = 0; at[0] < 0 && have < wanted && far <= FARTHEST; ++far) {
            have += at[far] >= 0;
            for (int j = at[far]; j >= 0; j = after[j]) lists[used++] = grid[j] | OFF_GRID;
        }
        table->of[point].first = first;
        table->of[point].count = used - first;
    }
    free(table->lists);
    table->lists = NULL;
    // All zeros become the lowest point, so that must be on the grid; and places in the lists have sixteen bits.
    if (lists[0] & OFF_GRID || used > UINT16_MAX) {
        free(lists);
        return 1;
    }
    table->lists = realloc(lists, used * sizeof *lists);
    return !table->lists;
}

// Must be called before a type is quantised, with the levels (0 to 7, four per point) of the library's own grid: `which` is 256 for
// IQ3_XXS, 512 for IQ3_S, the number of points. Returns 0 if the table can be used.
int imatrix_runner_iq3_tables(int which, const uint8_t *levels) {
    return which == 256 ? build(&table_xxs, 256, 2, levels) : which == 512 ? build(&table_s, 512, 3, levels) : 1;
}

// A super-block: absolute values, weights, square roots of the weights; and the result for each sub-block.
typedef struct {
    float x[SUPER], w[SUPER], root[SUPER], max[SUBS], scale[SUBS];
    uint16_t point[SUBS][GROUPS];
    uint32_t signs[SUBS];
} Super;

// Results of the candidates of all sub-blocks, sub-block after sub-block, in at most 256 lanes.
enum { VECTORS = SUPER / LANES };

typedef struct {
    floats sum_qx[VECTORS], sum_q2[VECTORS];
    ints point[GROUPS][VECTORS];
} Tried;

static inline void weigh(Super *super, const float *x, const float *weights) {
    float squares = 0;
    for (int i = 0; i < SUPER; ++i) squares += x[i] * x[i];
    const float spread = 2 * squares / SUPER;
    for (int i = 0; i < SUPER; i += LANES) {
        floats value, weight;
        memcpy(&value, x + i, sizeof value);
        if (weights) {
            memcpy(&weight, weights + i, sizeof weight);
            weight *= square_root(spread + value * value);
        } else {
            weight = value * value;
        }
        const floats rooted = square_root(weight);
        memcpy(super->w + i, &weight, sizeof weight);
        memcpy(super->root + i, &rooted, sizeof rooted);
    }
}

// A key in the order of numbers >= 0, with 32 lower bits free for the order of equals: the minimum needs no branch.
static inline uint64_t order(float value) {
    uint32_t bits;
    value += 0.f;
    memcpy(&bits, &value, sizeof bits);
    return (uint64_t)bits << 32;
}

// Splits numbers into absolute values and signs. If the signs must be even, the number with the least weighted square of each eight
// changes its sign where they are not.
static inline void take_signs(Super *super, const float *x, const int even) {
    for (int j = 0; j < SUBS; ++j) {
        uint32_t signs = 0;
        float *size = super->x + SUB * j, max;
        for (int k = SUB * j; k < SUB * (j + 1); k += 8) {
            uint32_t mask = 0;
            uint64_t lightest = UINT64_MAX;
            for (int i = 0; i < 8; ++i) {
                const int negative = !(x[k + i] >= 0);
                super->x[k + i] = negative ? -x[k + i] : x[k + i];
                mask |= (uint32_t)negative << i;
            }
            if (even) {
                for (int i = 0; i < 8; ++i) {
                    const uint64_t key = order(super->w[k + i] * x[k + i] * x[k + i]) | i;
                    lightest = key < lightest ? key : lightest;
                }
                const uint32_t flip = __builtin_parity(mask), i = lightest & 7;
                super->x[k + i] = flip ? -super->x[k + i] : super->x[k + i];
                mask ^= flip << i;
            }
            signs |= mask << (k - SUB * j);
        }
        max = size[0];
        for (int i = 1; i < SUB; ++i) max = max > size[i] ? max : size[i];
        super->max[j] = max;
        super->signs[j] = signs;
    }
}

// Lane by lane, which compilers turn into the machine's minimum and maximum instructions.
static inline floats lesser(floats a, floats b) {
    floats result;
    for (int k = 0; k < LANES; ++k) result[k] = a[k] < b[k] ? a[k] : b[k];
    return result;
}

static inline ints to_level(ints value) {
    ints result;
    for (int k = 0; k < LANES; ++k) result[k] = value[k] < LEVELS - 1 ? value[k] : LEVELS - 1;
    for (int k = 0; k < LANES; ++k) result[k] = result[k] > 0 ? result[k] : 0;
    return result;
}

static inline floats add_up(const floats (*cost)[LEVELS], int point) {
    return cost[0][level(point, 0)] + cost[1][level(point, 1)] + cost[2][level(point, 2)] + cost[3][level(point, 3)];
}

// The grid point of the least cost in every lane, the first of equals. Adjacent candidates mostly share their rounded point: each
// run of them searches that point's list once.
static inline ints search(const Table *table, const ints points, const floats (*cost)[LEVELS]) {
    int start[LANES + 1], runs = 1;
    ints found = splat_int(0);
    start[0] = points[0];
    for (int k = 1; k < LANES; ++k) {
        start[runs] = points[k];
        runs += points[k] != points[k - 1];
    }
    for (int run = 0; run < runs; ++run) {
        const int point = start[run], count = table->of[point].count;
        const uint16_t *list = table->lists + table->of[point].first;
        ints best = splat_int(list[0]);
        floats least = add_up(cost, list[0]);
        for (int j = 1; j < count; ++j) {
            const floats sum = add_up(cost, list[j]);
            best = select_int(sum < least, splat_int(list[j]), best);
            least = lesser(sum, least);
        }
        found = select_int(points == point, best, found);
    }
    return found;
}

// Tries all candidate scales of all sub-blocks: `reach` on each side of the one that maps the largest number to the highest level.
static inline void try_all(Tried *tried, const Super *super, const Table *table, const int reach) {
    const int each = 2 * reach + 1, total = SUBS * each;
    for (int c = 0; LANES * c < total; ++c) {
        // Lanes below `border` belong to sub-block `one`, the rest to the next: a sub-block has more candidates than LANES.
        const int one = LANES * c / each, done = LANES * c % each, border = each - done, other = one + 1 < SUBS ? one + 1 : one;
        ints next;
        floats step, size[LEVELS], sum_qx = splat(0), sum_q2 = splat(0);
        for (int k = 0; k < LANES; ++k) {
            const int n = k < border ? done + k : other > one ? k - border : each - 1;
            step[k] = (float)(n - reach);
            next[k] = k < border ? 0 : -1;
        }
        const floats max = select_float(next, splat(super->max[other]), splat(super->max[one]));
        const floats inverse = ((float)(2 * LEVELS - 1) + step * 0.2f) / max, scale = 1 / inverse;
        for (int l = 0; l < LEVELS; ++l) size[l] = scale * (float)(2 * l + 1);
        for (int k = 0; k < GROUPS; ++k) {
            const int a = SUB * one + 4 * k, b = SUB * other + 4 * k;
            floats cost[4][LEVELS], w[4], wx[4];
            ints points = splat_int(0);
            for (int i = 0; i < 4; ++i) {
                const floats x = select_float(next, splat(super->x[b + i]), splat(super->x[a + i]));
                const floats rooted = select_float(next, splat(super->root[b + i]), splat(super->root[a + i]));
                w[i] = select_float(next, splat(super->w[b + i]), splat(super->w[a + i]));
                wx[i] = w[i] * x;
                points |= to_level(round_even(0.5f * (inverse * x - 1))) << 3 * i;
                for (int l = 0; l < LEVELS; ++l) {
                    const floats diff = size[l] - x;
                    cost[i][l] = rooted * diff * diff;
                }
            }
            const ints found = tried->point[k][c] = search(table, points, cost);
            for (int i = 0; i < 4; ++i) {
                const floats q = to_float((found >> 3 * i & 7) * 2 + 1);
                sum_qx += wx[i] * q;
                sum_q2 += w[i] * q * q;
            }
        }
        tried->sum_qx[c] = sum_qx;
        tried->sum_q2[c] = sum_q2;
    }
}

// Rounds one value to nearest even, then clamps it to 0 .. `high`.
static inline int round_level(const float value, const int high) {
    const float shifted = value + 12582912.f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits & 0x007fffff) - 0x00400000;
    return bits < 0 ? 0 : bits > high ? high : bits;
}

// A group's grid point for one scale.
static inline int nearest_point(const Table *table, const float *x, const float *rooted, const float scale) {
    const float inverse = 1 / scale;
    float cost[4][LEVELS];
    int point = 0;
    for (int i = 0; i < 4; ++i) {
        point |= round_level(0.5f * (inverse * x[i] - 1), LEVELS - 1) << 3 * i;
        for (int l = 0; l < LEVELS; ++l) {
            const float diff = scale * (float)(2 * l + 1) - x[i];
            cost[i][l] = rooted[i] * diff * diff;
        }
    }
    const uint16_t *list = table->lists + table->of[point].first;
    uint64_t least = UINT64_MAX;
    for (uint32_t j = 0; j < table->of[point].count; ++j) {
        const float sum = cost[0][level(list[j], 0)] + cost[1][level(list[j], 1)] + cost[2][level(list[j], 2)]
            + cost[3][level(list[j], 3)];
        const uint64_t key = order(sum) | j << 16 | list[j];
        least = key < least ? key : least;
    }
    return least & (POINTS - 1);
}

// Takes the best candidate of every sub-block; then, if not all its points were on the grid, rounds again with its best scale: all
// groups (IQ3_S), or those whose points were not (IQ3_XXS).
static inline void choose_scales(Super *super, const Tried *tried, const Table *table, const int reach, const float tiny,
                                 const int all_groups) {
    const int each = 2 * reach + 1;
    for (int j = 0; j < SUBS; ++j) {
        const float *x = super->x + SUB * j, *w = super->w + SUB * j, max = super->max[j];
        uint16_t *point = super->point[j];
        float scale = max / (2 * LEVELS - 1), best = 0;
        int winner = -1, off = 0;
        memset(point, 0, sizeof super->point[j]);
        super->scale[j] = 0;
        if (max < tiny) {
            super->signs[j] = 0;
            continue;
        }
        for (int n = each * j; n < each * (j + 1); ++n) {
            const float qx = tried->sum_qx[n / LANES][n % LANES], q2 = tried->sum_q2[n / LANES][n % LANES];
            if (q2 > 0 && qx * qx > best * q2) {
                scale = qx / q2;
                best = scale * qx;
                winner = n;
            }
        }
        for (int k = 0; k < GROUPS; ++k) {
            point[k] = winner < 0 ? (all_groups ? OFF_GRID : 0) : tried->point[k][winner / LANES][winner % LANES];
            off |= point[k] & OFF_GRID;
        }
        if (off && scale > 0) {
            float sum_qx = 0, sum_q2 = 0;
            for (int k = 0; k < GROUPS; ++k) {
                const float *rooted = super->root + SUB * j + 4 * k;
                if (all_groups || point[k] & OFF_GRID) point[k] = nearest_point(table, x + 4 * k, rooted, scale);
                for (int i = 0; i < 4; ++i) {
                    const float q = (float)(2 * level(point[k], i) + 1);
                    sum_qx += w[4 * k + i] * x[4 * k + i] * q;
                    sum_q2 += w[4 * k + i] * q * q;
                }
            }
            if (sum_q2 > 0) scale = sum_qx / sum_q2;
        }
        if (scale < 0) {
            scale = -scale;
            super->signs[j] = ~super->signs[j];
        }
        for (int k = 0; k < GROUPS; ++k) point[k] &= ~OFF_GRID;
        super->scale[j] = scale;
    }
}

typedef struct { uint16_t d; uint8_t qs[64], scales_and_signs[32]; } BlockIQ3XXS;
typedef struct { uint16_t d; uint8_t qs[64], qh[8], signs[32], scales[4]; } BlockIQ3S;

// Stores the scale, times `fudge`, and the sub-blocks' scales in four bits; returns 0 and stores nothing if all are zero.
static inline int store_scales(const Super *super, const float fudge, uint16_t *stored, int *scales) {
    float max = 0;
    for (int j = 0; j < SUBS; ++j) max = max > super->scale[j] ? max : super->scale[j];
    if (!max) return 0;
    const float d = max / 31, inverse = 1 / d;
    for (int j = 0; j < SUBS; ++j) scales[j] = round_level(0.5f * (inverse * super->scale[j] - 1), 15);
    *stored = half(d * fudge);
    return 1;
}

static inline void write_iq3_xxs(BlockIQ3XXS *block, const Super *super) {
    int scales[SUBS];
    memset(block, 0, sizeof *block);
    if (!store_scales(super, 1.0125f, &block->d, scales)) return;
    for (int j = 0; j < SUBS; ++j) {
        uint32_t word = (uint32_t)scales[j] << 28;
        for (int k = 0; k < GROUPS; ++k) block->qs[GROUPS * j + k] = table_xxs.index[super->point[j][k]];
        for (int k = 0; k < 4; ++k) word |= (super->signs[j] >> 8 * k & 127) << 7 * k;
        memcpy(block->scales_and_signs + 4 * j, &word, sizeof word);
    }
}

static inline void write_iq3_s(BlockIQ3S *block, const Super *super) {
    int scales[SUBS] = {0}, place = 0;
    memset(block, 0, sizeof *block);
    store_scales(super, 1.033f, &block->d, scales);
    for (int j = 0; j < SUBS; ++j) {
        block->scales[j / 2] |= scales[j] << j % 2 * 4;
        if (!super->max[j]) continue;  // ggml skips it: the next sub-blocks move up
        for (int k = 0; k < GROUPS; ++k) {
            const int index = table_s.index[super->point[j][k]];
            block->qs[GROUPS * place + k] = index & 255;
            block->qh[j] |= index >> 8 << k;
        }
        for (int k = 0; k < 4; ++k) block->signs[4 * place + k] = super->signs[j] >> 8 * k;
        ++place;
    }
}

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights): ggml's own signature; without weights if they are
// NULL. Returns 0 if the type's table was not built.
#define KERNEL(name, Block, table, reach, even, tiny, all_groups, write)                                              \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t blocks = table.lists ? n_rows * n_per_row / SUPER : 0;                                          \
        Super super;                                                                                                  \
        Tried tried;                                                                                                  \
        for (int64_t block = 0; block < blocks; ++block) {                                                            \
            const float *x = rows + block * SUPER;                                                                    \
            weigh(&super, x, weights ? weights + block * SUPER % n_per_row : NULL);                                   \
            take_signs(&super, x, even);                                                                              \
            try_all(&tried, &super, &table, reach);                                                                   \
            choose_scales(&super, &tried, &table, reach, tiny, all_groups);                                           \
            write((Block *)out + block, &super);                                                                      \
        }                                                                                                             \
        return blocks * sizeof(Block);                                                                                \
    }                                                                                                                 \
    size_t quantize_##name##_unweighted(const float *rows, void *out, int64_t n_rows, int64_t n_per_row,              \
                                        const float *weights) {                                                       \
        (void)weights;                                                                                                \
        return quantize_##name(rows, out, n_rows, n_per_row, NULL);                                                   \
    }

KERNEL(iq3_xxs, BlockIQ3XXS, table_xxs, 15, 1, 1e-8f, 0, write_iq3_xxs)
KERNEL(iq3_s, BlockIQ3S, table_s, 9, 0, FLT_TRUE_MIN, 1, write_iq3_s)
