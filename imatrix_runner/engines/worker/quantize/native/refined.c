// Refined searches: ggml's blocks, improved. Scales, minimums and the codes that follow from them are searched further for a lower sum
// of weight * (number - rounded)^2, with the weights of the imatrix as they are. A block is replaced only if its sum is lower than
// that of ggml's block. docs/kernels.md, "Refined search", has the steps.
//
// Several super-blocks or blocks in parallel, one in each lane of a vector. Sums run over a block in order, so that its bytes depend
// neither on the number of lanes nor on the other blocks.

#include "refined.h"

// What the codes of a type stand for: whole numbers from `low` to `high`, which are stored with `zero` added, or the table of IQ4.
typedef struct { int low, high, zero, table; } Codes;

// `n` sub-blocks of `size` numbers. A number is d * scale * value - low * min: integer scales from `least` to `most`, for an affine
// type minimums from 0 to `most`. A block with one scale (`n` is 1) has 1 for both.
typedef struct {
    int size, n, least, most, affine;
    Codes codes;
} Layout;

// How far a type is searched. reach: steps from every scale and minimum in the first turn; later: in the second; flips: whether
// scales of the other sign are tried, too; own: whether ggml's scales are a start. scan, from, step: candidates for the second start,
// see ideal_scale and ideal_affine; none if `scan` is 0.
typedef struct {
    int reach, later, flips, own, scan;
    float from, step;
} Effort;

// What one super-block or block in each lane is rounded with, and the error with the nearest codes.
typedef struct {
    floats d, low, error, scales[16], mins[16];
} Candidate;

// The value of the code nearest to x; of a valid code, too, if x is NaN.
INLINED floats nearest(const Codes codes, floats x) {
    if (!codes.table) return whole_between(x, codes.low, codes.high);
    ints value = splat_int(IQ4_VALUES[0]);
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i) {
        const int here = IQ4_VALUES[i], next = IQ4_VALUES[i + 1];
        value += (x >= 0.5f * (float)(here + next)) & (next - here);
    }
    return to_float(value);
}

INLINED floats inverted(floats scale) { return select_float(scale != 0, 1 / scale, splat(0)); }

// The neighbour in half precision: `step` units in the last place away.
INLINED floats beside(floats value, int step) {
    const floats unit = greater((floats)((ints)value & 0x7f800000) * 0x1p-10f, splat(0x1p-24f));
    return to_half(value + (float)step * unit);
}

// The weighted error of n numbers with the nearest codes.
INLINED floats error_of(const int n, const Codes codes, const floats *x, const floats *w, floats scale, floats low) {
    const floats inverse = inverted(scale);
    floats error = splat(0);
    for (int i = 0; i < n; ++i) {
        const floats shifted = x[i] + low, diff = scale * nearest(codes, shifted * inverse) - shifted;
        error += w[i] * diff * diff;
    }
    return error;
}

// Sums of w * value, w * value^2 and w * value * x with the nearest codes.
typedef struct { floats q, q2, qx; } Sums;

INLINED Sums sums_of(const int n, const Codes codes, const floats *x, const floats *w, floats inverse, floats low) {
    Sums sums = {splat(0), splat(0), splat(0)};
    for (int i = 0; i < n; ++i) {
        const floats value = nearest(codes, (x[i] + low) * inverse), weighted = w[i] * value;
        sums.q += weighted;
        sums.q2 += weighted * value;
        sums.qx += weighted * x[i];
    }
    return sums;
}

// The scale of the least error, as a real number, for types without minimums: candidates map the extreme number to `from`,
// from + step, … and to their negatives; each is refitted to its codes.
INLINED floats ideal_scale(const int n, const Codes codes, const floats *x, const floats *w, const Effort effort) {
    const floats most = extreme(n, x);
    const int signs = codes.low == -codes.high ? 1 : 2;
    floats scale = splat(0), best = splat(0);
    for (int c = 0; c < signs * effort.scan; ++c) {
        const float top = effort.from + effort.step * (float)(c / signs);
        const Sums s = sums_of(n, codes, x, w, (c % signs ? top : -top) / most, splat(0));
        const ints better = (s.q2 > 0) & (s.qx * s.qx > best * s.q2);
        scale = select_float(better, s.qx / s.q2, scale);
        best = select_float(better, scale * s.qx, best);
    }
    return select_float(absolute(most) < ALL_ZERO, splat(0), scale);
}

