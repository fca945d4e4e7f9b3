// IQ2_XXS, IQ2_XS and IQ2_S: a sub-block's candidate scales, one in each lane of a vector.
//
// ggml tries 13 (IQ2_XXS) or 19 scales per sub-block. For each it rounds groups of eight numbers to a point with one of three
// levels per number, and if that point is not on the type's grid, takes the best of the grid's points near it. From one scale to
// the next the rounded point rarely changes: lanes that share one search its neighbours together, and the cost of a level in a
// lane is computed once. Most neighbours need not be compared at all, see `beaten`. Every number goes through ggml's operations in
// their order, each rounded on its own, so the results are equal to the bit; the loader tests that against the library in use.
// Search and block layout: ggml/src/ggml-quants.c and ggml-common.h of llama.cpp.

#include <float.h>
#include <stdlib.h>

#include "fits.h"

enum { EIGHT = 8, LEVELS = 3, POINTS = 6561, OFF_GRID = 1 << 30 };

// A grid point: two bits per level, its index from bit 16 on; and where the costs of its levels are stored: the sum for the first
// two, then one each.
typedef struct {
    int32_t point;
    uint8_t cost[EIGHT - 1];
} Point;

enum { COSTS = LEVELS * LEVELS + LEVELS * (EIGHT - 2), MOST_POINTS = 1024 };

// A range of places in the grid. For a point on the grid: its own place as `first`, and no count.
typedef struct { int32_t first, count; } List;

// For each point (its levels are the digits in base three) the grid points near it, nearest first: the whole list, and those that
// can be best if no number is near the border between two levels.
typedef struct {
    List near[POINTS], whole[POINTS];
    Point grid[MOST_POINTS];
    uint16_t *places;
} Table;

static Table table_xxs, table_xs, table_s;

// Whether the farther of two neighbours is never better: for every number the nearer one has the farther one's level or a closer
// one. That holds to the bit, because rounding preserves order, unless a number is on a border; the nearer one wins ties.
static inline int beaten(const uint8_t *farther, const uint8_t *nearer, const uint8_t *sought) {
    for (int i = 0; i < EIGHT; ++i) {
        const int far = farther[i], near = nearer[i], own = sought[i];
        if (near != far && near != own && (near != 1 || own == far || own == 1)) return 0;
    }
    return 1;
}

// Builds lists of the grid points at the `wanted` least distances that occur; equally distant ones in the grid's order.
static int build(Table *table, const int size, const int wanted, const uint8_t *levels) {
    enum { FARTHEST = EIGHT * (LEVELS - 1) * (LEVELS - 1) };
    if (table->places) return 0;
    for (int j = 0; j < size; ++j) {
        Point *point = &table->grid[j];
        const uint8_t *own = levels + EIGHT * j;
        point->point = j << 16;
        point->cost[0] = own[0] * LEVELS + own[1];
        for (int i = 0; i < EIGHT; ++i) {
            if (own[i] >= LEVELS) return 1;
            point->point |= own[i] << 2 * i;
            if (i > 1) point->cost[i - 1] = LEVELS * LEVELS + LEVELS * (i - 2) + own[i];
        }
    }
    // The short lists are together, the others after them. Allocated for the longest possible lists: unused memory is not touched.
    int32_t used_near = 0, used = POINTS * size;
    uint16_t *places = malloc(2 * sizeof *places * used);
    if (!places) return 1;
    for (int point = 0; point < POINTS; ++point) {
        uint8_t sought[EIGHT];
        int16_t at[FARTHEST + 1], after[MOST_POINTS];  // the first grid point at a distance, and the next as far as this one
        List *whole = &table->whole[point], *near = &table->near[point];
        for (int i = 0, rest = point; i < EIGHT; ++i, rest /= LEVELS) sought[i] = rest % LEVELS;
        memset(at, -1, sizeof at);
        for (int j = size - 1; j >= 0; --j) {
            int far = 0;
            for (int i = 0; i < EIGHT; ++i) far += (sought[i] - levels[EIGHT * j + i]) * (sought[i] - levels[EIGHT * j + i]);
            after[j] = at[far];
            at[far] = j;
        }
        *whole = *near = (List){at[0], 0};
        if (at[0] >= 0) continue;
        *whole = (List){used, 0};
        *near = (List){used_near, 0};
        for (int far = 1, have = 0; have < wanted && far <= FARTHEST; ++far) {
            have += at[far] >= 0;
            for (int j = at[far]; j >= 0; j = after[j]) {
                int lost = 0;
                for (int k = near->first; k < used_near && !lost; ++k)
                    lost = beaten(levels + EIGHT * j, levels + EIGHT * places[k], sought);
                if (!lost) places[used_near++] = j;
                places[used++] = j;
            }
        }
        whole->count = used - whole->first;
        near->count = used_near - near->first;
    }
    // All zeros become the lowest point, so that must be on the grid.
    if (table->near[0].count) {
        free(places);
        return 1;
    }
    table->places = places;
    return 0;
}

