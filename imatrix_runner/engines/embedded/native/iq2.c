// IQ2_XXS, IQ2_XS and IQ2_S: a sub-block's candidate scales side by side, one in each lane of a vector.
//
// Per sub-block ggml tries 13 (IQ2_XXS) or 19 scales. For each it rounds groups of eight numbers to a point of three levels a
// number, and takes, where that point is not on the type's grid, the nearest of the grid's points close by. Along the scales the
// rounded point changes but rarely: the lanes that share one go through its neighbours together, and what a level costs in a lane
// is computed once. And most neighbours need no look at all, see `beaten`. Every number goes through ggml's operations in their
// order, each rounded on its own, so the results are the same to the bit; whoever loads this proves it against the library in use
// before relying on it. What is searched and how blocks are laid out: ggml/src/ggml-quants.c and ggml-common.h of llama.cpp.

#include <float.h>
#include <stdlib.h>

#include "fits.h"

enum { EIGHT = 8, LEVELS = 3, POINTS = 6561, OFF_GRID = 1 << 30 };

// A point of the grid: two bits per level and from bit 16 on its index. And where what its levels cost lies: the first two's sum,
// then one after the other.
typedef struct {
    int32_t point;
    uint8_t cost[EIGHT - 1];
} Point;

enum { COSTS = LEVELS * LEVELS + LEVELS * (EIGHT - 2), MOST_POINTS = 1024 };

// Places in the grid; of what is on the grid itself that place alone, and no count.
typedef struct { int32_t first, count; } List;

// For each point sought, its levels the digits to base three, the grid's points next to it, nearest first: the whole list, and
// those that can be best when no number is near the border of two levels.
typedef struct {
    List near[POINTS], whole[POINTS];
    Point grid[MOST_POINTS];
    uint16_t *places;
} Table;

static Table table_xxs, table_xs, table_s;

// Whether of two neighbours the farther one never is the better: in no number it is on the nearer one's level or closer to what
// is sought. That holds to the bit, as rounding keeps order, unless a number is on a border; and equals go to the nearer one.
static inline int beaten(const uint8_t *farther, const uint8_t *nearer, const uint8_t *sought) {
    for (int i = 0; i < EIGHT; ++i) {
        const int far = farther[i], near = nearer[i], own = sought[i];
        if (near != far && near != own && (near != 1 || own == far || own == 1)) return 0;
    }
    return 1;
}

// Lists of the points at the `wanted` least distances that occur; of equally distant ones the first of the grid comes first.
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
    // The short lists lie together, the others behind them. Room for the longest there could be: what is not used is not touched.
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
    // What is all zero becomes the lowest point.
    if (table->near[0].count) {
        free(places);
        return 1;
    }
    table->places = places;
    return 0;
}

// To be called before a type is quantised, with the levels (0 to 2, eight per point) of the library's own grid: of the 256 points
// of IQ2_XXS, the 512 of IQ2_XS or the 1024 of IQ2_S. Returns 0 if the table can be used.
int imatrix_runner_iq2_tables(int which, const uint8_t *levels) {
    return which == 256    ? build(&table_xxs, 256, 2, levels)
           : which == 512  ? build(&table_xs, 512, 2, levels)
           : which == 1024 ? build(&table_s, 1024, 1, levels)
                           : 1;
}

// Sub-blocks of `sub` numbers, one in each lane. The numbers' sizes, weights and the weights' roots; and what was chosen: scale, and
// for each eight numbers point and signs. `none` where nothing is: all is zero.
enum { MOST = 32, MOST_GROUPS = MOST / EIGHT, MOST_TRIES = 19, BATCHES = 16 / LANES };

typedef struct {
    floats x[MOST], w[MOST], root[MOST], max, scale;
    ints signs[MOST_GROUPS], point[MOST_GROUPS], none;
} Batch;

// Super-blocks that go together: one, or two where their sub-blocks fit in one vector.
typedef struct {
    const float *x[2], *weights[2];
    float spread[2];
    Batch batches[BATCHES];
} Supers;

static inline int in_unit(const int sub) { return LANES * sub > SUPER ? 2 : 1; }

// A vector of candidates: lanes of sub-block `one`, then of `other`. Their scales; and for each eight numbers the points, which they
// are, and which lists to go through.
typedef struct {
    int one, other, runs[MOST_GROUPS], start[MOST_GROUPS][LANES + 1];
    const List *lists[MOST_GROUPS];
    ints next, point[MOST_GROUPS];
    floats scale;
} Candidates;

// All candidates, sub-block after sub-block, and what they came to.
typedef struct {
    Candidates at[MOST_TRIES];
    floats sum_qx[MOST_TRIES], sum_q2[MOST_TRIES];
} Tried;