// Scale and negated minimum of the least error, as real numbers: candidates cut 0, step, 2 * step, … of the range of the numbers off
// either end, and are refitted to their codes. `below`: the minimum may not be above zero.
INLINED floats ideal_affine(const int n, const Codes codes, const floats *x, const floats *w, const Effort effort,
                                  const int below, floats *low) {
    floats min = x[0], max = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < n; ++i) {
        min = lesser(x[i], min);
        max = greater(x[i], max);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    if (below) min = lesser(min, splat(0));
    const floats range = max - min;
    floats scale = splat(0), best = splat(INFINITY);
    *low = -min;
    for (int c = 0; c < effort.scan * effort.scan; ++c) {
        const int under = c / effort.scan, over = c % effort.scan;
        const floats bottom = min + range * (effort.step * (float)under), rest = range * (1 - effort.step * (float)(under + over));
        const Sums s = sums_of(n, codes, x, w, (float)codes.high / rest, -bottom);
        const floats det = sum_w * s.q2 - s.q * s.q;
        floats this_scale = (sum_w * s.qx - sum_x * s.q) / det, this_low = (s.q * s.qx - s.q2 * sum_x) / det;
        const ints above = below ? this_low < 0 : splat_int(0);
        this_scale = select_float(above, s.qx / s.q2, this_scale);
        this_low = select_float(above, splat(0), this_low);
        const floats error = error_of(n, codes, x, w, this_scale, this_low);
        const ints better = (det > 0) & (this_scale > 0) & (error < best);
        scale = select_float(better, this_scale, scale);
        *low = select_float(better, this_low, *low);
        best = select_float(better, error, best);
    }
    return scale;
}

INLINED floats low_of(const Candidate *parts, const Layout of, int j) {
    return of.affine ? parts->low * parts->mins[j] : splat(0);
}

// Takes the best of the integers up to `reach` steps away, for every sub-block, and sets the error.
INLINED void try_neighbours(Candidate *parts, const Layout of, const Group *group, const int reach, const int flips) {
    const int wide = 2 * reach + 1, high = of.affine ? reach : 0;
    parts->error = splat(0);
    for (int j = 0; j < of.n; ++j) {
        const floats *x = group->x + of.size * j, *w = group->w + of.size * j;
        const floats scale = parts->scales[j], min = of.affine ? parts->mins[j] : splat(0);
        floats best = splat(INFINITY);
        for (int m = -high; m <= high; ++m) {
            const floats other_min = of.affine ? whole_between(min + (float)m, 0, of.most) : min;
            for (int s = 0; s < (flips ? 2 * wide : wide); ++s) {
                const floats from = s < wide ? scale : -scale;
                const floats other = whole_between(from + (float)(s % wide - reach), of.least, of.most);
                const floats low = of.affine ? parts->low * other_min : splat(0);
                const floats error = error_of(of.size, of.codes, x, w, parts->d * other, low);
                const ints better = error < best;
                best = select_float(better, error, best);
                parts->scales[j] = select_float(better, other, parts->scales[j]);
                if (of.affine) parts->mins[j] = select_float(better, other_min, parts->mins[j]);
            }
        }
        parts->error += best;
    }
}

INLINED void round_all(floats *values, const Candidate *parts, const Layout of, const Group *group) {
    for (int j = 0; j < of.n; ++j) {
        const floats inverse = inverted(parts->d * parts->scales[j]), low = low_of(parts, of, j);
        for (int i = of.size * j; i < of.size * (j + 1); ++i) values[i] = nearest(of.codes, (group->x[i] + low) * inverse);
    }
}

