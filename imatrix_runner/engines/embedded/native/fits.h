// The searches for a few numbers' scale, one set of numbers in each lane: ggml's make_…_quants, operation for operation.
#pragma once

#include "lanes.h"

static const float ALL_ZERO = 1e-15f;

// What fit_affine tries after (max - min) / nmax: nmax + from, nmax + from + step, … in nmax's place; and whether an error counts
// by its size rather than by its square.
typedef struct {
    float from, step;
    int last, by_size;
} Tries;

static const Tries THOROUGH = {-0.9f, 0.05f, 36, 0};

// n numbers per lane as scale * l + min with 0 <= l <= nmax: of the candidates the one with the least weighted error.
// Returns the scale; l gets the whole numbers, low the negated minimum.
static inline floats fit_affine(const int n, const int nmax, const Tries tries, const floats *x, const floats *w, ints *l,
                                floats *low) {
    floats min = x[0], max = x[0], sum_w = w[0], sum_x = sum_w * x[0];
    for (int i = 1; i < n; ++i) {
        min = pick(x[i] < min, x[i], min);
        max = pick(x[i] > max, x[i], max);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    min = pick(min > 0, all(0), min);
    const floats lowest = min;
    const ints flat = max <= min;
    floats iscale = (float)nmax / (max - min), scale = 1 / iscale, best = all(0), chosen = iscale, base = min;
    for (int i = 0; i < n; ++i) {
        const floats diff = scale * real(clamp(nearest(iscale * (x[i] - min)), 0, nmax)) + min - x[i];
        best += w[i] * (tries.by_size ? magnitude(diff) : diff * diff);
    }
    for (int step = 0; step <= tries.last; ++step) {
        floats tried[32];
        iscale = (tries.from + tries.step * (float)step + (float)nmax) / (max - min);
        floats sum_l = all(0), sum_l2 = all(0), sum_xl = all(0);
        for (int i = 0; i < n; ++i) {
            const floats value = real(clamp(nearest(iscale * (x[i] - min)), 0, nmax)), weighted = w[i] * value;
            tried[i] = value;
            sum_l += weighted;
            sum_l2 += weighted * value;
            sum_xl += weighted * x[i];
        }
        const floats det = sum_w * sum_l2 - sum_l * sum_l;
        floats this_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
        floats this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        const ints above = this_min > 0;
        this_scale = pick(above, sum_xl / sum_l2, this_scale);
        this_min = pick(above, all(0), this_min);
        floats error = all(0);
        for (int i = 0; i < n; ++i) {
            const floats diff = this_scale * tried[i] + this_min - x[i];
            error += w[i] * (tries.by_size ? magnitude(diff) : diff * diff);
        }
        const ints better = (det > 0) & (error < best);
        chosen = pick(better, iscale, chosen);
        base = pick(better, min, base);
        best = pick(better, error, best);
        scale = pick(better, this_scale, scale);
        min = pick(better, this_min, min);
    }
    for (int i = 0; i < n; ++i) l[i] = choose(flat, whole(0), clamp(nearest(chosen * (x[i] - base)), 0, nmax));
    *low = -pick(flat, lowest, min);
    return pick(flat, all(0), scale);
}

// The number of greatest size, which keeps its sign; the first of equals.
static inline floats extreme(const int n, const floats *x) {
    floats max = all(0);
    for (int i = 0; i < n; ++i) max = pick(magnitude(x[i]) > magnitude(max), x[i], max);
    return max;
}

// n numbers per lane as scale * l with -nmax <= l < nmax, the scale's sign that of the largest. l gets the numbers plus nmax.
static inline floats fit_symmetric(const int n, const int nmax, const floats *x, const floats *w, ints *l) {
    const floats max = extreme(n, x);
    const ints zero = magnitude(max) < ALL_ZERO;
    floats scale = all(0), best = all(0), chosen = all(0);
    for (int turn = 0; turn < 19; ++turn) {
        const int step = turn == 0 ? 0 : turn <= 9 ? turn - 10 : turn - 9;
        const floats iscale = -((float)nmax + 0.1f * (float)step) / max;
        floats sum_lx = all(0), sum_l2 = all(0);
        for (int i = 0; i < n; ++i) {
            const floats value = real(clamp(nearest(iscale * x[i]), -nmax, nmax - 1));
            sum_lx += w[i] * x[i] * value;
            sum_l2 += w[i] * value * value;
        }
        // The first is taken as it is, without any weight as zero.
        const ints better = turn == 0 ? whole(-1) : (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2);
        scale = pick(better, pick(sum_l2 != 0, sum_lx / sum_l2, all(0)), scale);
        best = pick(better, scale * sum_lx, best);
        chosen = pick(better, iscale, chosen);
    }
    for (int i = 0; i < n; ++i) l[i] = choose(zero, whole(0), clamp(nearest(chosen * x[i]), -nmax, nmax - 1) + nmax);
    return pick(zero, all(0), scale);
}

// n numbers >= 0 per lane (the scales or minimums of a super-block) as scale * l with 0 <= l <= nmax. Returns the scale.
static inline floats fit_positive(const int n, const int nmax, const floats *x, const floats *w, ints *l) {
    floats max = all(0);
    for (int i = 0; i < n; ++i) max = pick(max > x[i], max, x[i]);
    const ints zero = max < ALL_ZERO;
    floats iscale = (float)nmax / max, scale = 1 / iscale, best = all(0);
    for (int i = 0; i < n; ++i) {
        l[i] = nearest(iscale * x[i]) & 0xff;
        const floats diff = x[i] - scale * real(l[i]);
        best += w[i] * diff * diff;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const floats this_iscale = (0.1f * (float)step + (float)nmax) / max, this_scale = 1 / this_iscale;
        floats error = all(0);
        for (int i = 0; i < n; ++i) {
            ints near = nearest(this_iscale * x[i]);
            near = choose(near < nmax, near, whole(nmax));
            const floats diff = x[i] - this_scale * real(near);
            error += w[i] * diff * diff;
        }
        const ints better = error < best;
        best = pick(better, error, best);
        iscale = pick(better, this_iscale, iscale);
    }
    floats sum_lx = all(0), sum_l2 = all(0);
    for (int i = 0; i < n; ++i) {
        ints near = nearest(iscale * x[i]);
        near = choose(near < nmax, near, whole(nmax));
        l[i] = near & 0xff;
        const floats value = real(near);
        sum_lx += w[i] * x[i] * value;
        sum_l2 += w[i] * value * value;
    }
    for (int turn = 0; turn < 5; ++turn) {
        ints changed = whole(0);
        for (int i = 0; i < n; ++i) {
            const floats value = real(l[i]);
            floats lx = sum_lx - w[i] * x[i] * value, l2 = sum_l2 - w[i] * value * value;
            ints near = nearest(x[i] * l2 / lx);
            near = choose(near < nmax, near, whole(nmax));
            const floats fresh = real(near);
            const ints other = (lx > 0) & (l2 > 0) & (near != l[i]);
            lx += w[i] * x[i] * fresh;
            l2 += w[i] * fresh * fresh;
            const ints better = other & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            l[i] = choose(better, near & 0xff, l[i]);
            sum_lx = pick(better, lx, sum_lx);
            sum_l2 = pick(better, l2, sum_l2);
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < n; ++i) l[i] = choose(zero, whole(0), l[i]);
    return pick(zero | ~(sum_l2 > 0), all(0), sum_lx / sum_l2);
}

// The same without weights for n numbers per lane as scale * l with -nmax <= l < nmax: every number weighs its own square, and one
// after the other moves to where the others want it, which is a long chain: SETS sets of n numbers go side by side.
// l gets the numbers plus nmax.
enum { SETS = 4 };

static inline void fit_in_turns(const int n, const int nmax, const floats *x, ints *l, floats *scales) {
    floats sum_lx[SETS], sum_l2[SETS];
    ints zero[SETS];
    for (int s = 0; s < SETS; ++s) {
        const floats *own = x + n * s, max = extreme(n, own), iscale = -(float)nmax / max;
        zero[s] = magnitude(max) < ALL_ZERO;
        sum_lx[s] = sum_l2[s] = all(0);
        for (int i = 0; i < n; ++i) {
            l[n * s + i] = clamp(nearest(iscale * own[i]), -nmax, nmax - 1);
            const floats value = real(l[n * s + i]), w = own[i] * own[i];
            sum_lx[s] += w * own[i] * value;
            sum_l2[s] += w * value * value;
        }
    }
    for (int turn = 0; turn < 5; ++turn) {
        ints changed = whole(0);
        for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int s = 0; s < SETS; ++s) {
                const floats own = x[n * s + i], w = own * own;
                const ints old = l[n * s + i];
                floats lx = sum_lx[s] - w * own * real(old), l2 = sum_l2[s] - w * real(old) * real(old);
                const ints near = clamp(nearest(own * l2 / lx), -nmax, nmax - 1);
                const ints other = (lx > 0) & (near != old);
                lx += w * own * real(near);
                l2 += w * real(near) * real(near);
                const ints better = other & (l2 > 0) & (lx * lx * sum_l2[s] > sum_lx[s] * sum_lx[s] * l2);
                l[n * s + i] = choose(better, near, old);
                sum_lx[s] = pick(better, lx, sum_lx[s]);
                sum_l2[s] = pick(better, l2, sum_l2[s]);
                changed |= better;
            }
        if (!any(changed)) break;
    }
    for (int s = 0; s < SETS; ++s) {
        for (int i = n * s; i < n * (s + 1); ++i) l[i] = choose(zero[s], whole(0), l[i] + nmax);
        scales[s] = pick(zero[s] | ~(sum_l2[s] > 0), all(0), sum_lx[s] / sum_l2[s]);
    }
}