static inline floats greater(floats a, floats b) {
    floats result;
    for (int k = 0; k < LANES; ++k) result[k] = a[k] > b[k] ? a[k] : b[k];
    return result;
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

// A vector of sub-blocks, the first of them the `from`th.
static inline void fetch(Batch *batch, const Supers *supers, const int sub, const int from) {
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
        batch->w[i] = supers->weights[0] ? batch->w[i] * root(spread + squared) : 0.25f * spread + squared;
        batch->root[i] = root(batch->w[i]);
    }
}

// Sizes and signs. Where the signs have to be even, of every eight numbers one changes its sign if they are not: the lightest.
static inline void take_signs(Batch *batch, const int sub, const int even) {
    for (int g = 0; g < sub / EIGHT; ++g) {
        floats *x = batch->x + EIGHT * g, least = all(0);
        ints signs = whole(0), odd = whole(0), lightest = whole(0);
        for (int i = 0; i < EIGHT; ++i) {
            const floats weight = batch->w[EIGHT * g + i] * x[i] * x[i];
            const ints negative = ~(x[i] >= 0), lighter = i ? weight < least : whole(-1);
            least = pick(lighter, weight, least);
            lightest = choose(lighter, whole(i), lightest);
            odd ^= negative;
            signs |= negative & 1 << i;
            x[i] = pick(negative, -x[i], x[i]);
        }
        for (int i = 0; even && i < EIGHT; ++i) {
            const ints changed = odd & (lightest == i);
            x[i] = pick(changed, -x[i], x[i]);
            signs ^= changed & 1 << i;
        }
        batch->signs[g] = signs;
    }
    batch->max = batch->x[0];
    for (int i = 1; i < sub; ++i) batch->max = greater(batch->max, batch->x[i]);
}

// The points eight numbers are rounded to; `sure` where none is near the border of two levels.
static inline ints round_off(const floats inverse, const floats *x, ints *sure) {
    floats worst = all(0);
    ints points = whole(0);
#pragma GCC unroll 8
    for (int i = EIGHT - 1; i >= 0; --i) {
        const floats value = 0.5f * (inverse * x[i] - 1);
        const ints near = nearest(value);
        worst = greater(magnitude(value - real(near)), worst);
        points = points + points + points + to_level(near);
    }
    *sure = worst < 0.49998f;
    return points;
}

// Far from what a scale can be rounding does not keep order.
static inline ints usual(const floats scale) { return (scale > 1e-30f) & (scale < 1e30f); }

// What each level costs eight numbers.
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
    if (!list.count) return whole(table->grid[list.first].point);
    const uint16_t *places = table->places + list.first;
    floats least = all(FLT_MAX);
    ints best = whole(table->grid[places[0]].point);
    for (int j = 0; j < list.count; ++j) {
        const Point *near = &table->grid[places[j]];
        floats sum = cost[near->cost[0]];
#pragma GCC unroll 8
        for (int i = 1; i < EIGHT - 1; ++i) sum += cost[near->cost[i]];
        best = choose(sum < least, whole(near->point), best);
        least = lesser(sum, least);
    }
    return best | OFF_GRID;
}

// The same for one lane. The bits of numbers >= 0 order as the numbers do: with the place in the list below them there is nothing to
// branch on.
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
        const floats q = real((point >> 2 * i & 3) * 2 + 1);
        *sum_qx += w[i] * x[i] * q;
        *sum_q2 += w[i] * q * q;
    }
}

// How many lanes a sub-block's candidates take: at least a vector, for it to be of no more than two sub-blocks.
static inline int places(const int reach) { return 2 * reach + 1 > LANES ? 2 * reach + 1 : LANES; }