// The factors of the least sum of weighted squares for values as they are, in half precision. `stretch` counts what of the error is
// along the numbers, see STRETCH.
INLINED void refit(Candidate *parts, const floats *values, const Layout of, const Group *group, const float stretch) {
    floats aa = splat(0), ab = splat(0), bb = splat(0), ax = splat(0), bx = splat(0), xx = splat(0);
    for (int j = 0; j < of.n; ++j) {
        const floats scale = parts->scales[j], min = of.affine ? parts->mins[j] : splat(0);
        floats w = splat(0), q = splat(0), q2 = splat(0), x = splat(0), qx = splat(0), x2 = splat(0);
        for (int i = of.size * j; i < of.size * (j + 1); ++i) {
            const floats weighted = group->w[i] * values[i], number = group->w[i] * group->x[i];
            q2 += weighted * values[i];
            qx += weighted * group->x[i];
            x2 += number * group->x[i];
            if (of.affine) {
                w += group->w[i];
                q += weighted;
                x += number;
            }
        }
        aa += scale * scale * q2;
        ax += scale * qx;
        xx += x2;
        ab += scale * min * q;
        bb += min * min * w;
        bx += min * x;
    }
    const floats more = select_float(xx > 0, stretch / xx, splat(0));
    aa += more * ax * ax;
    ab += more * ax * bx;
    bb += more * bx * bx;
    ax += more * xx * ax;
    bx += more * xx * bx;
    const floats det = aa * bb - ab * ab, d = (ax * bb - bx * ab) / det, low = (ax * ab - bx * aa) / det;
    // ggml's factors are never below zero where there are minimums; the minimum of a single block may have either sign.
    const ints both = of.affine ? (det > 0) & (d > 0) & (of.n == 1 ? splat_int(-1) : low > 0) : splat_int(0);
    const ints alone = (aa > 0) & (of.affine ? (parts->low == 0) & (ax > 0) : splat_int(-1));
    parts->d = select_float(both, to_half(d), select_float(alone, to_half(ax / aa), parts->d));
    parts->low = select_float(both, to_half(low), parts->low);
}

// Keeps the better one.
INLINED void keep(Candidate *best, const Candidate *parts, const Layout of) {
    const ints better = parts->error < best->error;
    best->d = select_float(better, parts->d, best->d);
    best->low = select_float(better, parts->low, best->low);
    best->error = select_float(better, parts->error, best->error);
    for (int j = 0; j < of.n; ++j) {
        best->scales[j] = select_float(better, parts->scales[j], best->scales[j]);
        if (of.affine) best->mins[j] = select_float(better, parts->mins[j], best->mins[j]);
    }
}

// Two turns of integers with a refit of the factors between them.
INLINED void improve(Candidate *best, Candidate *parts, const Layout of, const Group *group, const Effort effort) {
    floats values[SUPER];
    for (int turn = 0; turn < 2; ++turn) {
        if (turn) {
            round_all(values, parts, of, group);
            refit(parts, values, of, group, 0);
        }
        try_neighbours(parts, of, group, turn ? effort.later : effort.reach, effort.flips && !turn);
        keep(best, parts, of);
    }
}

// Another start than ggml's: every sub-block's ideal scale (and minimum), rounded to integers.
INLINED void start_anew(Candidate *parts, const Layout of, const Group *group, const Effort effort) {
    floats scales[16], lows[16], most = splat(0), most_low = splat(0);
    for (int j = 0; j < of.n; ++j) {
        const floats *x = group->x + of.size * j, *w = group->w + of.size * j;
        if (of.affine) {
            scales[j] = ideal_affine(of.size, of.codes, x, w, effort, of.n > 1, &lows[j]);
            most_low = of.n > 1 ? greater(lows[j], most_low) : lows[j];
        } else {
            scales[j] = ideal_scale(of.size, of.codes, x, w, effort);
        }
        most = select_float(absolute(scales[j]) > absolute(most), scales[j], most);
    }
    parts->d = to_half(most / (float)(of.affine ? of.most : of.least));
    if (of.affine) parts->low = to_half(most_low / (float)of.most);
    const floats inverse = inverted(parts->d), inverse_low = inverted(parts->low);
    for (int j = 0; of.n > 1 && j < of.n; ++j) {
        parts->scales[j] = whole_between(scales[j] * inverse, of.least, of.most);
        if (of.affine) parts->mins[j] = whole_between(lows[j] * inverse_low, 0, of.most);
    }
}

// The neighbours of the factors in half precision, with the integers as they are.
INLINED void try_beside(Candidate *best, const Layout of, const Group *group) {
    const floats d = best->d, low = best->low;
    for (int step = 0; step < (of.affine ? 9 : 3); ++step) {
        Candidate parts = *best;
        parts.d = beside(d, step % 3 - 1);
        if (of.affine) parts.low = beside(low, step / 3 - 1);
        parts.error = splat(0);
        for (int j = 0; j < of.n; ++j) {
            const floats *x = group->x + of.size * j, *w = group->w + of.size * j;
            parts.error += error_of(of.size, of.codes, x, w, parts.d * parts.scales[j], low_of(&parts, of, j));
        }
        keep(best, &parts, of);
    }
}

