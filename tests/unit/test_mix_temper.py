"""Chunks of probes are weighed so that a few do not decide, and probes that ended early can be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imatrix_runner.engines.cost_jobs import TrialResult
from imatrix_runner.mixes.compare_recipes import kld_per_token
from imatrix_runner.mixes.temper import tempered


def probe(name: str, kld: list[float]) -> TrialResult:
    n = len(kld)
    return TrialResult(name, tuple(range(n)), (100,) * n, tuple(kld), (90,) * n, (5.0,) * n, (5.0,) * n)


USUAL = [1.0, 1.0, 1.0, 1.0, 1.0, 95.0]


def alike(*factors: float) -> list[TrialResult]:
    return [probe(str(factor), [factor * each for each in USUAL]) for factor in factors]


def means(results: list[TrialResult], power: float = -1.0) -> list[float]:
    return [kld_per_token(result) for result in tempered(results, power)]


def test_probes_that_differ_by_a_factor_still_do() -> None:
    found = means(alike(1, 2, 3, 4))
    assert [each / found[0] for each in found] == pytest.approx([1, 2, 3, 4])


def test_one_chunk_has_no_more_say_than_the_others() -> None:
    special = [2.0, 2.0, 2.0, 2.0, 2.0, 95.0]  # twice as much in five of six chunks
    results = [*alike(1, 1, 1, 1), probe("special", special)]
    plain = kld_per_token(results[-1]) / kld_per_token(results[0])
    found = means(results)
    assert plain < 1.06
    assert found[-1] / found[0] == pytest.approx(1.83, rel=0.1)


def test_a_probe_that_ended_before_the_dear_chunk_is_compared_on_what_it_has() -> None:
    short = replace(probe("short", [1.0] * 4), chunks=(0, 1, 2, 3))
    found = means([*alike(1, 1, 1, 1), short])
    assert found[-1] == pytest.approx(found[0])


def test_the_power_0_is_a_ratio_of_sums() -> None:
    results = [*alike(1, 2, 3, 4), probe("other", [5.0] * 6)]
    plain = np.array([kld_per_token(result) for result in results])
    found = np.array(means(results, 0.0))
    assert found / found[0] == pytest.approx(plain / plain[0])


@pytest.mark.parametrize("results", [[], alike(1, 2, 3), [probe(str(n), [1.0]) for n in range(9)], alike(0, 0, 0, 0)])
def test_too_little_to_know_what_is_usual(results: list[TrialResult]) -> None:
    assert list(tempered(results)) == results
