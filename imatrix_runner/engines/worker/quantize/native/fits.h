// Searches for the scale of a set of numbers, one set in each lane: ggml's make_…_quants, operation for operation.
#pragma once

#include "lanes.h"

static const float ALL_ZERO = 1e-15f;

// The scales that fit_affine tries after (max - min) / nmax: nmax + from, nmax + from + step, … replace nmax. by_size: an error
// counts by its absolute value instead of its square.
typedef struct {
    float from, step;
    int last, by_size;
} Tries;

static const Tries THOROUGH = {-0.9f, 0.05f, 36, 0};

// Fits n numbers per lane as scale * l + min with 0 <= l <= nmax: the candidate with the least weighted error.
// Returns the scale; l gets the integers, low the negated minimum.
static inline floats fit_affine(const int n, const int nmax, const Tries tries, const floats *x, const floats *w, ints *l,
                                floats *low) {
    floats min = x[0], max = x[0], sum_w = w[0], sum_x = sum_w * x[0];
    for (int i = 1; i < n; ++i) {
        min = select_float(x[i] < min, x[i], min);
        max = select_float(x[i] > max, x[i], max);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    min = select_float(min > 0, splat(0), min);
    const floats lowest = min;
    const ints flat = max <= min;
    floats iscale = (float)nmax / (max - min), scale = 1 / iscale, best = splat(0), chosen = iscale, base = min;
    for (int i = 0; i < n; ++i) {
        const floats diff = scale * to_float(clamp(round_even(iscale * (x[i] - min)), 0, nmax)) + min - x[i];
        best += w[i] * (tries.by_size ? absolute(diff) : diff * diff);
    }
    for (int step = 0; step <= tries.last; ++step) {
        floats tried[32];
        iscale = (tries.from + tries.step * (float)step + (float)nmax) / (max - min);
        floats sum_l = splat(0), sum_l2 = splat(0), sum_xl = splat(0);
        for (int i = 0; i < n; ++i) {
            const floats value = to_float(clamp(round_even(iscale * (x[i] - min)), 0, nmax)), weighted = w[i] * value;
            tried[i] = value;
            sum_l += weighted;
            sum_l2 += weighted * value;
            sum_xl += weighted * x[i];
        }
        const floats det = sum_w * sum_l2 - sum_l * sum_l;
        floats this_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
        floats this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        const ints above = this_min > 0;
        this_scale = select_float(above, sum_xl / sum_l2, this_scale);
        this_min = select_float(above, splat(0), this_min);
        floats error = splat(0);
        for (int i = 0; i < n; ++i) {
            const floats diff = this_scale * tried[i] + this_min - x[i];
            error += w[i] * (tries.by_size ? absolute(diff) : diff * diff);
        }
        const ints better = (det > 0) & (error < best);
        chosen = select_float(better, iscale, chosen);
        base = select_float(better, min, base);
        best = select_float(better, error, best);
        scale = select_float(better, this_scale, scale);
        min = select_float(better, this_min, min);
    }
    for (int i = 0; i < n; ++i) l[i] = select_int(flat, splat_int(0), clamp(round_even(chosen * (x[i] - base)), 0, nmax));
    *low = -select_float(flat, lowest, min);
    return select_float(flat, splat(0), scale);
}

// The number with the greatest absolute value, with its sign; the first of equals.
static inline floats extreme(const int n, const floats *x) {
    floats max = splat(0);
    for (int i = 0; i < n; ++i) max = select_float(absolute(x[i]) > absolute(max), x[i], max);
    return max;
}

// Fits n numbers per lane as scale * l with -nmax <= l < nmax. Returns the scale; l gets the integers plus nmax.
static inline floats fit_symmetric(const int n, const int nmax, const floats *x, const floats *w, ints *l) {
    const floats max = extreme(n, x);
    const ints zero = absolute(max) < ALL_ZERO;
    floats scale = splat(0), best = splat(0), chosen = splat(0);
    for (int turn = 0; turn < 19; ++turn) {
        const int step = turn == 0 ? 0 : turn <= 9 ? turn - 10 : turn - 9;
        const floats iscale = -((float)nmax + 0.1f * (float)step) / max;
        floats sum_lx = splat(0), sum_l2 = splat(0);
        for (int i = 0; i < n; ++i) {
            const floats value = to_float(clamp(round_even(iscale * x[i]), -nmax, nmax - 1));
            sum_lx += w[i] * x[i] * value;
            sum_l2 += w[i] * value * value;
        }
        // The first candidate is always taken; its scale is 0 if all weights are 0.
        const ints better = turn == 0 ? splat_int(-1) : (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2);
        scale = select_float(better, select_float(sum_l2 != 0, sum_lx / sum_l2, splat(0)), scale);
        best = select_float(better, scale * sum_lx, best);
        chosen = select_float(better, iscale, chosen);
    }
    for (int i = 0; i < n; ++i) l[i] = select_int(zero, splat_int(0), clamp(round_even(chosen * x[i]), -nmax, nmax - 1) + nmax);
    return select_float(zero, splat(0), scale);
}

// Fits n numbers >= 0 per lane (the scales or minimums of a super-block) as scale * l with 0 <= l <= nmax. Returns the scale.
static inline floats fit_positive(const int n, const int nmax, const floats *x, const floats *w, ints *l) {
    floats max = splat(0);
    for (int i = 0; i < n; ++i) max = select_float(max > x[i], max, x[i]);
    const ints zero = max < ALL_ZERO;
    floats iscale = (float)nmax / max, scale = 1 / iscale, best = splat(0);
    for (int i = 0; i < n; ++i) {
        l[i] = round_even(iscale * x[i]) & 0xff;
        const floats diff = x[i] - scale * to_float(l[i]);
        best += w[i] * diff * diff;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const floats this_iscale = (0.1f * (float)step + (float)nmax) / max, this_scale = 1 / this_iscale;
        floats error = splat(0);
        for (int i = 0; i < n; ++i) {
            ints near = round_even(this_iscale * x[i]);
            near = select_int(near < nmax, near, splat_int(nmax));
            const floats diff = x[i] - this_scale * to_float(near);
            error += w[i] * diff * diff;
        }
        const ints better = error < best;
        best = select_float(better, error, best);
        iscale = select_float(better, this_iscale, iscale);
    }
    floats sum_lx = splat(0), sum_l2 = splat(0);
    for (int i = 0; i < n; ++i) {
        ints near = round_even(iscale * x[i]);
        near = select_int(near < nmax, near, splat_int(nmax));
        l[i] = near & 0xff;
        const floats value = to_float(near);
        sum_lx += w[i] * x[i] * value;
        sum_l2 += w[i] * value * value;
    }
    for (int turn = 0; turn < 5; ++turn) {
        ints changed = splat_int(0);
        for (int i = 0; i < n; ++i) {
            const floats value = to_float(l[i]);
            floats lx = sum_lx - w[i] * x[i] * value, l2 = sum_l2 - w[i] * value * value;
            ints near = round_even(x[i] * l2 / lx);
            near = select_int(near < nmax, near, splat_int(nmax));
            const floats fresh = to_float(near);
            const ints other = (lx > 0) & (l2 > 0) & (near != l[i]);
            lx += w[i] * x[i] * fresh;
            l2 += w[i] * fresh * fresh;
            const ints better = other & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            l[i] = select_int(better, near & 0xff, l[i]);
            sum_lx = select_float(better, lx, sum_lx);
            sum_l2 = select_float(better, l2, sum_l2);
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < n; ++i) l[i] = select_int(zero, splat_int(0), l[i]);
    return select_float(zero | ~(sum_l2 > 0), splat(0), sum_lx / sum_l2);
}

// Fits n numbers per lane as scale * l with -nmax <= l < nmax without weights: each number's weight is its square, and the integers
// are improved one after another. That is a long dependency chain, so SETS sets of n numbers are interleaved. l gets the integers
// plus nmax.
enum { SETS = 4 };

static inline void fit_in_turns(const int n, const int nmax, const floats *x, ints *l, floats *scales) {
    floats sum_lx[SETS], sum_l2[SETS];
    ints zero[SETS];
    for (int s = 0; s < SETS; ++s) {
        const floats *own = x + n * s, max = extreme(n, own), iscale = -(float)nmax / max;
        zero[s] = absolute(max) < ALL_ZERO;
        sum_lx[s] = sum_l2[s] = splat(0);
        for (int i = 0; i < n; ++i) {
            l[n * s + i] = clamp(round_even(iscale * own[i]), -nmax, nmax - 1);
            const floats value = to_float(l[n * s + i]), w = own[i] * own[i];
            sum_lx[s] += w * own[i] * value;
            sum_l2[s] += w * value * value;
        }
    }
    for (int turn = 0; turn < 5; ++turn) {
        ints changed = splat_int(0);
        for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int s = 0; s < SETS; ++s) {
                const floats own = x[n * s + i], w = own * own;
                const ints old = l[n * s + i];
                floats lx = sum_lx[s] - w * own * to_float(old), l2 = sum_l2[s] - w * to_float(old) * to_float(old);
                const ints near = clamp(round_even(own * l2 / lx), -nmax, nmax - 1);
                const ints other = (lx > 0) & (near != old);
                lx += w * own * to_float(near);
                l2 += w * to_float(near) * to_float(near);
                const ints better = other & (l2 > 0) & (lx * lx * sum_l2[s] > sum_lx[s] * sum_lx[s] * l2);
                l[n * s + i] = select_int(better, near, old);
                sum_lx[s] = select_float(better, lx, sum_lx[s]);
                sum_l2[s] = select_float(better, l2, sum_l2[s]);
                changed |= better;
            }
        if (!any(changed)) break;
    }
    for (int s = 0; s < SETS; ++s) {
        for (int i = n * s; i < n * (s + 1); ++i) l[i] = select_int(zero[s], splat_int(0), l[i] + nmax);
        scales[s] = select_float(zero[s] | ~(sum_l2[s] > 0), splat(0), sum_lx[s] / sum_l2[s]);
    }
}
