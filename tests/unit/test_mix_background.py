"""The KLD that any change brings is found, and is no cost: on trials by a law, and on those of the demo model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, Trial, TrialResult
from imatrix_runner.engines.measures import Estimate
from imatrix_runner.mixes.background import Background, TrialPoint
from imatrix_runner.mixes.sensitivity import CostModel
from imatrix_runner.models.tensor_patterns import component
from support.demo_costs import MEASURED, TYPES

LEVELS = {0: 1.4e-5, 1: 1.1e-5, 2: 8e-6}
"""Backgrounds by layer."""
ERRORS = {"q3_k": 0.02, "q6_k": 0.0003}
SENSITIVITIES = (3e-4, 5e-3, 2e-2, 0.1, 0.4)


def points(spread: float = 0.0, seed: int = 0) -> list[TrialPoint]:
    """KLD = S * e + background, with a relative noise; in each layer one tensor that hardly matters."""
    chance = np.random.default_rng(seed)
    return [
        TrialPoint((f"blk.{layer}.{number}",), error, Estimate(kld * math.exp(spread * chance.normal()), spread * kld))
        for layer, level in LEVELS.items()
        for number, sensitivity in enumerate(SENSITIVITIES)
        for error in ERRORS.values()
        if (kld := sensitivity * error + level)
    ]


def test_the_intercept_is_found_for_every_layer() -> None:
    found = Background.of(points())
    for layer, level in LEVELS.items():
        assert found.at(f"blk.{layer}.attn_q.weight") == pytest.approx(level, rel=0.03)
    assert 0.97 * min(LEVELS.values()) <= found.typical <= max(LEVELS.values())
    assert found.of_file == pytest.approx(1.4e-5, rel=0.03)


def test_noise_of_a_twentieth_moves_it_by_a_tenth() -> None:
    for seed in range(20):
        found = Background.of(points(0.05, seed))
        for layer, level in LEVELS.items():
            assert found.at(f"blk.{layer}.attn_q.weight") == pytest.approx(level, rel=0.2)


def test_a_layer_without_trials_has_the_model_s() -> None:
    found = Background.of(points())
    assert found.at("blk.7.attn_q.weight") == found.at("output.weight") == found.typical


def test_a_layer_of_sensitive_tensors_alone_has_nearly_the_model_s() -> None:
    """Its own trials do not show it: their KLD is a thousand times larger."""
    loud = [TrialPoint(("blk.9.ffn_down.weight",), error, Estimate(20 * error, 0.6 * error)) for error in ERRORS.values()]
    found = Background.of([*points(), *loud])
    assert found.at("blk.9.ffn_down.weight") == pytest.approx(found.typical, rel=0.01)


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [point for point in points() if point.error == ERRORS["q3_k"]],
        points()[:4],
        [TrialPoint(point.names, 0.02 + point.error / 100, point.kld) for point in points()],
        [TrialPoint(point.names, 0.0, point.kld) for point in points()],
    ],
    ids=["none", "one type", "two tensors", "errors that are nearly equal", "no errors"],
)
def test_trials_that_do_not_show_it(trials: list[TrialPoint]) -> None:
    found = Background.of(trials)
    assert (found.typical, found.of_file, found.at("blk.0.attn_q.weight")) == (0.0, 0.0, 0.0)


def test_where_kld_rises_more_steeply_than_the_error_there_is_none() -> None:
    steep = [
        TrialPoint((f"blk.{n}.ffn_up.weight",), error, Estimate((n + 1) * error**1.3, 0.01 * error**1.3))
        for n in range(8)
        for error in ERRORS.values()
    ]
    assert Background.of(steep).typical == 0.0


# Costs


def model(probed: Mapping[str, tuple[str, ...]]) -> CostModel:
    """The costs of the demo model's tensors, from the trials of some types of each."""
    rounded = {(name, kind): RoundedTensor(name, kind) for name in MEASURED for kind in TYPES}
    errors = [
        RoundingError(rounded[name, kind], relative, relative, 1.0)
        for name, (each, _) in MEASURED.items()
        for kind, relative in zip(TYPES, each, strict=True)
    ]
    chosen = [(name, kind) for name, kinds in probed.items() for kind in kinds]
    trials = [Trial(f"{name}={kind}", (rounded[name, kind],)) for name, kind in chosen]
    return CostModel.of(errors, trials, [result(name, kind) for name, kind in chosen])


def measured(name: str, kind: str) -> float:
    return MEASURED[name][1][TYPES.index(kind)]


def result(name: str, kind: str) -> TrialResult:
    """Sixteen chunks around the mean, with its standard error of 3 %."""
    n, kld = 16, measured(name, kind)
    klds = tuple(100 * kld * (1 + 0.12 * (-1) ** chunk) for chunk in range(n))
    return TrialResult(f"{name}={kind}", tuple(range(n)), (100,) * n, klds, (100,) * n, (0.0,) * n, (0.0,) * n)


def deviations(found: CostModel, probed: Mapping[str, tuple[str, ...]]) -> dict[str, list[float]]:
    """By type, the log of what trials that were not used would be predicted to measure, over what they did."""
    return {
        kind: [
            math.log((found.cost(RoundedTensor(name, kind)) + found.background.at(name)) / measured(name, kind))
            for name in MEASURED
            if kind not in probed[name]
        ]
        for kind in TYPES
    }


def staggered(low: str, high: str) -> dict[str, tuple[str, ...]]:
    """Every tensor at one type, and of each kind every fourth at another: one kind begins where the other ends."""
    kinds = list(dict.fromkeys(map(component, MEASURED)))
    seen = dict.fromkeys(kinds, 0)
    chosen = {}
    for name in MEASURED:
        kind = component(name)
        chosen[name] = (low, high) if (seen[kind] + kinds.index(kind)) % 4 == 0 else (low,)
        seen[kind] += 1
    return chosen


def test_the_demo_model_s_other_types_are_predicted_from_one_trial_a_tensor_and_a_few_of_another_type() -> None:
    """Of 39 trials the other 141, whose KLD is between 4e-6 and 0.08, to an eighth (standard deviation of the log)."""
    probed = staggered("q3_k", "q6_k")
    assert sum(map(len, probed.values())) == 39
    found = model(probed)
    by_type = deviations(found, probed)
    everything = [each for kind in by_type.values() for each in kind]
    assert len(everything) == 141
    assert float(np.sqrt(np.mean(np.square(everything)))) < 0.16
    for kind, each in by_type.items():
        assert each == [] or abs(float(np.median(each))) < 0.15, kind
    assert {layer: found.background.at(f"blk.{layer}.attn_q.weight") for layer in range(4)} == pytest.approx(
        {0: 1.4e-5, 1: 1.2e-5, 2: 9e-6, 3: 5e-6}, rel=0.15
    )


def test_a_tensor_that_hardly_matters_costs_next_to_nothing() -> None:
    """Its trials measured background: at Q4_K 1.4e-5, at Q2_K 3.1e-5."""
    found = model(staggered("q3_k", "q6_k"))
    name = "blk.0.attn_q.weight"
    assert 0 < found.cost(RoundedTensor(name, "q4_k")) < 4e-6
    assert found.cost(RoundedTensor(name, "q2_k")) == pytest.approx(measured(name, "q2_k") - 1.4e-5, rel=0.3)


def test_a_measured_type_costs_its_kld_less_the_background() -> None:
    found = model(staggered("q3_k", "q6_k"))
    for name in MEASURED:
        expected = measured(name, "q3_k") - found.background.at(name)
        assert found.cost(RoundedTensor(name, "q3_k")) == pytest.approx(expected, rel=1e-9)
