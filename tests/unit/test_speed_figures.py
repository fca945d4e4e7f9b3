"""Speeds: their errors, what is fast enough, and the fewest layers that are."""

from __future__ import annotations

import math

import pytest

from imatrix_runner.evaluate.recommendations import Measure
from imatrix_runner.evaluate.speed_figures import (
    MeasuredSpeed,
    SpeedSetting,
    TokenRate,
    describe_rate,
    fast_enough,
    least_layers,
    shares,
)

SETTING = SpeedSetting("cpu", (), "sha256:", "engine", 2, 512, 128, 0)
MEASURES = [Measure("Q8_0", 800, 0.001, 0.99), Measure("Q4_K_M", 450, 0.05, 0.93), Measure("Q2_K", 300, 0.4, 0.7)]


def measured(**rates: tuple[float, float]) -> dict[str, MeasuredSpeed]:
    return {
        name: MeasuredSpeed(TokenRate(100, 1, 4), TokenRate(mean, deviation, 4), (), SETTING)
        for name, (mean, deviation) in rates.items()
    }


def test_a_rate_has_llama_bench_s_deviation_and_the_error_of_the_mean() -> None:
    rate = TokenRate.of([10.0, 12.0, 14.0, 16.0])
    assert (rate.mean, rate.runs) == (13.0, 4)
    assert rate.deviation == pytest.approx(2.582, abs=1e-3)
    assert rate.error == pytest.approx(rate.deviation / 2)
    assert TokenRate.of([10.0]).error == math.inf
    assert [describe_rate(TokenRate(mean, deviation, 4)) for mean, deviation in ((23.456, 0.4), (3770.2, 850.0))] == [
        "23.46 ± 0.20",
        "3770 ± 425",
    ]


@pytest.mark.parametrize(("repetitions", "rounds"), [(1, [1]), (2, [1, 1]), (5, [2, 2, 1]), (10, [4, 3, 3])])
def test_repetitions_are_shared_among_rounds(repetitions: int, rounds: list[int]) -> None:
    assert shares(repetitions) == rounds


@pytest.mark.parametrize(
    ("least", "level"), [(5.0, "Q8_0"), (10.4, "Q8_0"), (10.6, "Q4_K_M"), (20.0, "Q4_K_M"), (24.0, "Q2_K"), (31.0, None)]
)
def test_the_closest_to_the_source_that_is_fast_enough_is_picked_within_its_error(least: float, level: str | None) -> None:
    speeds = measured(Q8_0=(10, 1), Q4_K_M=(20, 1), Q2_K=(30, 1))
    pick = fast_enough(MEASURES, speeds, least)
    assert (pick.level if pick is not None else None) == level


@pytest.mark.parametrize("needed", range(10))
def test_the_fewest_layers_are_found_by_halving(needed: int) -> None:
    asked: list[int] = []

    def is_enough(layers: int) -> bool:
        asked.append(layers)
        return layers >= needed

    assert least_layers(8, is_enough) == (needed if needed <= 8 else None)
    assert len(asked) == len(set(asked)) <= 5
