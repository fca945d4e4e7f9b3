// Blocks of the stock types whose numbers are scale * level - low, as they lie in files (ggml/src/ggml-common.h), taken apart into
// numbers and put together again.
#pragma once

#include "lanes.h"

typedef struct { uint8_t scales[16], qs[64]; uint16_t d, dmin; } BlockQ2K;
typedef struct { uint8_t hmask[32], qs[64], scales[12]; uint16_t d; } BlockQ3K;
typedef struct { uint16_t d, dmin; uint8_t scales[12], qs[128]; } BlockQ4K;
typedef struct { uint16_t d, dmin; uint8_t scales[12], qh[32], qs[128]; } BlockQ5K;
typedef struct { uint8_t ql[128], qh[64]; int8_t scales[16]; uint16_t d; } BlockQ6K;
typedef struct { uint16_t d; uint8_t qs[16]; } BlockQ4_0;
typedef struct { uint16_t d, m; uint8_t qs[16]; } BlockQ4_1;
typedef struct { uint16_t d; uint8_t qh[4], qs[16]; } BlockQ5_0;
typedef struct { uint16_t d, m; uint8_t qh[4], qs[16]; } BlockQ5_1;
typedef struct { uint16_t d; int8_t qs[32]; } BlockQ8_0;
typedef struct { uint16_t d; uint8_t qs[16]; } BlockNL;
typedef struct { uint16_t d, scales_h; uint8_t scales_l[4], qs[128]; } BlockXS;

// One block. A type whose sub-blocks have integer scales: a number is (d * scale) * level - dmin * min, with the scale and min of its
// sub-block. The others: d * level - dmin, where dmin is minus the m of ggml. Level = code - zero; for IQ4 the value of the code.
typedef struct {
    float d, dmin;
    int scales[16], mins[16];
    uint8_t codes[SUPER];
} Parts;

typedef struct {
    const char *name;
    int block, sub;                       // columns of a block, and of a sub-block, which has its own scale
    size_t bytes;                         // of a block
    int least, most, zero;                // levels, and the code of level 0
    int is_table;                         // levels are IQ4's values
    int least_scale, most_scale, most_min;  // integer scales; 0, 0 where the scale is d itself
    int has_min;
    void (*take)(Parts *parts, const void *block);
    void (*put)(const Parts *parts, void *block);
} Format;

// The values of the sixteen codes of IQ4 (kvalues_iq4nl).
static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline float widened(uint16_t bits) {
    const int infinite = (bits & 0x7c00) == 0x7c00;
    const int32_t size = (bits & 0x7fff) << 13, sign = (int32_t)((uint32_t)(bits & 0x8000) << 16);
    float result;
    memcpy(&result, &size, 4);
    result *= 0x1p112f;
    int32_t pattern;
    memcpy(&pattern, &result, 4);
    pattern = (infinite ? size | 0x7f800000 : pattern) | sign;
    memcpy(&result, &pattern, 4);
    return result;
}

