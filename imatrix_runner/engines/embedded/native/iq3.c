// IQ3_XXS and IQ3_S, with weights or without: a super-block's candidate scales side by side, one in each lane of a vector.
//
// Per sub-block ggml tries 31 (IQ3_XXS) or 19 (IQ3_S) scales. For each it rounds groups of four numbers to a point of eight levels
// a number, and takes, where that point is not on the type's grid, the nearest of the grid's points close by. Along the scales the
// rounded point changes but rarely: the lanes that share one go through its neighbours together, and what a level costs in a lane
// is computed once. Every number goes through ggml's operations in their order, each rounded on its own, so the results are the
// same to the bit; whoever loads this proves it against the library in use before relying on it. What is searched and how blocks
// are laid out: ggml/src/ggml-quants.c and ggml-common.h of llama.cpp.

#include <float.h>
#include <stdlib.h>

#include "lanes.h"

enum { SUB = 32, SUBS = SUPER / SUB, GROUPS = SUB / 4, LEVELS = 8, POINTS = 4096, OFF_GRID = 0x8000 };

// A point is four levels of three bits. Its list: itself alone where it is on the grid, else the grid's points next to it, nearest
// first and marked OFF_GRID.
typedef struct {
    struct { uint16_t first, count; } of[POINTS];
    uint16_t index[POINTS], *lists;
} Table;

static Table table_xxs, table_s;

static inline int level(int point, int i) { return point >> 3 * i & 7; }

// Lists of the points at the `wanted` least distances that occur; of equally distant ones the first of the grid comes first.
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
    // What is all zero becomes the lowest point; and places in the lists have sixteen bits.
    if (lists[0] & OFF_GRID || used > UINT16_MAX) {
        free(lists);
        return 1;
    }
    table->lists = realloc(lists, used * sizeof *lists);
    return !table->lists;
}

// To be called before a type is quantised, with the levels (0 to 7, four per point) of the library's own grid: of the 256 points
// of IQ3_XXS or the 512 of IQ3_S. Returns 0 if the table can be used.
int imatrix_runner_iq3_tables(int which, const uint8_t *levels) {
    return which == 256 ? build(&table_xxs, 256, 2, levels) : which == 512 ? build(&table_s, 512, 3, levels) : 1;
}

// The numbers of a super-block: their sizes, weights, the weights' roots; and what was chosen for each sub-block.
typedef struct {
    float x[SUPER], w[SUPER], root[SUPER], max[SUBS], scale[SUBS];
    uint16_t point[SUBS][GROUPS];
    uint32_t signs[SUBS];
} Super;

// What the candidates of all sub-blocks came to, sub-block after sub-block, in at most 256 lanes.
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
            weight *= root(spread + value * value);
        } else {
            weight = value * value;
        }
        const floats rooted = root(weight);
        memcpy(super->w + i, &weight, sizeof weight);
        memcpy(super->root + i, &rooted, sizeof rooted);
    }
}

// A key in the order of numbers >= 0, with 32 bits left below for what decides between equals: the least is found without a branch.
static inline uint64_t order(float value) {
    uint32_t bits;
    value += 0.f;
    memcpy(&bits, &value, sizeof bits);
    return (uint64_t)bits << 32;
}

// Sizes and signs. Where the signs have to be even, of every eight numbers one changes its sign if they are not: the lightest.
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

// Lane by lane, which compilers make the machine's minimum and maximum of.
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

// The grid point of the least cost in every lane, the first of equals. Candidates next to one another mostly share their rounded
// point: each run of them goes through that point's list once.
static inline ints search(const Table *table, const ints points, const floats (*cost)[LEVELS]) {
    int start[LANES + 1], runs = 1;
    ints found = whole(0);
    start[0] = points[0];
    for (int k = 1; k < LANES; ++k) {
        start[runs] = points[k];
        runs += points[k] != points[k - 1];
    }
    for (int run = 0; run < runs; ++run) {
        const int point = start[run], count = table->of[point].count;
        const uint16_t *list = table->lists + table->of[point].first;
        ints best = whole(list[0]);
        floats least = add_up(cost, list[0]);
        for (int j = 1; j < count; ++j) {
            const floats sum = add_up(cost, list[j]);
            best = choose(sum < least, whole(list[j]), best);
            least = lesser(sum, least);
        }
        found = choose(points == point, best, found);
    }
    return found;
}

// All candidate scales of all sub-blocks: `reach` on each side of the one that takes the largest number to the highest level.
static inline void try_all(Tried *tried, const Super *super, const Table *table, const int reach) {
    const int each = 2 * reach + 1, total = SUBS * each;
    for (int c = 0; LANES * c < total; ++c) {
        // Lanes up to `border` are of sub-block `one`, the rest of the next: a vector is shorter than a sub-block's candidates.
        const int one = LANES * c / each, done = LANES * c % each, border = each - done, other = one + 1 < SUBS ? one + 1 : one;
        ints next;
        floats step, size[LEVELS], sum_qx = all(0), sum_q2 = all(0);
        for (int k = 0; k < LANES; ++k) {
            const int n = k < border ? done + k : other > one ? k - border : each - 1;
            step[k] = (float)(n - reach);
            next[k] = k < border ? 0 : -1;
        }
        const floats max = pick(next, all(super->max[other]), all(super->max[one]));
        const floats inverse = ((float)(2 * LEVELS - 1) + step * 0.2f) / max, scale = 1 / inverse;
        for (int l = 0; l < LEVELS; ++l) size[l] = scale * (float)(2 * l + 1);
        for (int k = 0; k < GROUPS; ++k) {
            const int a = SUB * one + 4 * k, b = SUB * other + 4 * k;
            floats cost[4][LEVELS], w[4], wx[4];
            ints points = whole(0);
            for (int i = 0; i < 4; ++i) {
                const floats x = pick(next, all(super->x[b + i]), all(super->x[a + i]));
                const floats rooted = pick(next, all(super->root[b + i]), all(super->root[a + i]));
                w[i] = pick(next, all(super->w[b + i]), all(super->w[a + i]));
                wx[i] = w[i] * x;
                points |= to_level(nearest(0.5f * (inverse * x - 1))) << 3 * i;
                for (int l = 0; l < LEVELS; ++l) {
                    const floats diff = size[l] - x;
                    cost[i][l] = rooted * diff * diff;
                }
            }
            const ints found = tried->point[k][c] = search(table, points, cost);
            for (int i = 0; i < 4; ++i) {
                const floats q = real((found >> 3 * i & 7) * 2 + 1);
                sum_qx += wx[i] * q;
                sum_q2 += w[i] * q * q;
            }
        }
        tried->sum_qx[c] = sum_qx;
        tried->sum_q2[c] = sum_q2;
    }
}

// The same for one value: to the nearest whole number, then 0 to `high`.
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

// The best candidate of every sub-block; then, if its points were not all on the grid, once more with the scale that fits it best:
// all groups (IQ3_S) or those whose points were not (IQ3_XXS).
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

// The scale that is stored, times `fudge`, and the sub-blocks' in four bits; returns 0 and leaves them where all are zero.
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
        if (!super->max[j]) continue;  // ggml leaves no place for it: what follows moves up
        for (int k = 0; k < GROUPS; ++k) {
            const int index = table_s.index[super->point[j][k]];
            block->qs[GROUPS * place + k] = index & 255;
            block->qh[j] |= index >> 8 << k;
        }
        for (int k = 0; k < 4; ++k) block->signs[4 * place + k] = super->signs[j] >> 8 * k;
        ++place;
    }
}

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights): ggml's own signature; without weights where they are
// NULL. Returns 0 where the type's table was not built.
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
