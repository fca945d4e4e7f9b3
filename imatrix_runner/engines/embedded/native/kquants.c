// K-quants with weights, sixteen super-blocks side by side: one in each lane of a vector.
//
// Every lane does the operations of ggml's scalar search in their order, each rounded on its own (no fused multiply-add), so the
// results are the same to the bit; whoever loads this proves it against the library in use before relying on it. What is searched
// and how blocks are laid out: ggml/src/ggml-quants.c and ggml-common.h of llama.cpp.

#include "lanes.h"

static const float ALL_ZERO = 1e-15f;

// n numbers per lane as scale * l + min with 0 <= l <= nmax: of 38 candidates the one with the least weighted square error.
// Returns the scale; l gets the whole numbers, low the negated minimum.
static inline floats fit_affine(const int n, const int nmax, const floats *x, const floats *w, ints *l, floats *low) {
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
        best += w[i] * (diff * diff);
    }
    for (int step = 0; step <= 36; ++step) {
        ints tried[32];
        iscale = (-0.9f + 0.05f * (float)step + (float)nmax) / (max - min);
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
            error += w[i] * (diff * diff);
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
        ints tried[16];
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

// Every number's weight: the imatrix's times its own size, as seen from the super-block's spread.
static inline void weigh(Group *group, floats factor) {
    floats squares = all(0);
    for (int i = 0; i < SUPER; ++i) squares += group->x[i] * group->x[i];
    const floats spread = factor * squares / (float)SUPER;
    for (int i = 0; i < SUPER; ++i) group->w[i] *= root(spread + group->x[i] * group->x[i]);
}

// The sub-blocks' fits and what the super-block makes of them: l with the rounded scales and minimums that are stored.
typedef struct {
    ints l[SUPER], scales[16], mins[16];
    uint16_t d[LANES], dmin[LANES];
} Affine;

static inline void search_affine(Affine *fit, Group *group, const int size, const int nmax, const int top, float factor) {
    const int n = SUPER / size;
    floats scales[16], mins[16], sums[16];
    weigh(group, all(factor));
    for (int j = 0; j < n; ++j) {
        sums[j] = all(0);
        for (int i = 0; i < size; ++i) sums[j] += group->w[size * j + i];
        scales[j] = fit_affine(size, nmax, group->x + size * j, group->w + size * j, fit->l + size * j, &mins[j]);
    }
    const floats d = halved(fit_positive(n, top, scales, sums, fit->scales), fit->d);
    const floats dmin = halved(fit_positive(n, top, mins, sums, fit->mins), fit->dmin);
    for (int j = 0; j < n; ++j) {
        const floats scale = d * real(fit->scales[j]), low = dmin * real(fit->mins[j]);
        const ints kept = scale == 0;
        for (int i = size * j; i < size * (j + 1); ++i) {
            const ints near = clamp(nearest((group->x[i] + low) / scale), 0, nmax);
            fit->l[i] = choose(kept, fit->l[i], near);
        }
    }
}

typedef struct { uint8_t scales[16], qs[64]; uint16_t d, dmin; } BlockQ2K;
typedef struct { uint8_t hmask[32], qs[64], scales[12]; uint16_t d; } BlockQ3K;
typedef struct { uint16_t d, dmin; uint8_t scales[12], qs[128]; } BlockQ4K;
typedef struct { uint16_t d, dmin; uint8_t scales[12], qh[32], qs[128]; } BlockQ5K;
typedef struct { uint8_t ql[128], qh[64]; int8_t scales[16]; uint16_t d; } BlockQ6K;

// Eight 6-bit scales and minimums in twelve bytes.
static inline void pack_scales(uint8_t *packed, const Affine *fit, int k) {
    for (int j = 0; j < 4; ++j) {
        const int s = fit->scales[j][k], m = fit->mins[j][k], s4 = fit->scales[j + 4][k], m4 = fit->mins[j + 4][k];
        packed[j] = s | (s4 >> 4) << 6;
        packed[j + 4] = m | (m4 >> 4) << 6;
        packed[j + 8] = (s4 & 15) | (m4 & 15) << 4;
    }
}

static inline void write_q2_K(BlockQ2K *block, const Affine *fit, int k) {
    for (int j = 0; j < 16; ++j) block->scales[j] = fit->scales[j][k] | fit->mins[j][k] << 4;
    for (int j = 0; j < 2; ++j) {
        const ints *l = fit->l + 128 * j;
        for (int i = 0; i < 32; ++i)
            block->qs[32 * j + i] = l[i][k] | l[i + 32][k] << 2 | l[i + 64][k] << 4 | l[i + 96][k] << 6;
    }
    block->d = fit->d[k];
    block->dmin = fit->dmin[k];
}

static inline void write_q4_K(BlockQ4K *block, const Affine *fit, int k) {
    block->d = fit->d[k];
    block->dmin = fit->dmin[k];
    pack_scales(block->scales, fit, k);
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 32; ++i) block->qs[32 * j + i] = fit->l[64 * j + i][k] | fit->l[64 * j + 32 + i][k] << 4;
}

static inline void write_q5_K(BlockQ5K *block, const Affine *fit, int k) {
    block->d = fit->d[k];
    block->dmin = fit->dmin[k];
    pack_scales(block->scales, fit, k);
    memset(block->qh, 0, sizeof block->qh);
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 32; ++i) {
            const int one = fit->l[64 * j + i][k], other = fit->l[64 * j + 32 + i][k];
            block->qs[32 * j + i] = (one & 15) | (other & 15) << 4;
            block->qh[i] |= (one >> 4 | (other >> 4) << 1) << 2 * j;
        }
}