static inline void take_q2_K(Parts *parts, const void *from) {
    const BlockQ2K *block = from;
    parts->d = widened(block->d);
    parts->dmin = widened(block->dmin);
    for (int j = 0; j < 16; ++j) {
        parts->scales[j] = block->scales[j] & 15;
        parts->mins[j] = block->scales[j] >> 4;
    }
    for (int i = 0; i < SUPER; ++i) parts->codes[i] = block->qs[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
}

static inline void put_q2_K(const Parts *parts, void *to) {
    BlockQ2K *block = to;
    block->d = half(parts->d);
    block->dmin = half(parts->dmin);
    for (int j = 0; j < 16; ++j) block->scales[j] = parts->scales[j] | parts->mins[j] << 4;
    memset(block->qs, 0, sizeof block->qs);
    for (int i = 0; i < SUPER; ++i) block->qs[i / 128 * 32 + i % 32] |= parts->codes[i] << i % 128 / 32 * 2;
}

static inline void take_q3_K(Parts *parts, const void *from) {
    const BlockQ3K *block = from;
    parts->d = widened(block->d);
    for (int j = 0; j < 16; ++j) {
        const int low = block->scales[j % 8] >> (j < 8 ? 0 : 4) & 15, high = block->scales[8 + j % 4] >> 2 * (j / 4) & 3;
        parts->scales[j] = (low | high << 4) - 32;
    }
    for (int i = 0; i < SUPER; ++i)
        parts->codes[i] = (block->qs[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) | (block->hmask[i % 32] >> i / 32 & 1) << 2;
}

static inline void put_q3_K(const Parts *parts, void *to) {
    BlockQ3K *block = to;
    memset(block, 0, sizeof *block);
    block->d = half(parts->d);
    for (int j = 0; j < 16; ++j) {
        const int scale = parts->scales[j] + 32;
        block->scales[j % 8] |= (scale & 15) << (j < 8 ? 0 : 4);
        block->scales[8 + j % 4] |= (scale >> 4) << 2 * (j / 4);
    }
    for (int i = 0; i < SUPER; ++i) {
        block->hmask[i % 32] |= (parts->codes[i] >> 2) << i / 32;
        block->qs[i / 128 * 32 + i % 32] |= (parts->codes[i] & 3) << i % 128 / 32 * 2;
    }
}

// Eight 6-bit scales and minimums in twelve bytes.
static inline void take_scales(Parts *parts, const uint8_t *packed) {
    for (int j = 0; j < 4; ++j) {
        parts->scales[j] = packed[j] & 63;
        parts->mins[j] = packed[j + 4] & 63;
        parts->scales[j + 4] = (packed[j + 8] & 15) | (packed[j] >> 6) << 4;
        parts->mins[j + 4] = packed[j + 8] >> 4 | (packed[j + 4] >> 6) << 4;
    }
}

static inline void put_scales(const Parts *parts, uint8_t *packed) {
    for (int j = 0; j < 4; ++j) {
        packed[j] = parts->scales[j] | (parts->scales[j + 4] >> 4) << 6;
        packed[j + 4] = parts->mins[j] | (parts->mins[j + 4] >> 4) << 6;
        packed[j + 8] = (parts->scales[j + 4] & 15) | (parts->mins[j + 4] & 15) << 4;
    }
}

static inline void take_q4_K(Parts *parts, const void *from) {
    const BlockQ4K *block = from;
    parts->d = widened(block->d);
    parts->dmin = widened(block->dmin);
    take_scales(parts, block->scales);
    for (int i = 0; i < SUPER; ++i) parts->codes[i] = block->qs[i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
}

static inline void put_q4_K(const Parts *parts, void *to) {
    BlockQ4K *block = to;
    block->d = half(parts->d);
    block->dmin = half(parts->dmin);
    put_scales(parts, block->scales);
    memset(block->qs, 0, sizeof block->qs);
    for (int i = 0; i < SUPER; ++i) block->qs[i / 64 * 32 + i % 32] |= parts->codes[i] << i % 64 / 32 * 4;
}

static inline void take_q5_K(Parts *parts, const void *from) {
    const BlockQ5K *block = from;
    parts->d = widened(block->d);
    parts->dmin = widened(block->dmin);
    take_scales(parts, block->scales);
    for (int i = 0; i < SUPER; ++i)
        parts->codes[i] = (block->qs[i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15) | (block->qh[i % 32] >> i / 32 & 1) << 4;
}

static inline void put_q5_K(const Parts *parts, void *to) {
    BlockQ5K *block = to;
    block->d = half(parts->d);
    block->dmin = half(parts->dmin);
    put_scales(parts, block->scales);
    memset(block->qs, 0, sizeof block->qs);
    memset(block->qh, 0, sizeof block->qh);
    for (int i = 0; i < SUPER; ++i) {
        block->qs[i / 64 * 32 + i % 32] |= (parts->codes[i] & 15) << i % 64 / 32 * 4;
        block->qh[i % 32] |= (parts->codes[i] >> 4) << i / 32;
    }
}

static inline void take_q6_K(Parts *parts, const void *from) {
    const BlockQ6K *block = from;
    parts->d = widened(block->d);
    for (int j = 0; j < 16; ++j) parts->scales[j] = block->scales[j];
    for (int i = 0; i < SUPER; ++i) {
        const int half_block = i / 128, quarter = i % 128 / 32;
        const int low = block->ql[64 * half_block + i % 64] >> quarter / 2 * 4 & 15;
        parts->codes[i] = low | (block->qh[32 * half_block + i % 32] >> 2 * quarter & 3) << 4;
    }
}

static inline void put_q6_K(const Parts *parts, void *to) {
    BlockQ6K *block = to;
    memset(block, 0, sizeof *block);
    block->d = half(parts->d);
    for (int j = 0; j < 16; ++j) block->scales[j] = (int8_t)parts->scales[j];
    for (int i = 0; i < SUPER; ++i) {
        const int half_block = i / 128, quarter = i % 128 / 32;
        block->ql[64 * half_block + i % 64] |= (parts->codes[i] & 15) << quarter / 2 * 4;
        block->qh[32 * half_block + i % 32] |= (parts->codes[i] >> 4) << 2 * quarter;
    }
}

static inline void take_nibbles(Parts *parts, const uint8_t *qs) {
    for (int i = 0; i < 32; ++i) parts->codes[i] = qs[i % 16] >> i / 16 * 4 & 15;
}

static inline void put_nibbles(const Parts *parts, uint8_t *qs) {
    for (int i = 0; i < 16; ++i) qs[i] = (parts->codes[i] & 15) | (parts->codes[i + 16] & 15) << 4;
}

static inline void take_fifth_bits(Parts *parts, const uint8_t *qh) {
    for (int i = 0; i < 32; ++i) parts->codes[i] |= (qh[i / 8] >> i % 8 & 1) << 4;
}

static inline void put_fifth_bits(const Parts *parts, uint8_t *qh) {
    memset(qh, 0, 4);
    for (int i = 0; i < 32; ++i) qh[i / 8] |= (parts->codes[i] >> 4) << i % 8;
}

static inline void take_q4_0(Parts *parts, const void *from) {
    const BlockQ4_0 *block = from;
    parts->d = widened(block->d);
    take_nibbles(parts, block->qs);
}

static inline void put_q4_0(const Parts *parts, void *to) {
    BlockQ4_0 *block = to;
    block->d = half(parts->d);
    put_nibbles(parts, block->qs);
}

static inline void take_q4_1(Parts *parts, const void *from) {
    const BlockQ4_1 *block = from;
    parts->d = widened(block->d);
    parts->dmin = -widened(block->m);
    take_nibbles(parts, block->qs);
}

static inline void put_q4_1(const Parts *parts, void *to) {
    BlockQ4_1 *block = to;
    block->d = half(parts->d);
    block->m = half(-parts->dmin);
    put_nibbles(parts, block->qs);
}

static inline void take_q5_0(Parts *parts, const void *from) {
    const BlockQ5_0 *block = from;
    parts->d = widened(block->d);
    take_nibbles(parts, block->qs);
    take_fifth_bits(parts, block->qh);
}

static inline void put_q5_0(const Parts *parts, void *to) {
    BlockQ5_0 *block = to;
    block->d = half(parts->d);
    put_nibbles(parts, block->qs);
    put_fifth_bits(parts, block->qh);
}

static inline void take_q5_1(Parts *parts, const void *from) {
    const BlockQ5_1 *block = from;
    parts->d = widened(block->d);
    parts->dmin = -widened(block->m);
    take_nibbles(parts, block->qs);
    take_fifth_bits(parts, block->qh);
}

static inline void put_q5_1(const Parts *parts, void *to) {
    BlockQ5_1 *block = to;
    block->d = half(parts->d);
    block->m = half(-parts->dmin);
    put_nibbles(parts, block->qs);
    put_fifth_bits(parts, block->qh);
}

static inline void take_q8_0(Parts *parts, const void *from) {
    const BlockQ8_0 *block = from;
    parts->d = widened(block->d);
    for (int i = 0; i < 32; ++i) parts->codes[i] = (uint8_t)(block->qs[i] + 128);
}

static inline void put_q8_0(const Parts *parts, void *to) {
    BlockQ8_0 *block = to;
    block->d = half(parts->d);
    for (int i = 0; i < 32; ++i) block->qs[i] = (int8_t)(parts->codes[i] - 128);
}

static inline void take_iq4_nl(Parts *parts, const void *from) {
    const BlockNL *block = from;
    parts->d = widened(block->d);
    take_nibbles(parts, block->qs);
}

static inline void put_iq4_nl(const Parts *parts, void *to) {
    BlockNL *block = to;
    block->d = half(parts->d);
    put_nibbles(parts, block->qs);
}

static inline void take_iq4_xs(Parts *parts, const void *from) {
    const BlockXS *block = from;
    parts->d = widened(block->d);
    for (int j = 0; j < 8; ++j)
        parts->scales[j] = ((block->scales_l[j / 2] >> 4 * (j % 2) & 15) | (block->scales_h >> 2 * j & 3) << 4) - 32;
    for (int i = 0; i < SUPER; ++i) parts->codes[i] = block->qs[i / 32 * 16 + i % 16] >> i % 32 / 16 * 4 & 15;
}

static inline void put_iq4_xs(const Parts *parts, void *to) {
    BlockXS *block = to;
    memset(block, 0, sizeof *block);
    block->d = half(parts->d);
    for (int j = 0; j < 8; ++j) {
        const int scale = parts->scales[j] + 32;
        block->scales_l[j / 2] |= (scale & 15) << 4 * (j % 2);
        block->scales_h |= (scale >> 4) << 2 * j;
    }
    for (int i = 0; i < SUPER; ++i) block->qs[i / 32 * 16 + i % 16] |= parts->codes[i] << i % 32 / 16 * 4;
}

// Q8_0 has a level -128, which llama-quantize never uses: not every backend's product is made for it.
static const Format FORMATS[] = {
    {"q2_K", 256, 16, sizeof(BlockQ2K), 0, 3, 0, 0, 0, 15, 15, 1, take_q2_K, put_q2_K},
    {"q3_K", 256, 16, sizeof(BlockQ3K), -4, 3, 4, 0, -32, 31, 0, 0, take_q3_K, put_q3_K},
    {"q4_K", 256, 32, sizeof(BlockQ4K), 0, 15, 0, 0, 0, 63, 63, 1, take_q4_K, put_q4_K},
    {"q5_K", 256, 32, sizeof(BlockQ5K), 0, 31, 0, 0, 0, 63, 63, 1, take_q5_K, put_q5_K},
    {"q6_K", 256, 16, sizeof(BlockQ6K), -32, 31, 32, 0, -128, 127, 0, 0, take_q6_K, put_q6_K},
    {"q4_0", 32, 32, sizeof(BlockQ4_0), -8, 7, 8, 0, 0, 0, 0, 0, take_q4_0, put_q4_0},
    {"q4_1", 32, 32, sizeof(BlockQ4_1), 0, 15, 0, 0, 0, 0, 0, 1, take_q4_1, put_q4_1},
    {"q5_0", 32, 32, sizeof(BlockQ5_0), -16, 15, 16, 0, 0, 0, 0, 0, take_q5_0, put_q5_0},
    {"q5_1", 32, 32, sizeof(BlockQ5_1), 0, 31, 0, 0, 0, 0, 0, 1, take_q5_1, put_q5_1},
    {"q8_0", 32, 32, sizeof(BlockQ8_0), -127, 127, 128, 0, 0, 0, 0, 0, take_q8_0, put_q8_0},
    {"iq4_nl", 32, 32, sizeof(BlockNL), -127, 113, 0, 1, 0, 0, 0, 0, take_iq4_nl, put_iq4_nl},
    {"iq4_xs", 256, 32, sizeof(BlockXS), -127, 113, 0, 1, -32, 31, 0, 0, take_iq4_xs, put_iq4_xs},
};

static inline const Format *find_format(const char *name) {
    for (size_t i = 0; i < sizeof FORMATS / sizeof *FORMATS; ++i)
        if (!strcmp(FORMATS[i].name, name)) return FORMATS + i;
    return NULL;
}

// The level of a code.
static inline int level_of(const Format *format, int code) {
    return format->is_table ? IQ4_VALUES[code] : code - format->zero;
}
