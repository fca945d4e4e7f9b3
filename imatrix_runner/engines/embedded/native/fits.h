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
    floats iscale = (float)nmax / (max - min), scale = 1 / iscale, best = all(0);
    for (int i = 0; i < n; ++i) {
        l[i] = clamp(nearest(iscale * (x[i] - min)), 0, nmax);
        const floats diff = scale * real(l[i]) + min - x[i];
        best += w[i] * (tries.by_size ? magnitude(diff) : diff * diff);
    }
    for (int step = 0; step <= tries.last; ++step) {
        ints tried[32];
        iscale = (tries.from + tries.step * (float)step + (float)nmax) / (max - min);
        floats sum_l = all(0), sum_l2 = all(0), sum_xl = all(0);
        for (int i = 0; i < n; ++i) {
            tried[i] = clamp(nearest(iscale * (x[i] - min)), 0, nmax);
            const floats value = real(tried[i]), weighted = w[i] * value;
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
            const floats diff = this_scale * real(tried[i]) + this_min - x[i];
            error += w[i] * (tries.by_size ? magnitude(diff) : diff * diff);
        }
        const ints better = (det > 0) & (error < best);
        if (any(better)) {
            for (int i = 0; i < n; ++i) l[i] = choose(better, tried[i], l[i]);
            best = pick(better, error, best);
            scale = pick(better, this_scale, scale);
            min = pick(better, this_min, min);
        }
    }
    for (int i = 0; i < n; ++i) l[i] = choose(flat, whole(0), l[i]);
    *low = -pick(flat, lowest, min);
    return pick(flat, all(0), scale);
}

// n numbers per lane as scale * l with -nmax <= l < nmax, the scale's sign that of the largest. l gets the numbers plus nmax.
static inline floats fit_symmetric(const int n, const int nmax, const floats *x, const floats *w, ints *l) {
    floats max = all(0), amax = all(0);
    for (int i = 0; i < n; ++i) {
        const floats size = magnitude(x[i]);
        const ints larger = size > amax;
        amax = pick(larger, size, amax);
        max = pick(larger, x[i], max);
    }
    const ints zero = amax < ALL_ZERO;
    floats iscale = -(float)nmax / max, sum_lx = all(0), sum_l2 = all(0);
    for (int i = 0; i < n; ++i) {
        const ints near = clamp(nearest(iscale * x[i]), -nmax, nmax - 1);
        const floats value = real(near);
        l[i] = near + nmax;
        sum_lx += w[i] * x[i] * value;
        sum_l2 += w[i] * value * value;
    }
    floats scale = pick(sum_l2 != 0, sum_lx / sum_l2, all(0)), best = scale * sum_lx;
    for (int step = -9; step <= 9; ++step) {
        if (step == 0) continue;
        ints tried[32];
        iscale = -((float)nmax + 0.1f * (float)step) / max;
        sum_lx = sum_l2 = all(0);
        for (int i = 0; i < n; ++i) {
            tried[i] = clamp(nearest(iscale * x[i]), -nmax, nmax - 1);
            const floats value = real(tried[i]);
            sum_lx += w[i] * x[i] * value;
            sum_l2 += w[i] * value * value;
        }
        const ints better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2);
        if (any(better)) {
            for (int i = 0; i < n; ++i) l[i] = choose(better, tried[i] + nmax, l[i]);
            scale = pick(better, sum_lx / sum_l2, scale);
            best = pick(better, scale * sum_lx, best);
        }
    }
    for (int i = 0; i < n; ++i) l[i] = choose(zero, whole(0), l[i]);
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
// after the other moves to where the others want it. l gets the numbers plus nmax.
static inline floats fit_in_turns(const int n, const int nmax, const floats *x, ints *l) {
    floats max = all(0), amax = all(0), sum_lx = all(0), sum_l2 = all(0);
    for (int i = 0; i < n; ++i) {
        const floats size = magnitude(x[i]);
        const ints larger = size > amax;
        amax = pick(larger, size, amax);
        max = pick(larger, x[i], max);
    }
    const ints zero = amax < ALL_ZERO;
    const floats iscale = -(float)nmax / max;
    for (int i = 0; i < n; ++i) {
        l[i] = clamp(nearest(iscale * x[i]), -nmax, nmax - 1);
        const floats value = real(l[i]), w = x[i] * x[i];
        sum_lx += w * x[i] * value;
        sum_l2 += w * value * value;
    }
    for (int turn = 0; turn < 5; ++turn) {
        ints changed = whole(0);
        for (int i = 0; i < n; ++i) {
            const floats value = real(l[i]), w = x[i] * x[i];
            floats lx = sum_lx - w * x[i] * value, l2 = sum_l2 - w * value * value;
            const ints near = clamp(nearest(x[i] * l2 / lx), -nmax, nmax - 1);
            const floats fresh = real(near);
            const ints other = (lx > 0) & (near != l[i]);
            lx += w * x[i] * fresh;
            l2 += w * fresh * fresh;
            const ints better = other & (l2 > 0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            l[i] = choose(better, near, l[i]);
            sum_lx = pick(better, lx, sum_lx);
            sum_l2 = pick(better, l2, sum_l2);
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < n; ++i) l[i] = choose(zero, whole(0), l[i] + nmax);
    return pick(zero | ~(sum_l2 > 0), all(0), sum_lx / sum_l2);
}
