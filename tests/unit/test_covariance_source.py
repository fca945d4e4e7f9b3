"""Which chunks covariances are collected from."""

from __future__ import annotations

import pytest

from imatrix_runner.mixes.covariance_source import spread


@pytest.mark.parametrize("count", [1, 5, 32, 100, 248, 500])
@pytest.mark.parametrize("at_once", [1, 4])
def test_ranges_are_spread_over_free_chunks(count: int, at_once: int) -> None:
    free = [chunk for chunk in range(280) if chunk % 9 != 4]
    chosen = [chunk for run in spread(free, count, at_once) for chunk in range(run.first, run.end)]
    assert len(chosen) == min(count, len(free))
    assert chosen == sorted({*chosen} & {*free})
    assert all(run.count <= at_once for run in spread(free, count, at_once))
    if count >= 32:
        halves = sum(chunk < 140 for chunk in chosen)
        assert abs(halves - len(chosen) / 2) <= at_once + 2


def test_nothing_free() -> None:
    assert spread([], 8, 4) == ()
