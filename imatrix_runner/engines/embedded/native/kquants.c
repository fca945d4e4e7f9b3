// K-quants, several super-blocks side by side: one in each lane of a vector.
//
// Every lane does the operations of ggml's scalar search in their order, each rounded on its own (no fused multiply-add), so the
// results are the same to the bit; whoever loads this proves it against the library in use before relying on it. What is searched
// and how blocks are laid out: ggml/src/ggml-quants.c and ggml-common.h of llama.cpp.

#include "fits.h"

// Every number's weight: the imatrix's times its own size, as seen from the super-block's spread.
static inline void weigh(Group *group, float factor) {
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

static inline void round_affine(Affine *fit, const Group *group, const int size, const int nmax, floats d, floats dmin) {
    for (int j = 0; j < SUPER / size; ++j) {
        const floats scale = d * real(fit->scales[j]), low = dmin * real(fit->mins[j]);
        const ints kept = scale == 0;
        for (int i = size * j; i < size * (j + 1); ++i) {
            const ints near = clamp(nearest((group->x[i] + low) / scale), 0, nmax);
            fit->l[i] = choose(kept, fit->l[i], near);
        }
    }
}

static inline void search_affine(Affine *fit, Group *group, const int size, const int nmax, const int top, float factor) {
    const int n = SUPER / size;
    floats scales[16], mins[16], sums[16];
    weigh(group, factor);
    for (int j = 0; j < n; ++j) {
        const floats *x = group->x + size * j, *w = group->w + size * j;
        sums[j] = all(0);
        for (int i = 0; i < size; ++i) sums[j] += w[i];
        scales[j] = fit_affine(size, nmax, THOROUGH, x, w, fit->l + size * j, &mins[j]);
    }
    const floats d = halved(fit_positive(n, top, scales, sums, fit->scales), fit->d);
    const floats dmin = halved(fit_positive(n, top, mins, sums, fit->mins), fit->dmin);
    round_affine(fit, group, size, nmax, d, dmin);
}

// The scales or minimums of a super-block as what is stored of them, the greatest as top; returns what to multiply that by.
static inline floats stretch(const int n, const int top, const floats *x, ints *l, uint16_t *bits) {
    floats max = all(0);
    for (int j = 0; j < n; ++j) max = pick(x[j] > max, x[j], max);
    const floats inverse = pick(max > 0, (float)top / max, all(0));
    for (int j = 0; j < n; ++j) l[j] = nearest(inverse * x[j]) & 0xff;
    return halved(max / (float)top, bits);
}

// Without weights numbers weigh by their size, all but in Q2_K on top of the sub-block's spread.
static inline void search_affine_plain(Affine *fit, Group *group, const int size, const int nmax, const int top, Tries tries) {
    const int n = SUPER / size;
    floats scales[16], mins[16];
    for (int j = 0; j < n; ++j) {
        const floats *x = group->x + size * j;
        floats *w = group->w + size * j, squares = all(0);
        for (int i = 0; i < size; ++i) squares += x[i] * x[i];
        const floats spread = root(squares / (float)size);
        for (int i = 0; i < size; ++i) w[i] = tries.by_size ? magnitude(x[i]) : spread + magnitude(x[i]);
        scales[j] = fit_affine(size, nmax, tries, x, w, fit->l + size * j, &mins[j]);
    }
    const floats d = stretch(n, top, scales, fit->scales, fit->d), dmin = stretch(n, top, mins, fit->mins, fit->dmin);
    for (int j = 0; j < n; ++j)
        if (top == 15) {  // both are put into one byte as they are
            const ints both = fit->scales[j] | fit->mins[j] << 4;
            fit->scales[j] = both & 15;
            fit->mins[j] = both >> 4 & 15;
        } else {
            fit->scales[j] = choose(fit->scales[j] < top, fit->scales[j], whole(top));
            fit->mins[j] = choose(fit->mins[j] < top, fit->mins[j], whole(top));
        }
    round_affine(fit, group, size, nmax, d, dmin);
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

static inline void round_q3_K(Symmetric *fit, const Group *group, floats d) {
    for (int j = 0; j < 16; ++j) {
        const floats scale = d * real(fit->scales[j] - 32);
        for (int i = 16 * j; i < 16 * (j + 1); ++i) {
            const ints near = clamp(nearest(group->x[i] / scale), -4, 3) + 4;
            fit->l[i] = choose(scale == 0, fit->l[i], near);
        }
    }
}

static inline void search_q3_K(Symmetric *fit, Group *group) {
    floats scales[16], sums[16];
    weigh(group, 2);
    for (int j = 0; j < 16; ++j) {
        sums[j] = all(0);
        for (int i = 0; i < 16; ++i) sums[j] += group->w[16 * j + i];
        scales[j] = fit_symmetric(16, 4, group->x + 16 * j, group->w + 16 * j, fit->l + 16 * j);
    }
    round_q3_K(fit, group, halved(fit_symmetric(16, 32, scales, sums, fit->scales), fit->d));
}

static inline void search_q3_K_plain(Symmetric *fit, Group *group) {
    floats scales[16];
    for (int j = 0; j < 16; j += SETS) fit_in_turns(16, 4, group->x + 16 * j, fit->l + 16 * j, scales + j);
    const floats max = extreme(16, scales), iscale = -32.f / max;
    const ints zero = max == 0;
    for (int j = 0; j < 16; ++j) {
        const ints near = (nearest(iscale * scales[j]) << 24) >> 24;  // it is held in eight bits
        fit->scales[j] = choose(zero, whole(0), clamp(near, -32, 31) + 32);
    }
    round_q3_K(fit, group, halved(pick(zero, all(0), 1 / iscale), fit->d));
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
    floats scales[16];
    for (int j = 0; j < 16; ++j) scales[j] = fit_symmetric(16, 32, group->x + 16 * j, group->w + 16 * j, fit->l + 16 * j);
    const floats max = extreme(16, scales);
    const ints zero = magnitude(max) < ALL_ZERO;
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

static inline void search_q6_K_plain(Symmetric *fit, Group *group) {
    for (int i = 0; i < SUPER; ++i) group->w[i] = group->x[i] * group->x[i];
    search_q6_K(fit, group);
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

// size_t quantize_TYPE(rows, out, number of rows, numbers per row, weights): ggml's own signature. The function named _unweighted
// is for where there are no weights.
#define KERNEL(name, Fit, Block, weighted, search, write)                                                             \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t numbers = n_rows * n_per_row, blocks = numbers / SUPER;                                         \
        Group group;                                                                                                  \
        Fit fit;                                                                                                      \
        for (int64_t first = 0; first < blocks; first += LANES) {                                                     \
            const int64_t count = blocks - first < LANES ? blocks - first : LANES;                                    \
            take(SUPER, group.x, rows, numbers, first, count);                                                        \
            if (weighted) take(SUPER, group.w, weights, n_per_row, first, count);                                     \
            search;                                                                                                   \
            for (int k = 0; k < count; ++k) write((Block *)out + first + k, &fit, k);                                 \
        }                                                                                                             \
        return blocks * sizeof(Block);                                                                                \
    }
#define KERNELS(name, Fit, Block, search, plain, write)                                                               \
    KERNEL(name, Fit, Block, 1, search, write)                                                                        \
    KERNEL(name##_unweighted, Fit, Block, 0, plain, write)

static const Tries Q2_PLAIN = {-0.5f, 0.1f, 15, 1}, Q4_PLAIN = {-1.f, 0.1f, 20, 0}, Q5_PLAIN = {-0.5f, 0.1f, 15, 0};

KERNELS(q2_K, Affine, BlockQ2K, search_affine(&fit, &group, 16, 3, 15, 1),
        search_affine_plain(&fit, &group, 16, 3, 15, Q2_PLAIN), write_q2_K)
KERNELS(q3_K, Symmetric, BlockQ3K, search_q3_K(&fit, &group), search_q3_K_plain(&fit, &group), write_q3_K)
KERNELS(q4_K, Affine, BlockQ4K, search_affine(&fit, &group, 32, 15, 63, 2),
        search_affine_plain(&fit, &group, 32, 15, 63, Q4_PLAIN), write_q4_K)
KERNELS(q5_K, Affine, BlockQ5K, search_affine(&fit, &group, 32, 31, 63, 2),
        search_affine_plain(&fit, &group, 32, 31, 63, Q5_PLAIN), write_q5_K)
KERNELS(q6_K, Symmetric, BlockQ6K, search_q6_K(&fit, &group), search_q6_K_plain(&fit, &group), write_q6_K)