// All candidate scales of all sub-blocks: `reach` on each side of the one that takes `top` to the highest level. First all the
// points, then what is near them: what has to be looked at then is known in advance, and the machine need not guess.
static inline void try_all(Tried *tried, const Batch *batch, const floats top, const int sub, const Table *table, const int reach) {
    const int each = places(reach), groups = sub / EIGHT;
    for (int c = 0; c < each; ++c) {
        Candidates *at = &tried->at[c];
        // Lanes up to a border are of one sub-block, the rest of the next.
        const int one = LANES * c / each, other = one + 1 < LANES ? one + 1 : one;
        ints lane;
        for (int k = 0; k < LANES; ++k) lane[k] = LANES * c - each * one + k;
        const ints next = lane >= each, step = lane - (next & each) - reach;
        const floats level = 5.f + real(choose(step < reach, step, whole(reach))) * 0.1f;
        const floats inverse = level / pick(next, all(top[other]), all(top[one]));
        at->one = one, at->other = other;
        at->next = next;
        at->scale = 1 / inverse;
        for (int g = 0; g < groups; ++g) {
            ints sure;
            floats x[EIGHT];
            for (int i = 0; i < EIGHT; ++i)
                x[i] = pick(next, all(batch->x[EIGHT * g + i][other]), all(batch->x[EIGHT * g + i][one]));
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
        floats sum_qx = all(0), sum_q2 = all(0);
        for (int g = 0; g < groups; ++g) {
            floats cost[COSTS], x[EIGHT], w[EIGHT], rooted[EIGHT];
            for (int i = 0; i < EIGHT; ++i) {
                const int n = EIGHT * g + i;
                x[i] = pick(at->next, all(batch->x[n][other]), all(batch->x[n][one]));
                w[i] = pick(at->next, all(batch->w[n][other]), all(batch->w[n][one]));
                rooted[i] = pick(at->next, all(batch->root[n][other]), all(batch->root[n][one]));
            }
            weigh_levels(cost, at->scale, x, rooted);
            ints found = whole(0);
            for (int run = 0; run < at->runs[g]; ++run) {
                const int point = at->start[g][run];
                found = choose(at->point[g] == point, search(table, at->lists[g][point], cost), found);
            }
            at->point[g] = found;
            add_fit(x, w, found, &sum_qx, &sum_q2);
        }
        tried->sum_qx[c] = sum_qx;
        tried->sum_q2[c] = sum_q2;
    }
}

// The best candidate of every sub-block that is not `none`; then once more with the scale that fits it best: all points (IQ2_XXS) or
// those that were not on the grid.
static inline void choose_scales(Batch *batch, const Tried *tried, floats scale, const int sub, const Table *table, const int reach,
                                 const int all_groups) {
    const int each = places(reach), groups = sub / EIGHT;
    floats best = all(0);
    ints winner = whole(-1), off = whole(0);
    for (int n = 0; n <= 2 * reach; ++n) {
        floats qx, q2;
        for (int k = 0; k < LANES; ++k) {
            qx[k] = ((const float *)tried->sum_qx)[each * k + n];
            q2[k] = ((const float *)tried->sum_q2)[each * k + n];
        }
        const ints better = (q2 > 0) & (qx * qx > best * q2);
        scale = pick(better, qx / q2, scale);
        best = pick(better, scale * qx, best);
        winner = choose(better, whole(n), winner);
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
    floats sum_qx = all(0), sum_q2 = all(0);
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
    scale = pick(off & (sum_q2 > 0), sum_qx / sum_q2, scale);
    for (int g = 0; g < groups; ++g) {
        batch->signs[g] ^= (scale < 0) & 255;
        batch->signs[g] &= ~batch->none;
        batch->point[g] &= ~batch->none;
    }
    batch->scale = pick(batch->none, all(0), magnitude(scale));
}

typedef struct { uint16_t d, qs[32]; } BlockIQ2XXS;
typedef struct { uint16_t d, qs[32]; uint8_t scales[8]; } BlockIQ2XS;
typedef struct { uint16_t d; uint8_t qs[32], signs[32], qh[8], scales[8]; } BlockIQ2S;

static inline int grid_index(const Batch *batches, int g, int j) { return batches[j / LANES].point[g][j % LANES] >> 16 & 1023; }
static inline int signs(const Batch *batches, int g, int j) { return batches[j / LANES].signs[g][j % LANES]; }

// The scale that is stored, times `fudge`, and those of the `n` sub-blocks from `first` on in four bits; 0 where all are zero.
static inline int store_scales(const Batch *batches, int first, int n, const float fudge, uint16_t *stored, int *scales) {
    float max = 0;
    for (int j = first; j < first + n; ++j) {
        const float scale = batches[j / LANES].scale[j % LANES];
        max = max > scale ? max : scale;
    }
    if (!max) return 0;
    const float d = max / 31, inverse = 1 / d;
    for (int j = first; j < first + n; ++j)
        *scales++ = clamp(nearest(0.5f * (inverse * batches[j / LANES].scale - 1)), 0, 15)[j % LANES];
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

// Indices and signs stay even where all scales are zero.
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

// Whether the signs are even is what tells IQ2_XXS and IQ2_XS from IQ2_S; only IQ2_XXS fits a scale before it tries others.
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
    try_all(tried, batch, pick(batch->none, all(1), top), sub, table, reach);
    choose_scales(batch, tried, scale, sub, table, reach, fitted);
}

// The super-blocks from `first` on that go together; beyond the end the last one again.
static inline void gather(Supers *supers, const int sub, const float *rows, const float *weights, int64_t n_per_row, int64_t first,
                          int64_t count, const float factor) {
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

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights): ggml's own signature. Returns 0 where the type's table
// was not built.
#define KERNEL(name, Block, table, sub, even, tiny, factor, write)                                                    \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t blocks = table.places ? n_rows * n_per_row / SUPER : 0;                                         \
        Supers supers;                                                                                                \
        Tried tried;                                                                                                  \
        for (int64_t first = 0; first < blocks; first += in_unit(sub)) {                                              \
            const int64_t count = blocks - first < in_unit(sub) ? blocks - first : in_unit(sub);                      \
            gather(&supers, sub, rows, weights, n_per_row, first, count, factor);                                     \
            for (int b = 0; LANES * b < in_unit(sub) * SUPER / sub; ++b) {                                            \
                fetch(&supers.batches[b], &supers, sub, LANES * b);                                                   \
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
