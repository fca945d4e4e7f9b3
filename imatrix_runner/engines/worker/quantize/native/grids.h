// Blocks of the IQ2 and IQ3 types, whose numbers are scale * sign * magnitude, the magnitudes of a group being a point of a grid:
// taken apart into numbers and put together again (ggml/src/ggml-common.h, ggml-quants.c).
#pragma once

#include "lanes.h"

typedef struct { uint16_t d; uint8_t qs[64], packed[32]; } BlockIQ3XXS;
typedef struct { uint16_t d; uint8_t qs[64], qh[8], signs[32], scales[4]; } BlockIQ3S;
typedef struct { uint16_t d; uint8_t packed[64]; } BlockIQ2XXS;
typedef struct { uint16_t d, qs[32]; uint8_t scales[8]; } BlockIQ2XS;
typedef struct { uint16_t d; uint8_t qs[32], signs[32], qh[8], scales[8]; } BlockIQ2S;

// One block: the scale of a sub-block is d * (offset + step * its integer); bit i of a byte of signs says that number i of eight is
// negative.
typedef struct {
    float d;
    int scales[16];
    uint16_t points[SUPER / 4];
    uint8_t signs[SUPER / 8];
} Pointed;

enum { MOST_POINTS = 1024, MOST_LEVELS = 8 };

typedef struct {
    const char *name;
    size_t bytes;
    int sub, size, points;  // columns of a sub-block and of a group, points of the grid
    int is_even;            // the eighth sign is not stored: each eight have an even number of negative ones
    float offset, step;
    void (*take)(Pointed *parts, const void *block);
    void (*put)(const Pointed *parts, void *block);
} GridFormat;

// Eight signs of which seven are stored.
static inline uint8_t even_signs(int seven) { return seven | __builtin_parity(seven) << 7; }

// Four times seven signs and a scale in 32 bits.
static inline void take_signs(Pointed *parts, const uint8_t *packed, int sub) {
    uint32_t word;
    memcpy(&word, packed, 4);
    for (int i = 0; i < 4; ++i) parts->signs[4 * sub + i] = even_signs(word >> 7 * i & 127);
    parts->scales[sub] = word >> 28;
}

static inline void put_signs(const Pointed *parts, uint8_t *packed, int sub) {
    uint32_t word = (uint32_t)parts->scales[sub] << 28;
    for (int i = 0; i < 4; ++i) word |= (uint32_t)(parts->signs[4 * sub + i] & 127) << 7 * i;
    memcpy(packed, &word, 4);
}

static inline void take_iq3_xxs(Pointed *parts, const void *from) {
    const BlockIQ3XXS *block = from;
    parts->d = widened(block->d);
    for (int i = 0; i < 64; ++i) parts->points[i] = block->qs[i];
    for (int j = 0; j < 8; ++j) take_signs(parts, block->packed + 4 * j, j);
}

static inline void put_iq3_xxs(const Pointed *parts, void *to) {
    BlockIQ3XXS *block = to;
    block->d = half(parts->d);
    for (int i = 0; i < 64; ++i) block->qs[i] = (uint8_t)parts->points[i];
    for (int j = 0; j < 8; ++j) put_signs(parts, block->packed + 4 * j, j);
}

static inline void take_iq3_s(Pointed *parts, const void *from) {
    const BlockIQ3S *block = from;
    parts->d = widened(block->d);
    for (int i = 0; i < 64; ++i) parts->points[i] = block->qs[i] | (block->qh[i / 8] >> i % 8 & 1) << 8;
    memcpy(parts->signs, block->signs, sizeof block->signs);
    for (int j = 0; j < 8; ++j) parts->scales[j] = block->scales[j / 2] >> 4 * (j % 2) & 15;
}

static inline void put_iq3_s(const Pointed *parts, void *to) {
    BlockIQ3S *block = to;
    memset(block, 0, sizeof *block);
    block->d = half(parts->d);
    for (int i = 0; i < 64; ++i) {
        block->qs[i] = (uint8_t)parts->points[i];
        block->qh[i / 8] |= (parts->points[i] >> 8) << i % 8;
    }
    memcpy(block->signs, parts->signs, sizeof block->signs);
    for (int j = 0; j < 8; ++j) block->scales[j / 2] |= parts->scales[j] << 4 * (j % 2);
}

