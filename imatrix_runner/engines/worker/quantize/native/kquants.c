// K-quants: several super-blocks in parallel, one in each lane of a vector.
//
// Every lane does the operations of ggml's scalar search in their order, each rounded on its own (no fused multiply-add), so the
// results are equal to the bit; the loader tests that against the library in use. Search and block layout:
// ggml/src/ggml-quants.c and ggml-common.h of llama.cpp.

#include "blocks.h"
#include "fits.h"

// Multiplies every number's imatrix weight by sqrt(spread + x^2), with the super-block's spread.
static inline void weigh(Group *group, float factor) {
    floats squares = splat(0);
    for (int i = 0; i < SUPER; ++i) squares += group->x[i] * group->x[i];
    const floats spread = factor * squares / (float)SUPER;
    for (int i = 0; i < SUPER; ++i) group->w[i] *= square_root(spread + group->x[i] * group->x[i]);
}

// The fits of the sub-blocks: l, and the rounded scales and minimums as stored in the super-block.
typedef struct {
    ints l[SUPER], scales[16], mins[16];
    uint16_t d[LANES], dmin[LANES];
} Affine;

static inline void round_affine(Affine *fit, const Group *group, const int size, const int nmax, floats d, floats dmin) {
    for (int j = 0; j < SUPER / size; ++j) {
        const floats scale = d * to_float(fit->scales[j]), low = dmin * to_float(fit->mins[j]);
        const ints kept = scale == 0;
        for (int i = size * j; i < size * (j + 1); ++i) {
            const ints near = clamp(round_even((group->x[i] + low) / scale), 0, nmax);
            fit->l[i] = select_int(kept, fit->l[i], near);
        }
    }
}

static inline void search_affine(Affine *fit, Group *group, const int size, const int nmax, const int top, float factor) {
    const int n = SUPER / size;
    floats scales[16], mins[16], sums[16];
    weigh(group, factor);
    for (int j = 0; j < n; ++j) {
        const floats *x = group->x + size * j, *w = group->w + size * j;
        sums[j] = splat(0);
        for (int i = 0; i < size; ++i) sums[j] += w[i];
        scales[j] = fit_affine(size, nmax, THOROUGH, x, w, fit->l + size * j, &mins[j]);
    }
    const floats d = halved(fit_positive(n, top, scales, sums, fit->scales), fit->d);
    const floats dmin = halved(fit_positive(n, top, mins, sums, fit->mins), fit->dmin);
    round_affine(fit, group, size, nmax, d, dmin);
}

// Rounds the scales or minimums of a super-block so that the greatest becomes top; returns the factor of the stored integers.
static inline floats stretch(const int n, const int top, const floats *x, ints *l, uint16_t *bits) {
    floats max = splat(0);
    for (int j = 0; j < n; ++j) max = select_float(x[j] > max, x[j], max);
    const floats inverse = select_float(max > 0, (float)top / max, splat(0));
    for (int j = 0; j < n; ++j) l[j] = round_even(inverse * x[j]) & 0xff;
    return halved(max / (float)top, bits);
}

// Without an imatrix the weight of a number is |x| in Q2_K, else the sub-block's spread + |x|.
static inline void search_affine_plain(Affine *fit, Group *group, const int size, const int nmax, const int top, Tries tries) {
    const int n = SUPER / size;
    floats scales[16], mins[16];
    for (int j = 0; j < n; ++j) {
        const floats *x = group->x + size * j;
        floats *w = group->w + size * j, squares = splat(0);
        for (int i = 0; i < size; ++i) squares += x[i] * x[i];
        const floats spread = square_root(squares / (float)size);
        for (int i = 0; i < size; ++i) w[i] = tries.by_size ? absolute(x[i]) : spread + absolute(x[i]);
        scales[j] = fit_affine(size, nmax, tries, x, w, fit->l + size * j, &mins[j]);
    }
    const floats d = stretch(n, top, scales, fit->scales, fit->d), dmin = stretch(n, top, mins, fit->mins, fit->dmin);
    for (int j = 0; j < n; ++j)
        if (top == 15) {  // ggml puts both into one byte without clamping
            const ints both = fit->scales[j] | fit->mins[j] << 4;
            fit->scales[j] = both & 15;
            fit->mins[j] = both >> 4 & 15;
        } else {
            fit->scales[j] = select_int(fit->scales[j] < top, fit->scales[j], splat_int(top));
            fit->mins[j] = select_int(fit->mins[j] < top, fit->mins[j], splat_int(top));
        }
    round_affine(fit, group, size, nmax, d, dmin);
}

// Packs eight 6-bit scales and minimums into twelve bytes.
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
        const floats scale = d * to_float(fit->scales[j] - 32);
        for (int i = 16 * j; i < 16 * (j + 1); ++i) {
            const ints near = clamp(round_even(group->x[i] / scale), -4, 3) + 4;
            fit->l[i] = select_int(scale == 0, fit->l[i], near);
        }
    }
}

static inline void search_q3_K(Symmetric *fit, Group *group) {
    floats scales[16], sums[16];
    weigh(group, 2);
    for (int j = 0; j < 16; ++j) {
        sums[j] = splat(0);
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
        const ints near = (round_even(iscale * scales[j]) << 24) >> 24;  // ggml holds it in eight bits
        fit->scales[j] = select_int(zero, splat_int(0), clamp(near, -32, 31) + 32);
    }
    round_q3_K(fit, group, halved(select_float(zero, splat(0), 1 / iscale), fit->d));
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
    const ints zero = absolute(max) < ALL_ZERO;
    const floats iscale = -128.f / max, d = halved(select_float(zero, splat(0), 1 / iscale), fit->d);
    for (int j = 0; j < 16; ++j) {
        ints near = round_even(iscale * scales[j]);
        near = select_int(near < 127, near, splat_int(127));
        near = (near << 24) >> 24;  // ggml stores it in eight bits
        fit->scales[j] = select_int(zero, splat_int(0), near);
        const floats scale = d * to_float(fit->scales[j]);
        for (int i = 16 * j; i < 16 * (j + 1); ++i) {
            const ints value = clamp(round_even(group->x[i] / scale), -32, 31) + 32;
            fit->l[i] = select_int(zero, splat_int(0), select_int(scale == 0, fit->l[i], value));
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
// is for calls without weights.
#define KERNEL(name, Fit, Block, weighted, search, write)                                                             \
    size_t quantize_##name(const float *rows, void *out, int64_t n_rows, int64_t n_per_row, const float *weights) {   \
        const int64_t numbers = n_rows * n_per_row, blocks = numbers / SUPER;                                         \
        Group group;                                                                                                  \
        Fit fit;                                                                                                      \
        for (int64_t first = 0; first < blocks; first += LANES) {                                                     \
            const int64_t count = blocks - first < LANES ? blocks - first : LANES;                                    \
            gather(SUPER, group.x, rows, numbers, first, count);                                                      \
            if (weighted) gather(SUPER, group.w, weights, n_per_row, first, count);                                   \
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