// Must be called before a type is quantised, with the levels (0 to 2, eight per point) of the library's own grid: `which` is 256
// for IQ2_XXS, 512 for IQ2_XS, 1024 for IQ2_S, the number of points. Returns 0 if the table can be used.
int imatrix_runner_iq2_tables(int which, const uint8_t *levels) {
    return which == 256    ? build(&table_xxs, 256, 2, levels)
           : which == 512  ? build(&table_xs, 512, 2, levels)
           : which == 1024 ? build(&table_s, 1024, 1, levels)
                           : 1;
}

// Sub-blocks of `sub` numbers, one in each lane: absolute values, weights, square roots of the weights; and the result: scale, and
// point and signs for each eight numbers. `none`: lanes whose numbers are all zero.
enum { MOST = 32, MOST_GROUPS = MOST / EIGHT, MOST_TRIES = 19, BATCHES = 16 / LANES };

typedef struct {
    floats x[MOST], w[MOST], root[MOST], max, scale;
    ints signs[MOST_GROUPS], point[MOST_GROUPS], none;
} Batch;

// Super-blocks processed together: one, or two if their sub-blocks fit in one vector.
typedef struct {
    const float *x[2], *weights[2];
    float spread[2];
    Batch batches[BATCHES];
} Supers;

static inline int in_unit(const int sub) { return LANES * sub > SUPER ? 2 : 1; }

// A vector of candidates: lanes of sub-block `one`, then of `other`; their scales; and for each eight numbers the rounded points,
// the runs of equal ones, and the lists to search.
typedef struct {
    int one, other, runs[MOST_GROUPS], start[MOST_GROUPS][LANES + 1];
    const List *lists[MOST_GROUPS];
    ints next, point[MOST_GROUPS];
    floats scale;
} Candidates;

// All candidates, sub-block after sub-block, and their sums.
typedef struct {
    Candidates at[MOST_TRIES];
    floats sum_qx[MOST_TRIES], sum_q2[MOST_TRIES];
} Tried;