INLINED Candidate search(const Candidate *first, const Layout of, const Group *group, const Effort effort) {
    Candidate best = *first, parts = *first;
    best.error = splat(INFINITY);
    for (int start = !effort.own; start <= (effort.scan > 0); ++start) {
        if (start) start_anew(&parts, of, group, effort);
        improve(&best, &parts, of, group, effort);
    }
    try_beside(&best, of, group);
    return best;
}

// The error of values exactly as ggml reads them: d * scale * value has at most 24 bits, and taking off the minimum rounds once.
INLINED floats exact_error(const Candidate *parts, const floats *values, const Layout of, const Group *group) {
    floats error = splat(0);
    for (int j = 0; j < of.n; ++j) {
        const floats scale = parts->d * parts->scales[j], low = low_of(parts, of, j);
        floats sum = splat(0);
        for (int i = of.size * j; i < of.size * (j + 1); ++i) {
            const floats diff = scale * values[i] - low - group->x[i];
            sum += group->w[i] * diff * diff;
        }
        error += sum;
    }
    return error;
}

INLINED void to_lanes(Candidate *parts, floats *values, const Layout of, const Parts *plain) {
    for (int k = 0; k < LANES; ++k) {
        parts->d[k] = plain[k].d;
        parts->low[k] = of.affine ? plain[k].dmin : 0;
        for (int j = 0; j < of.n; ++j) {
            parts->scales[j][k] = of.n > 1 ? plain[k].scales[j] : 1;
            if (of.affine) parts->mins[j][k] = of.n > 1 ? plain[k].mins[j] : 1;
        }
        for (int i = 0; i < of.n * of.size; ++i) {
            const int code = plain[k].codes[i];
            values[i][k] = (float)(of.codes.table ? IQ4_VALUES[code] : code - of.codes.zero);
        }
    }
}

INLINED void from_lanes(Parts *plain, const Candidate *parts, const floats *values, const Layout of) {
    for (int k = 0; k < LANES; ++k) {
        plain[k].d = parts->d[k];
        plain[k].dmin = parts->low[k];
        for (int j = 0; j < of.n; ++j) {
            plain[k].scales[j] = (int)parts->scales[j][k];
            if (of.affine) plain[k].mins[j] = (int)parts->mins[j][k];
        }
    }
    for (int i = 0; i < of.n * of.size; ++i) {
        floats code = values[i] + (float)of.codes.zero;
        if (of.codes.table) {
            ints place = splat_int(0);
            for (int c = 1; c < 16; ++c) place -= values[i] >= (float)IQ4_VALUES[c];
            code = to_float(place);
        }
        for (int k = 0; k < LANES; ++k) plain[k].codes[i] = (uint8_t)code[k];
    }
}

// int64_t refine_TYPE(rows, blocks of ggml, number of rows, numbers per row, weights or NULL): returns how many blocks were replaced.
// void reread_TYPE(blocks, numbers, the same blocks again, number of blocks): what the search takes blocks for, to be compared with ggml.
#define REFINED(name, Block, layout, effort)                                                                          \
    int64_t refine_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {    \
        const Layout of = layout;                                                                                     \
        const int numbers = of.n * of.size;                                                                           \
        const int64_t blocks = n_rows * n_per_row / numbers;                                                          \
        int64_t improved = 0;                                                                                         \
        Block *block = out;                                                                                           \
        Group group;                                                                                                  \
        Parts plain[LANES];                                                                                           \
        Candidate parts;                                                                                              \
        floats values[SUPER];                                                                                         \
        for (int i = 0; i < numbers; ++i) group.w[i] = splat(1);                                                      \
        for (int64_t first = 0; first < blocks; first += LANES) {                                                     \
            const int64_t count = blocks - first < LANES ? blocks - first : LANES;                                    \
            gather(numbers, group.x, rows, n_rows * n_per_row, first, count);                                         \
            if (weights) gather(numbers, group.w, weights, n_per_row, first, count);                                  \
            for (int k = 0; k < LANES; ++k) take_##name(&plain[k], block + first + (k < count ? k : count - 1));      \
            to_lanes(&parts, values, of, plain);                                                                      \
            const floats old = exact_error(&parts, values, of, &group);                                               \
            parts = search(&parts, of, &group, effort);                                                               \
            round_all(values, &parts, of, &group);                                                                    \
            Candidate stretched = parts;                                                                              \
            refit(&stretched, values, of, &group, STRETCH);                                                           \
            const floats plain_error = exact_error(&parts, values, of, &group);                                       \
            const floats stretched_error = exact_error(&stretched, values, of, &group);                               \
            const ints taken = certain(stretched_error, old);                                                         \
            parts.d = select_float(taken, stretched.d, parts.d);                                                      \
            parts.low = select_float(taken, stretched.low, parts.low);                                                \
            const ints better = (taken | certain(plain_error, old)) & searchable(numbers, group.x);                   \
            from_lanes(plain, &parts, values, of);                                                                    \
            for (int k = 0; k < count; ++k)                                                                           \
                if (better[k]) {                                                                                      \
                    put_##name(&plain[k], block + first + k);                                                         \
                    ++improved;                                                                                       \
                }                                                                                                     \
        }                                                                                                             \
        return improved;                                                                                              \
    }                                                                                                                 \
    void reread_##name(const void *from, float *numbers, void *to, int64_t blocks) {                                  \
        const Layout of = layout;                                                                                     \
        for (int64_t block = 0; block < blocks; ++block) {                                                            \
            Parts plain[LANES];                                                                                       \
            Candidate parts;                                                                                          \
            floats values[SUPER];                                                                                     \
            memset(plain, 0, sizeof plain);                                                                           \
            take_##name(&plain[0], (const Block *)from + block);                                                      \
            to_lanes(&parts, values, of, plain);                                                                      \
            for (int i = 0; i < of.n * of.size; ++i) {                                                                \
                const int j = i / of.size;                                                                            \
                *numbers++ = (parts.d * parts.scales[j] * values[i] - low_of(&parts, of, j))[0];                      \
            }                                                                                                         \
            from_lanes(plain, &parts, values, of);                                                                    \
            put_##name(&plain[0], (Block *)to + block);                                                               \
        }                                                                                                             \
    }