typedef struct {
    ints l[SUPER], scales[16];
    uint16_t d[LANES];
} Symmetric;

static inline void search_q3_K(Symmetric *fit, Group *group) {
    floats scales[16], sums[16];
    weigh(group, all(2));
    for (int j = 0; j < 16; ++j) {
        sums[j] = all(0);
        for (int i = 0; i < 16; ++i) sums[j] += group->w[16 * j + i];
        scales[j] = fit_symmetric(16, 4, group->x + 16 * j, group->w + 16 * j, fit->l + 16 * j);
    }
    const floats d = halved(fit_symmetric(16, 32, scales, sums, fit->scales), fit->d);
    for (int j = 0; j < 16; ++j) {
        const floats scale = d * real(fit->scales[j] - 32);
        for (int i = 16 * j; i < 16 * (j + 1); ++i) {
            const ints near = clamp(nearest(group->x[i] / scale), -4, 3) + 4;
            fit->l[i] = choose(scale == 0, fit->l[i], near);
        }
    }
}

static inline void write_q3_K(BlockQ3K *block, const Symmetric *fit, int k) {
    memset(block, 0, sizeof *block);
    for (int j = 0; j < 16; ++j) {
        const int scale = fit->scales[j][k];
        block->scales[j % 8] |= (scale & 15) << (j < 8 ? 0 : 4);
        block->scales[8 + j % 4] |= (scale >> 4) << 2 * (j / 4);
    }
    for (int i = 0; i < SUPER; ++i) {
        const int value = fit->l[i][k];
        block->hmask[i % 32] |= (value >> 2) << i / 32;
        block->qs[i / 128 * 32 + i % 32] |= (value & 3) << i % 128 / 32 * 2;
    }
    block->d = fit->d[k];
}

static inline void search_q6_K(Symmetric *fit, Group *group) {
    floats scales[16], max = all(0), amax = all(0);
    for (int j = 0; j < 16; ++j) {
        scales[j] = fit_symmetric(16, 32, group->x + 16 * j, group->w + 16 * j, fit->l + 16 * j);
        const floats size = magnitude(scales[j]);
        const ints larger = size > amax;
        amax = pick(larger, size, amax);
        max = pick(larger, scales[j], max);
    }
    const ints zero = amax < ALL_ZERO;
    const floats iscale = -128.f / max, d = halved(pick(zero, all(0), 1 / iscale), fit->d);
    for (int j = 0; j < 16; ++j) {
        ints near = nearest(iscale * scales[j]);
        near = choose(near < 127, near, whole(127));
        near = (near << 24) >> 24;  // it is stored in eight bits
        fit->scales[j] = choose(zero, whole(0), near);
        const floats scale = d * real(fit->scales[j]);
        for (int i = 16 * j; i < 16 * (j + 1); ++i) {
            const ints value = clamp(nearest(group->x[i] / scale), -32, 31) + 32;
            fit->l[i] = choose(zero, whole(0), choose(scale == 0, fit->l[i], value));
        }
    }
}

static inline void write_q6_K(BlockQ6K *block, const Symmetric *fit, int k) {
    for (int j = 0; j < 16; ++j) block->scales[j] = (int8_t)fit->scales[j][k];
    for (int j = 0; j < 2; ++j) {
        const ints *l = fit->l + 128 * j;
        for (int i = 0; i < 32; ++i) {
            const int a = l[i][k], b = l[i + 32][k], c = l[i + 64][k], d = l[i + 96][k];
            block->ql[64 * j + i] = (a & 15) | (c & 15) << 4;
            block->ql[64 * j + 32 + i] = (b & 15) | (d & 15) << 4;
            block->qh[32 * j + i] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
        }
    }
    block->d = fit->d[k];
}

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights): ggml's own signature; weights must be there.
#define KERNEL(name, Fit, Block, search, write)                                                                       \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t blocks = n_rows * n_per_row / SUPER;                                                            \
        Group group;                                                                                                  \
        Fit fit;                                                                                                      \
        for (int64_t first = 0; first < blocks; first += LANES) {                                                     \
            const int64_t count = blocks - first < LANES ? blocks - first : LANES;                                    \
            load(&group, rows, weights, n_per_row, first, count);                                                     \
            search;                                                                                                   \
            for (int k = 0; k < count; ++k) write((Block *)out + first + k, &fit, k);                                 \
        }                                                                                                             \
        return blocks * sizeof(Block);                                                                                \
    }

KERNEL(q2_K, Affine, BlockQ2K, search_affine(&fit, &group, 16, 3, 15, 1), write_q2_K)
KERNEL(q3_K, Symmetric, BlockQ3K, search_q3_K(&fit, &group), write_q3_K)
KERNEL(q4_K, Affine, BlockQ4K, search_affine(&fit, &group, 32, 15, 63, 2), write_q4_K)
KERNEL(q5_K, Affine, BlockQ5K, search_affine(&fit, &group, 32, 31, 63, 2), write_q5_K)
KERNEL(q6_K, Symmetric, BlockQ6K, search_q6_K(&fit, &group), write_q6_K)