static inline floats greater(floats a, floats b) {
    floats result;
    for (int k = 0; k < LANES; ++k) result[k] = a[k] > b[k] ? a[k] : b[k];
    return result;
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

// Gathers a vector of sub-blocks, beginning with number `from`.
static inline void gather_batch(Batch *batch, const Supers *supers, const int sub, const int from) {
    const int each = SUPER / sub;
    floats spread;
    for (int k = 0; k < LANES; ++k) {
        const int s = (from + k) / each, place = (from + k) % each * sub;
        const float *x = supers->x[s] + place, *w = supers->weights[s];
        spread[k] = supers->spread[s];
        for (int i = 0; i < sub; ++i) batch->x[i][k] = x[i];
        for (int i = 0; w && i < sub; ++i) batch->w[i][k] = w[place + i];
    }
    for (int i = 0; i < sub; ++i) {
        const floats squared = batch->x[i] * batch->x[i];
        batch->w[i] = supers->weights[0] ? batch->w[i] * square_root(spread + squared) : 0.25f * spread + squared;
        batch->root[i] = square_root(batch->w[i]);
    }
}

// Splits numbers into absolute values and signs. If the signs must be even, the number with the least weighted square of each eight
// changes its sign where they are not.
static inline void take_signs(Batch *batch, const int sub, const int even) {
    for (int g = 0; g < sub / EIGHT; ++g) {
        floats *x = batch->x + EIGHT * g, least = splat(0);
        ints signs = splat_int(0), odd = splat_int(0), lightest = splat_int(0);
        for (int i = 0; i < EIGHT; ++i) {
            const floats weight = batch->w[EIGHT * g + i] * x[i] * x[i];
            const ints negative = ~(x[i] >= 0), lighter = i ? weight < least : splat_int(-1);
            least = select_float(lighter, weight, least);
            lightest = select_int(lighter, splat_int(i), lightest);
            odd ^= negative;
            signs |= negative & 1 << i;
            x[i] = select_float(negative, -x[i], x[i]);
        }
        for (int i = 0; even && i < EIGHT; ++i) {
            const ints changed = odd & (lightest == i);
            x[i] = select_float(changed, -x[i], x[i]);
            signs ^= changed & 1 << i;
        }
        batch->signs[g] = signs;
    }
    batch->max = batch->x[0];
    for (int i = 1; i < sub; ++i) batch->max = greater(batch->max, batch->x[i]);
}

// The points that eight numbers are rounded to; `sure`: lanes where no number is near the border between two levels.
static inline ints round_off(const floats inverse, const floats *x, ints *sure) {
    floats worst = splat(0);
    ints points = splat_int(0);
#pragma GCC unroll 8
    for (int i = EIGHT - 1; i >= 0; --i) {
        const floats value = 0.5f * (inverse * x[i] - 1);
        const ints near = round_even(value);
        worst = greater(absolute(value - to_float(near)), worst);
        points = points + points + points + to_level(near);
    }
    *sure = worst < 0.49998f;
    return points;
}

// For extreme scales rounding does not preserve order.
static inline ints usual(const floats scale) { return (scale > 1e-30f) & (scale < 1e30f); }

// The cost of each level for eight numbers.
static inline void weigh_levels(floats *cost, const floats scale, const floats *x, const floats *rooted) {
    const floats size[LEVELS] = {scale, scale * 3.f, scale * 5.f};
    floats first[2 * LEVELS];
#pragma GCC unroll 8
    for (int i = 0; i < EIGHT; ++i)
#pragma GCC unroll 3
        for (int l = 0; l < LEVELS; ++l) {
            const floats diff = size[l] - x[i], own = rooted[i] * diff * diff;
            if (i < 2) first[LEVELS * i + l] = own;
            else cost[LEVELS * (LEVELS + i - 2) + l] = own;
        }
#pragma GCC unroll 9
    for (int l = 0; l < LEVELS * LEVELS; ++l) cost[l] = first[l / LEVELS] + first[LEVELS + l % LEVELS];
}

// The grid point of the least cost in every lane, the first of equals.
static inline ints search(const Table *table, const List list, const floats *cost) {
    if (!list.count) return splat_int(table->grid[list.first].point);
    const uint16_t *places = table->places + list.first;
    floats least = splat(FLT_MAX);
    ints best = splat_int(table->grid[places[0]].point);
    for (int j = 0; j < list.count; ++j) {
        const Point *near = &table->grid[places[j]];
        floats sum = cost[near->cost[0]];
#pragma GCC unroll 8
        for (int i = 1; i < EIGHT - 1; ++i) sum += cost[near->cost[i]];
        best = select_int(sum < least, splat_int(near->point), best);
        least = lesser(sum, least);
    }
    return best | OFF_GRID;
}

// The same for one lane. Bits of numbers >= 0 order like the numbers: with the place in the list below them the minimum needs no
// branch.
static inline int search_one(const Table *table, const List list, const floats *cost, int k) {
    if (!list.count) return table->grid[list.first].point;
    const uint16_t *places = table->places + list.first;
    uint64_t least = UINT64_MAX;
    for (int j = 0; j < list.count; ++j) {
        const Point *near = &table->grid[places[j]];
        float sum = 0.f + cost[near->cost[0]][k];
        uint32_t bits;
#pragma GCC unroll 8
        for (int i = 1; i < EIGHT - 1; ++i) sum += cost[near->cost[i]][k];
        memcpy(&bits, &sum, sizeof bits);
        const uint64_t key = (uint64_t)bits << 32 | j;
        least = key < least ? key : least;
    }
    return table->grid[places[(uint32_t)least]].point;
}

static inline void add_fit(const floats *x, const floats *w, const ints point, floats *sum_qx, floats *sum_q2) {
    for (int i = 0; i < EIGHT; ++i) {
        const floats q = to_float((point >> 2 * i & 3) * 2 + 1);
        *sum_qx += w[i] * x[i] * q;
        *sum_q2 += w[i] * q * q;
    }
}

// Lanes for a sub-block's candidates: at least a vector, so that a vector has candidates of at most two sub-blocks.
static inline int places(const int reach) { return 2 * reach + 1 > LANES ? 2 * reach + 1 : LANES; }

// Tries all candidate scales of all sub-blocks: `reach` on each side of the one that maps `top` to the highest level. First rounds
// all points, then searches near them, so that the lengths of the lists are known and branches are predicted.
static inline void try_all(Tried *tried, const Batch *batch, const floats top, const int sub, const Table *table, const int reach) {
    const int each = places(reach), groups = sub / EIGHT;
    for (int c = 0; c < each; ++c) {
        Candidates *at = &tried->at[c];
        // Lanes up to a border are of one sub-block, the rest of the next.
        const int one = LANES * c / each, other = one + 1 < LANES ? one + 1 : one;
        ints lane;
        for (int k = 0; k < LANES; ++k) lane[k] = LANES * c - each * one + k;
        const ints next = lane >= each, step = lane - (next & each) - reach;
        const floats level = 5.f + to_float(select_int(step < reach, step, splat_int(reach))) * 0.1f;
        const floats inverse = level / select_float(next, splat(top[other]), splat(top[one]));
        at->one = one, at->other = other;
        at->next = next;
        at->scale = 1 / inverse;
        for (int g = 0; g < groups; ++g) {
            ints sure;
            floats x[EIGHT];
            for (int i = 0; i < EIGHT; ++i)
                x[i] = select_float(next, splat(batch->x[EIGHT * g + i][other]), splat(batch->x[EIGHT * g + i][one]));
            const ints points = round_off(inverse, x, &sure);
            // Candidates next to one another mostly share their rounded point.
            int runs = 1;
            at->point[g] = points;
            at->start[g][0] = points[0];
            for (int k = 1; k < LANES; ++k) {
                at->start[g][runs] = points[k];
                runs += points[k] != points[k - 1];
            }
            at->runs[g] = runs;
            at->lists[g] = any(~(sure & usual(at->scale))) ? table->whole : table->near;
        }
    }
    for (int c = 0; c < each; ++c) {
        Candidates *at = &tried->at[c];
        const int one = at->one, other = at->other;
        floats sum_qx = splat(0), sum_q2 = splat(0);
        for (int g = 0; g < groups; ++g) {
            floats cost[COSTS], x[EIGHT], w[EIGHT], rooted[EIGHT];
            for (int i = 0; i < EIGHT; ++i) {
                const int n = EIGHT * g + i;
                x[i] = select_float(at->next, splat(batch->x[n][other]), splat(batch->x[n][one]));
                w[i] = select_float(at->next, splat(batch->w[n][other]), splat(batch->w[n][one]));
                rooted[i] = select_float(at->next, splat(batch->root[n][other]), splat(batch->root[n][one]));
            }
            weigh_levels(cost, at->scale, x, rooted);
            ints found = splat_int(0);
            for (int run = 0; run < at->runs[g]; ++run) {
                const int point = at->start[g][run];
                found = select_int(at->point[g] == point, search(table, at->lists[g][point], cost), found);
            }
            at->point[g] = found;
            add_fit(x, w, found, &sum_qx, &sum_q2);
        }
        tried->sum_qx[c] = sum_qx;
        tried->sum_q2[c] = sum_q2;
    }
}

// Takes the best candidate of every sub-block that is not `none`, then rounds again with its best scale: all points (IQ2_XXS), or
// those that were not on the grid.
static inline void choose_scales(Batch *batch, const Tried *tried, floats scale, const int sub, const Table *table, const int reach,
                                 const int all_groups) {
    const int each = places(reach), groups = sub / EIGHT;
    floats best = splat(0);
    ints winner = splat_int(-1), off = splat_int(0);
    for (int n = 0; n <= 2 * reach; ++n) {
        floats qx, q2;
        for (int k = 0; k < LANES; ++k) {
            qx[k] = ((const float *)tried->sum_qx)[each * k + n];
            q2[k] = ((const float *)tried->sum_q2)[each * k + n];
        }
        const ints better = (q2 > 0) & (qx * qx > best * q2);
        scale = select_float(better, qx / q2, scale);
        best = select_float(better, scale * qx, best);
        winner = select_int(better, splat_int(n), winner);
    }
    for (int g = 0; g < groups; ++g) {
        for (int k = 0; k < LANES; ++k) {
            const int n = each * k + winner[k];
            batch->point[g][k] = winner[k] < 0 ? (all_groups ? OFF_GRID : 0) : tried->at[n / LANES].point[g][n % LANES];
        }
        if (all_groups) batch->point[g] |= OFF_GRID;
        off |= batch->point[g];
    }
    off = ((off & OFF_GRID) != 0) & (scale > 0) & ~batch->none;
    floats sum_qx = splat(0), sum_q2 = splat(0);
    for (int g = 0; g < groups; ++g) {
        floats cost[COSTS];
        ints sure;
        const ints points = round_off(1 / scale, batch->x + EIGHT * g, &sure), again = off & batch->point[g] & OFF_GRID;
        sure &= usual(scale);
        weigh_levels(cost, scale, batch->x + EIGHT * g, batch->root + EIGHT * g);
        for (int k = 0; k < LANES; ++k)
            if (again[k]) batch->point[g][k] = search_one(table, (sure[k] ? table->near : table->whole)[points[k]], cost, k);
        add_fit(batch->x + EIGHT * g, batch->w + EIGHT * g, batch->point[g], &sum_qx, &sum_q2);
    }
    scale = select_float(off & (sum_q2 > 0), sum_qx / sum_q2, scale);
    for (int g = 0; g < groups; ++g) {
        batch->signs[g] ^= (scale < 0) & 255;
        batch->signs[g] &= ~batch->none;
        batch->point[g] &= ~batch->none;
    }
    batch->scale = select_float(batch->none, splat(0), absolute(scale));
}

typedef struct { uint16_t d, qs[32]; } BlockIQ2XXS;
typedef struct { uint16_t d, qs[32]; uint8_t scales[8]; } BlockIQ2XS;
typedef struct { uint16_t d; uint8_t qs[32], signs[32], qh[8], scales[8]; } BlockIQ2S;

static inline int grid_index(const Batch *batches, int g, int j) { return batches[j / LANES].point[g][j % LANES] >> 16 & 1023; }
static inline int signs(const Batch *batches, int g, int j) { return batches[j / LANES].signs[g][j % LANES]; }

// Stores the scale, times `fudge`, and those of the `n` sub-blocks from `first` on in four bits; returns 0 if all are zero.
static inline int store_scales(const Batch *batches, int first, int n, const float fudge, uint16_t *stored, int *scales) {
    float max = 0;
    for (int j = first; j < first + n; ++j) {
        const float scale = batches[j / LANES].scale[j % LANES];
        max = max > scale ? max : scale;
    }
    if (!max) return 0;
    const float d = max / 31, inverse = 1 / d;
    for (int j = first; j < first + n; ++j)
        *scales++ = clamp(round_even(0.5f * (inverse * batches[j / LANES].scale - 1)), 0, 15)[j % LANES];
    *stored = half(d * fudge);
    return 1;
}

static inline void write_iq2_xxs(BlockIQ2XXS *block, const Batch *batches, int first) {
    int scales[8];
    memset(block, 0, sizeof *block);
    if (!store_scales(batches, first, 8, 1, &block->d, scales)) return;
    for (int j = 0; j < 8; ++j) {
        uint32_t words[2] = {0, (uint32_t)scales[j] << 28};
        for (int g = 0; g < 4; ++g) {
            words[0] |= (uint32_t)grid_index(batches, g, first + j) << 8 * g;
            words[1] |= (uint32_t)(signs(batches, g, first + j) & 127) << 7 * g;
        }
        memcpy(block->qs + 4 * j, words, sizeof words);
    }
}

static inline void write_iq2_xs(BlockIQ2XS *block, const Batch *batches, int first) {
    int scales[16];
    memset(block, 0, sizeof *block);
    if (!store_scales(batches, first, 16, 1, &block->d, scales)) return;
    for (int j = 0; j < 16; ++j) {
        block->scales[j / 2] |= scales[j] << j % 2 * 4;
        for (int g = 0; g < 2; ++g)
            block->qs[2 * j + g] = grid_index(batches, g, first + j) | (signs(batches, g, first + j) & 127) << 9;
    }
}

// Indices and signs are stored even if all scales are zero.
static inline void write_iq2_s(BlockIQ2S *block, const Batch *batches, int first) {
    int scales[16] = {0};
    memset(block, 0, sizeof *block);
    store_scales(batches, first, 16, 0.9875f, &block->d, scales);
    for (int j = 0; j < 16; ++j) {
        block->scales[j / 2] |= scales[j] << j % 2 * 4;
        for (int g = 0; g < 2; ++g) {
            const int n = 2 * j + g, index = grid_index(batches, g, first + j);
            block->qs[n] = index & 255;
            block->qh[n / 4] |= index >> 8 << n % 4 * 2;
            block->signs[n] = signs(batches, g, first + j);
        }
    }
}

// IQ2_XXS and IQ2_XS need even signs, IQ2_S does not; only IQ2_XXS fits a scale before it tries others.
static inline void quantize(Batch *batch, Tried *tried, const Table *table, const int sub, const int even, const float tiny) {
    const int fitted = sub == MOST, reach = fitted ? 6 : 9;
    take_signs(batch, sub, even);
    batch->none = batch->max < tiny;
    floats top = batch->max, scale = batch->max / 5;
    if (fitted) {
        ints l[MOST];
        scale = fit_positive(MOST, 4, batch->x, batch->w, l);
        top = scale * 3;
        batch->none |= top <= 0;
    }
    try_all(tried, batch, select_float(batch->none, splat(1), top), sub, table, reach);
    choose_scales(batch, tried, scale, sub, table, reach, fitted);
}

// Loads the super-blocks from `first` on that are processed together; beyond the end the last one again.
static inline void load_unit(Supers *supers, const int sub, const float *rows, const float *weights, int64_t n_per_row,
                             int64_t first, int64_t count, const float factor) {
    for (int s = 0; s < in_unit(sub); ++s) {
        const int64_t block = first + (s < count ? s : count - 1);
        const float *x = rows + block * SUPER;
        float squares = 0;
        for (int i = 0; i < SUPER; ++i) squares += x[i] * x[i];
        supers->x[s] = x;
        supers->weights[s] = weights ? weights + block * SUPER % n_per_row : NULL;
        supers->spread[s] = factor * squares / SUPER;
    }
}

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights): ggml's own signature. Returns 0 if the type's table
// was not built.
#define KERNEL(name, Block, table, sub, even, tiny, factor, write)                                                    \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t blocks = table.places ? n_rows * n_per_row / SUPER : 0;                                         \
        Supers supers;                                                                                                \
        Tried tried;                                                                                                  \
        for (int64_t first = 0; first < blocks; first += in_unit(sub)) {                                              \
            const int64_t count = blocks - first < in_unit(sub) ? blocks - first : in_unit(sub);                      \
            load_unit(&supers, sub, rows, weights, n_per_row, first, count, factor);                                  \
            for (int b = 0; LANES * b < in_unit(sub) * SUPER / sub; ++b) {                                            \
                gather_batch(&supers.batches[b], &supers, sub, LANES * b);                                            \
                quantize(&supers.batches[b], &tried, &table, sub, even, tiny);                                        \
            }                                                                                                         \
            for (int s = 0; s < count; ++s) write((Block *)out + first + s, supers.batches, SUPER / sub * s);         \
        }                                                                                                             \
        return blocks * sizeof(Block);                                                                                \
    }

KERNEL(iq2_xxs, BlockIQ2XXS, table_xxs, 32, 1, 1e-15f, 1, write_iq2_xxs)
KERNEL(iq2_xs, BlockIQ2XS, table_xs, 16, 1, 1e-15f, 1, write_iq2_xs)
KERNEL(iq2_s, BlockIQ2S, table_s, 16, 0, 1e-8f, 2, write_iq2_s)

size_t quantize_iq2_s_unweighted(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {
    (void)weights;
    return quantize_iq2_s(rows, out, n_rows, n_per_row, NULL);
}
