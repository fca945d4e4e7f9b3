"""Costs of types: exact where they were measured, a power law elsewhere, never the wrong way round, never of zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, Trial, TrialResult
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.mixes.sensitivity import COMMON_ERROR, EXPONENTS, CostModel, mean_kld, noise_floor

TYPES = {"Q2_K": 0.06, "Q3_K": 0.02, "IQ4_XS": 0.006, "Q4_K": 0.005, "Q5_K": 0.0015, "Q6_K": 0.0004, "Q8_0": 0.00003}
"""Types with relative errors."""
NORM = 50.0
CHUNKS = tuple(range(16))


def rounded(name: str, kind: str, weighted: bool = True) -> RoundedTensor:
    return RoundedTensor(name, kind, weighted)


def error(name: str, kind: str, relative: float, weighted: bool = True) -> RoundingError:
    return RoundingError(rounded(name, kind, weighted), relative * NORM, relative * NORM / 3, NORM)


def errors_of(*names: str) -> list[RoundingError]:
    return [error(name, kind, relative) for name in names for kind, relative in TYPES.items()]


def result(trial: str, klds: Sequence[float], tokens: int = 100) -> TrialResult:
    """``klds``: the mean of each chunk."""
    n = len(klds)
    none = (0.0,) * n
    return TrialResult(trial, tuple(range(n)), (tokens,) * n, tuple(kld * tokens for kld in klds), (tokens,) * n, none, none)


def trial(name: str, kind: str, kld: float, noise: Sequence[float] = (0.01, -0.01) * 8) -> tuple[Trial, TrialResult]:
    """One tensor as one type; its chunks are around ``kld``, in proportion to it."""
    return Trial(f"{name} {kind}", (rounded(name, kind),)), result(f"{name} {kind}", [kld * (1 + each) for each in noise])


def model(errors: Sequence[RoundingError], *measured: tuple[Trial, TrialResult]) -> CostModel:
    return CostModel.of(errors, [each for each, _ in measured], [each for _, each in measured])


# Means and their errors


def test_the_standard_error_is_that_of_a_plain_computation() -> None:
    kld, tokens = (3.0, 5.0, 1.0, 7.0), (10, 20, 10, 20)
    found = mean_kld(replace(result("a", [0.0] * 4), kld=kld, tokens=tokens))
    assert found.value == pytest.approx(16 / 60)
    residuals = [each - 16 / 60 * count for each, count in zip(kld, tokens, strict=True)]
    assert found.error == pytest.approx(math.sqrt(sum(each**2 for each in residuals) / 3 * 4) / 60)


def test_the_standard_error_is_how_far_repeated_trials_scatter() -> None:
    chance = np.random.default_rng(2)
    draws = [mean_kld(result("a", chance.gamma(1.0, 0.02, 32).tolist())) for _ in range(600)]
    scatter = float(np.std([draw.value for draw in draws]))
    assert float(np.mean([draw.error for draw in draws])) == pytest.approx(scatter, rel=0.1)


def test_one_chunk_has_no_standard_error() -> None:
    assert mean_kld(result("a", [0.5])).error == math.inf


@pytest.mark.parametrize("kld", [math.nan, math.inf, -math.inf])
def test_a_trial_that_is_not_finite_is_an_error(kld: float) -> None:
    broken = trial("blk.0.attn_q.weight", "Q4_K", 0.1)
    broken = broken[0], replace(broken[1], kld=(kld, -kld, *broken[1].kld[2:]))
    with pytest.raises(InvalidDataError, match=r"The trial blk\.0\.attn_q\.weight Q4_K has no usable result"):
        model(errors_of("blk.0.attn_q.weight"), broken)


def test_a_trial_without_tokens_is_an_error() -> None:
    with pytest.raises(InvalidDataError, match="it scored no token"):
        mean_kld(result("a", [0.0, 0.0], tokens=0))


@pytest.mark.parametrize("weighted", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_an_error(weighted: float) -> None:
    errors = [*errors_of("a"), RoundingError(rounded("b", "Q4_K"), weighted, 1.0, 1.0)]
    with pytest.raises(InvalidDataError, match="The rounding error of b as Q4_K is not a finite number"):
        model(errors, trial("a", "Q4_K", 0.1))


def test_without_any_trial_nothing_is_predicted() -> None:
    with pytest.raises(InvalidDataError, match="no trial of a tensor has a result"):
        CostModel.of(errors_of("a"), [Trial("a Q4_K", (rounded("a", "Q4_K"),))], [])


# One tensor


def test_measured_types_cost_what_was_measured() -> None:
    found = model(errors_of("a"), trial("a", "Q2_K", 0.5), trial("a", "Q4_K", 0.03), trial("a", "Q6_K", 0.004))
    for kind, kld in {"Q2_K": 0.5, "Q4_K": 0.03, "Q6_K": 0.004}.items():
        assert found.cost(rounded("a", kind)) == pytest.approx(kld, rel=1e-12)


def test_between_trials_log_kld_is_linear_in_log_error() -> None:
    found = model(errors_of("a"), trial("a", "Q2_K", 0.5), trial("a", "Q4_K", 0.03))
    share = math.log(TYPES["Q3_K"] / TYPES["Q4_K"]) / math.log(TYPES["Q2_K"] / TYPES["Q4_K"])
    assert found.cost(rounded("a", "Q3_K")) == pytest.approx(0.03 * (0.5 / 0.03) ** share, rel=1e-9)


def test_one_trial_is_continued_in_proportion_to_the_error() -> None:
    found = model(errors_of("a"), trial("a", "Q4_K", 0.03))
    for kind, relative in TYPES.items():
        assert found.cost(rounded("a", kind)) == pytest.approx(0.03 * relative / TYPES["Q4_K"], rel=1e-9)


def test_beyond_two_sure_trials_their_exponent_goes_on() -> None:
    """Sixteen chunks that scatter by a hundredth determine it."""
    found = model(errors_of("a"), *(trial("a", kind, 5 * TYPES[kind] ** 1.3) for kind in ("Q3_K", "Q5_K")))
    for kind in ("Q2_K", "Q6_K", "Q8_0"):
        assert found.cost(rounded("a", kind)) == pytest.approx(5 * TYPES[kind] ** 1.3, rel=0.02)
    assert found.sensitivity("a").exponent == pytest.approx(1.3, abs=0.01)


def test_exponents_stay_in_their_range() -> None:
    steep, flat = (lambda kind: TYPES[kind] ** 5 * 1e8), (lambda kind: TYPES[kind] ** 0.1)
    for law, exponent in ((steep, EXPONENTS[1]), (flat, EXPONENTS[0])):
        found = model(errors_of("a"), *(trial("a", kind, law(kind)) for kind in ("Q4_K", "Q5_K")))
        rise = found.cost(rounded("a", "Q2_K")) / found.cost(rounded("a", "Q3_K"))
        assert rise == pytest.approx((TYPES["Q2_K"] / TYPES["Q3_K"]) ** exponent, rel=1e-9)


def test_trials_of_nearly_the_same_error_determine_no_exponent() -> None:
    found = model(errors_of("a"), trial("a", "IQ4_XS", 0.03), trial("a", "Q4_K", 0.02))
    assert found.cost(rounded("a", "Q2_K")) == pytest.approx(0.03 * 10, rel=1e-9)
    assert found.cost(rounded("a", "Q6_K")) == pytest.approx(0.02 * 0.08, rel=1e-9)


def test_a_type_without_error_costs_nothing() -> None:
    found = model([*errors_of("a"), error("a", "BF16", 0.0)], trial("a", "Q4_K", 0.03))
    assert found.cost(rounded("a", "BF16")) == 0.0


def test_a_tensor_of_zeros_costs_nothing() -> None:
    zeros = RoundingError(rounded("zeros", "Q4_K"), 0.0, 0.0, 0.0)
    found = model([*errors_of("a"), zeros], trial("a", "Q4_K", 0.03), trial("zeros", "Q4_K", 0.0))
    assert found.cost(rounded("zeros", "Q4_K")) == 0.0


def test_of_two_results_of_one_trial_the_one_with_more_tokens_counts() -> None:
    short, long = result("a", [0.5] * 4), result("a", [0.3] * 16)
    for results in ([short, long], [long, short]):
        found = CostModel.of(errors_of("a"), [Trial("a", (rounded("a", "Q4_K"),))], results)
        assert found.cost(rounded("a", "Q4_K")) == pytest.approx(0.3)


def test_with_and_without_imatrix_each_has_its_own_trials() -> None:
    """What is measured without is believed, though its error is larger; the rest follows from the errors."""
    names = [error(name, kind, 2 * relative, False) for name in "ab" for kind, relative in TYPES.items()]
    bare = Trial("bare", (rounded("a", "Q4_K", False),)), result("bare", [0.02] * 16)
    found = model([*errors_of("a", "b"), *names], trial("a", "Q4_K", 0.03), bare, trial("b", "Q4_K", 0.03))
    assert found.cost(rounded("a", "Q4_K", False)) == pytest.approx(0.02)
    assert found.cost(rounded("a", "Q6_K", False)) < found.cost(rounded("a", "Q6_K"))
    assert found.cost(rounded("b", "Q4_K", False)) == pytest.approx(0.06)


RELATIVE = st.floats(1e-7, 0.5)
KLDS = st.floats(0.0, 3.0)


@given(
    st.lists(RELATIVE, min_size=2, max_size=9),
    st.lists(KLDS, min_size=1, max_size=4),
    st.lists(st.floats(-0.9, 0.9), min_size=2, max_size=4),
)
def test_a_larger_error_never_costs_less(relative: list[float], klds: list[float], noise: list[float]) -> None:
    """Measured types count only where trials do not contradict each other."""
    kinds = [f"T{n}" for n in range(len(relative))]
    probed = dict(zip(kinds, klds, strict=False))
    errors = [error("a", kind, each) for kind, each in zip(kinds, relative, strict=True)]
    found = model(errors, *(trial("a", kind, kld, noise) for kind, kld in probed.items()))
    by_error = sorted(zip(relative, kinds, strict=True))
    seen = [found.cost(rounded("a", kind)) for _, kind in by_error if kind in probed]
    consistent = seen == sorted(seen) and len(set(relative)) == len(relative)
    costs = [found.cost(rounded("a", kind)) for _, kind in by_error if consistent or kind not in probed]
    assert all(after >= before * (1 - 1e-9) for before, after in pairwise(costs))
    assert all(0 < cost < math.inf for cost in costs)
    for kind, kld in probed.items():
        mean = mean_kld(trial("a", kind, kld, noise)[1]).value
        assert found.cost(rounded("a", kind)) == pytest.approx(max(mean, found.floor), rel=1e-9)


# Noise


def test_the_floor_is_above_what_rounding_errors_make_negative() -> None:
    quiet = [result("a", [0.1, 0.2]), result("b", [0.0, 0.0])]
    noisy = [*quiet, result("c", [-3e-7, 4e-7])]
    assert 0 < noise_floor(quiet) < 1e-8
    assert noise_floor(noisy) == pytest.approx(6e-7)
    assert noise_floor([]) == noise_floor(quiet)


@pytest.mark.parametrize("kld", [0.0, -1e-7, 1e-12])
def test_no_kld_costs_the_floor(kld: float) -> None:
    found = model(errors_of("a", "b"), trial("a", "Q4_K", kld), trial("b", "Q4_K", 0.03))
    assert found.cost(rounded("a", "Q4_K")) == pytest.approx(found.floor)
    assert found.cost(rounded("a", "Q2_K")) == pytest.approx(found.floor * 12)


def test_trials_that_are_lost_in_noise_determine_no_exponent() -> None:
    """Their chunks scatter by more than they are: they would say 0."""
    wild = (4.0, -0.9, -0.9, -0.9, -0.4, -0.9)
    found = model(errors_of("a"), trial("a", "Q5_K", 0.01, wild), trial("a", "Q4_K", 0.01, wild))
    assert found.cost(rounded("a", "Q2_K")) == pytest.approx(0.01 * TYPES["Q2_K"] / TYPES["Q4_K"], rel=1e-9)


def test_exponents_that_are_uncertain_move_to_the_model_s() -> None:
    """Chunks of two trials disagree by their noise; fifteen tensors have an exponent of 1.2."""
    names = [f"blk.{n}.ffn_up.weight" for n in range(15)]
    clean = [trial(name, kind, TYPES[kind] ** 1.2) for name in names for kind in ("Q3_K", "Q5_K")]
    calm, wild = (0.1, -0.1) * 2, (0.6, -0.6) * 2
    doubtful = [trial("a", "Q3_K", TYPES["Q3_K"] ** 0.6, wild), trial("a", "Q5_K", TYPES["Q5_K"] ** 0.6, calm)]
    found = model(errors_of(*names, "a"), *clean, *doubtful)
    rise = found.cost(rounded("a", "Q6_K")) / found.cost(rounded("a", "Q8_0"))
    exponent = math.log(rise) / math.log(TYPES["Q6_K"] / TYPES["Q8_0"])
    assert 1.0 < exponent < 1.2


def test_chunks_that_are_hard_for_both_trials_do_not_blur_the_exponent() -> None:
    """Each KLD scatters threefold, and their ratio not at all."""
    hard = (2.0, -0.9, -0.8, 0.7, -0.9, 1.5, -0.7, -0.9)
    found = model(errors_of("a"), *(trial("a", kind, TYPES[kind] ** 0.7, hard) for kind in ("Q3_K", "Q5_K")))
    rise = found.cost(rounded("a", "Q6_K")) / found.cost(rounded("a", "Q8_0"))
    assert math.log(rise) / math.log(TYPES["Q6_K"] / TYPES["Q8_0"]) == pytest.approx(0.7, abs=1e-6)


def test_a_law_is_found_again_from_noisy_trials_of_two_types() -> None:
    """A model of 60 tensors with sensitivities and exponents of their own: types that were not tried are within a fifth, in the
    median, and rank as they should."""
    chance = np.random.default_rng(11)
    names = [
        f"blk.{layer}.{kind}.weight"
        for layer in range(12)
        for kind in ("attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down")
    ]
    truth = {name: (math.exp(chance.normal(0, 1.5)), chance.normal(1.05, 0.12)) for name in names}
    hard = chance.gamma(2.0, 0.5, (16,))

    def measured(name: str, kind: str) -> tuple[Trial, TrialResult]:
        kld = truth[name][0] * TYPES[kind] ** truth[name][1]
        own = hard * chance.gamma(8.0, 1 / 8.0, 16)
        return trial(name, kind, kld, (own / hard.mean() - 1).tolist())

    found = model(errors_of(*names), *(measured(name, kind) for name in names for kind in ("Q3_K", "Q5_K")))
    pairs = [
        (math.log(truth[name][0] * TYPES[kind] ** truth[name][1]), math.log(found.cost(rounded(name, kind))))
        for name in names
        for kind in ("Q2_K", "IQ4_XS", "Q4_K", "Q6_K", "Q8_0")
    ]
    true, told = np.array(pairs).T
    assert float(np.median(np.abs(true - told))) < 0.2
    assert float(np.corrcoef(true, told)[0, 1]) > 0.99


# Tensors without a trial of their own


def test_a_tensor_without_trial_is_taken_for_the_median_of_its_kind() -> None:
    down = [f"blk.{n}.ffn_down.weight" for n in range(4)]
    names = (*down, "blk.0.attn_q.weight", "output.weight")
    klds = dict(zip(names, (0.01, 0.03, 0.9), strict=False)) | {"blk.0.attn_q.weight": 0.002}
    found = model(errors_of(*names), *(trial(name, "Q4_K", kld) for name, kld in klds.items()))
    for kind, relative in TYPES.items():
        assert found.cost(rounded(down[3], kind)) == pytest.approx(0.03 * relative / TYPES["Q4_K"], rel=1e-9)
    assert not found.sensitivity(down[3]).measured
    assert found.sensitivity(down[3]).kld.error == math.inf
    # No output.weight was tried: the median of all.
    assert found.cost(rounded("output.weight", "Q4_K")) == pytest.approx(math.sqrt(0.01 * 0.03), rel=1e-9)


def test_a_trial_of_several_tensors_is_divided_among_them() -> None:
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")
    errors = [error(name, "Q4_K", share) for name, share in zip(names, (0.001, 0.002, 0.003), strict=True)]
    together = Trial("blk.0 attention", tuple(rounded(name, "Q4_K") for name in names))
    found = CostModel.of(errors, [together], [result("blk.0 attention", [0.06] * 16)])
    costs = [found.cost(rounded(name, "Q4_K")) for name in names]
    assert costs == pytest.approx([0.01, 0.02, 0.03])
    assert math.fsum(costs) == pytest.approx(0.06)


def test_results_of_other_trials_are_left_out() -> None:
    found = CostModel.of(errors_of("a"), [trial("a", "Q4_K", 0.03)[0]], [trial("a", "Q4_K", 0.03)[1], result("file", [9.0])])
    assert found.cost(rounded("a", "Q4_K")) == pytest.approx(0.03)


def test_sensitivities_compare_tensors_at_one_error() -> None:
    found = model(errors_of("a", "b"), trial("a", "Q4_K", 0.03), trial("b", "Q2_K", 0.03))
    a, b = found.sensitivity("a"), found.sensitivity("b")
    assert a.kld.value == pytest.approx(0.03 * COMMON_ERROR / TYPES["Q4_K"])
    assert a.kld.value / b.kld.value == pytest.approx(TYPES["Q2_K"] / TYPES["Q4_K"])
    spread = mean_kld(trial("a", "Q4_K", 0.03)[1])
    assert a.kld.error / a.kld.value == pytest.approx(spread.error / spread.value)
    assert a.measured