#define LAYOUT(...) ((Layout){__VA_ARGS__})
#define EFFORT(...) ((Effort){__VA_ARGS__})

// The efforts are measured: docs/kernels.md has errors and times.
REFINED(q2_K, BlockQ2K, LAYOUT(16, 16, 0, 15, 1, {0, 3, 0, 0}), EFFORT(3, 1, 0, 1, 4, 0, 0.07f))
REFINED(q3_K, BlockQ3K, LAYOUT(16, 16, -32, 31, 0, {-4, 3, 4, 0}), EFFORT(12, 2, 1, 1, 0, 0, 0))
REFINED(q4_K, BlockQ4K, LAYOUT(32, 8, 0, 63, 1, {0, 15, 0, 0}), EFFORT(4, 1, 0, 1, 3, 0, 0.04f))
REFINED(q5_K, BlockQ5K, LAYOUT(32, 8, 0, 63, 1, {0, 31, 0, 0}), EFFORT(4, 1, 0, 1, 3, 0, 0.02f))
REFINED(q6_K, BlockQ6K, LAYOUT(16, 16, -128, 127, 0, {-32, 31, 32, 0}), EFFORT(16, 4, 0, 1, 0, 0, 0))
REFINED(iq4_xs, BlockXS, LAYOUT(32, 8, -32, 31, 0, {-127, 113, 0, 1}), EFFORT(1, 1, 0, 0, 10, 90, 5))
REFINED(iq4_nl, BlockNL, LAYOUT(32, 1, 1, 1, 0, {-127, 113, 0, 1}), EFFORT(0, 0, 0, 1, 10, 88, 7))
REFINED(q4_0, BlockQ4_0, LAYOUT(32, 1, 1, 1, 0, {-8, 7, 8, 0}), EFFORT(0, 0, 0, 1, 20, 6, 0.5f))
REFINED(q5_0, BlockQ5_0, LAYOUT(32, 1, 1, 1, 0, {-16, 15, 16, 0}), EFFORT(0, 0, 0, 1, 20, 13, 0.5f))
REFINED(q8_0, BlockQ8_0, LAYOUT(32, 1, 1, 1, 0, {-127, 127, 128, 0}), EFFORT(0, 0, 0, 1, 24, 108, 1.7f))
REFINED(q4_1, BlockQ4_1, LAYOUT(32, 1, 1, 1, 1, {0, 15, 0, 0}), EFFORT(0, 0, 0, 1, 6, 0, 0.04f))
REFINED(q5_1, BlockQ5_1, LAYOUT(32, 1, 1, 1, 1, {0, 31, 0, 0}), EFFORT(0, 0, 0, 1, 6, 0, 0.02f))
