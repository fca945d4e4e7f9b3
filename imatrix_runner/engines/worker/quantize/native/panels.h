// How the factor of a covariance lies in memory: the upper triangle of U, in panels of 32 columns.
//
// Panel p holds the rows 0 to 32 (p + 1) of the columns 32 p to 32 (p + 1), row by row. So all rows above a block of columns are one
// stretch of memory, and a matrix of n columns takes n (n + 32) / 2 numbers.
#pragma once

#include <stdint.h>

enum { PANEL = 32 };

static inline float *panel_of(float *panels, int64_t panel) { return panels + panel * (panel + 1) / 2 * PANEL * PANEL; }
static inline const float *panel_at(const float *panels, int64_t panel) { return panel_of((float *)panels, panel); }