static inline void take_iq2_xxs(Pointed *parts, const void *from) {
    const BlockIQ2XXS *block = from;
    parts->d = widened(block->d);
    for (int i = 0; i < 32; ++i) parts->points[i] = block->packed[i / 4 * 8 + i % 4];
    for (int j = 0; j < 8; ++j) take_signs(parts, block->packed + 8 * j + 4, j);
}

static inline void put_iq2_xxs(const Pointed *parts, void *to) {
    BlockIQ2XXS *block = to;
    block->d = half(parts->d);
    for (int i = 0; i < 32; ++i) block->packed[i / 4 * 8 + i % 4] = (uint8_t)parts->points[i];
    for (int j = 0; j < 8; ++j) put_signs(parts, block->packed + 8 * j + 4, j);
}

static inline void take_nibble_scales(Pointed *parts, const uint8_t *scales) {
    for (int j = 0; j < 16; ++j) parts->scales[j] = scales[j / 2] >> 4 * (j % 2) & 15;
}

static inline void put_nibble_scales(const Pointed *parts, uint8_t *scales) {
    for (int j = 0; j < 8; ++j) scales[j] = parts->scales[2 * j] | parts->scales[2 * j + 1] << 4;
}

static inline void take_iq2_xs(Pointed *parts, const void *from) {
    const BlockIQ2XS *block = from;
    parts->d = widened(block->d);
    for (int i = 0; i < 32; ++i) {
        parts->points[i] = block->qs[i] & 511;
        parts->signs[i] = even_signs(block->qs[i] >> 9);
    }
    take_nibble_scales(parts, block->scales);
}

static inline void put_iq2_xs(const Pointed *parts, void *to) {
    BlockIQ2XS *block = to;
    block->d = half(parts->d);
    for (int i = 0; i < 32; ++i) block->qs[i] = parts->points[i] | (parts->signs[i] & 127) << 9;
    put_nibble_scales(parts, block->scales);
}

static inline void take_iq2_s(Pointed *parts, const void *from) {
    const BlockIQ2S *block = from;
    parts->d = widened(block->d);
    for (int i = 0; i < 32; ++i) parts->points[i] = block->qs[i] | (block->qh[i / 4] >> 2 * (i % 4) & 3) << 8;
    memcpy(parts->signs, block->signs, sizeof block->signs);
    take_nibble_scales(parts, block->scales);
}

static inline void put_iq2_s(const Pointed *parts, void *to) {
    BlockIQ2S *block = to;
    memset(block->qh, 0, sizeof block->qh);
    block->d = half(parts->d);
    for (int i = 0; i < 32; ++i) {
        block->qs[i] = (uint8_t)parts->points[i];
        block->qh[i / 4] |= (parts->points[i] >> 8) << 2 * (i % 4);
    }
    memcpy(block->signs, parts->signs, sizeof block->signs);
    put_nibble_scales(parts, block->scales);
}

static const GridFormat GRID_FORMATS[] = {
    {"iq3_xxs", sizeof(BlockIQ3XXS), 32, 4, 256, 1, 0.25f, 0.5f, take_iq3_xxs, put_iq3_xxs},
    {"iq3_s", sizeof(BlockIQ3S), 32, 4, 512, 0, 1, 2, take_iq3_s, put_iq3_s},
    {"iq2_xxs", sizeof(BlockIQ2XXS), 32, 8, 256, 1, 0.125f, 0.25f, take_iq2_xxs, put_iq2_xxs},
    {"iq2_xs", sizeof(BlockIQ2XS), 16, 8, 512, 1, 0.125f, 0.25f, take_iq2_xs, put_iq2_xs},
    {"iq2_s", sizeof(BlockIQ2S), 16, 8, 1024, 0, 0.125f, 0.25f, take_iq2_s, put_iq2_s},
};
enum { GRID_FORMAT_COUNT = sizeof GRID_FORMATS / sizeof *GRID_FORMATS };

static inline const GridFormat *find_grid_format(const char *name) {
    for (int i = 0; i < GRID_FORMAT_COUNT; ++i)
        if (!strcmp(GRID_FORMATS[i].name, name)) return GRID_FORMATS + i;
    return NULL;
}
