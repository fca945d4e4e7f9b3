"""With and without imatrix: the difference and its error are what a plain computation says, and the rule's borders hold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from imatrix_runner.engines.files.token_scores import TOKEN
from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.ab_verdict import LITTLE, MUCH, RULE, Comparison, compare, verdict_by_rule
from imatrix_runner.evaluate.kld_statistics import summarise

N = 4000
Tokens = npt.NDArray[np.void]


@pytest.fixture(scope="module")
def pair() -> tuple[Tokens, Tokens]:
    """A level and its baseline: hard words are hard for both, and the baseline is a fifth further away."""
    chance = np.random.default_rng(7)
    hardness = chance.gamma(0.6, 1.0, N)
    return scored(chance, hardness, 0.040), scored(chance, hardness, 0.050)


def scored(chance: np.random.Generator, hardness: npt.NDArray[np.float64], kld: float) -> Tokens:
    tokens = np.zeros(N, TOKEN)
    tokens["base"] = 3 * hardness
    tokens["nll"] = tokens["base"] + kld * hardness * (1 + chance.normal(0, 1, N))
    tokens["kld"] = kld * hardness * (1 + 0.2 * chance.normal(0, 1, N))
    tokens["same"] = hardness * (1 + 0.1 * chance.normal(0, 1, N)) < 1.5
    return tokens


def paired(pair: tuple[Tokens, Tokens]) -> Comparison:
    return compare("Q4_K_M", summarise(pair[0]), summarise(pair[1]), pair)


def apart(pair: tuple[Tokens, Tokens]) -> Comparison:
    return compare("Q4_K_M", summarise(pair[0]), summarise(pair[1]))


def error_of_mean(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def test_paired_differences_are_those_of_a_plain_computation(pair: tuple[Tokens, Tokens]) -> None:
    found = paired(pair)
    one, other = ([{name: float(token[name]) for name in TOKEN.names or ()} for token in tokens] for tokens in pair)
    klds = [mine["kld"] - theirs["kld"] for mine, theirs in zip(one, other, strict=True)]
    same = [mine["same"] - theirs["same"] for mine, theirs in zip(one, other, strict=True)]
    ppl, ppl_other = (math.exp(math.fsum(token["nll"] for token in tokens) / N) for tokens in (one, other))
    steps = [ppl * mine["nll"] - ppl_other * theirs["nll"] for mine, theirs in zip(one, other, strict=True)]
    mine, theirs = (math.fsum(token["kld"] for token in tokens) for tokens in (one, other))
    rest = [a["kld"] - mine / theirs * b["kld"] for a, b in zip(one, other, strict=True)]
    assert_close(found.kld, math.fsum(klds) / N, error_of_mean(klds))
    assert_close(found.same_top, math.fsum(same) / N, error_of_mean(same))
    assert_close(found.ppl, ppl - ppl_other, error_of_mean(steps))
    assert_close(found.saved, 1 - mine / theirs, error_of_mean(rest) / (theirs / N))


def assert_close(found: Estimate, value: float, error: float) -> None:
    """Equal but for rounding."""
    assert found.value == pytest.approx(value, rel=1e-4, abs=1e-9)
    assert found.error == pytest.approx(error, rel=1e-4)


def test_errors_are_those_that_another_draw_of_words_would_make(pair: tuple[Tokens, Tokens]) -> None:
    """Measured on 400 resampled texts: how far the figures scatter is the error that is told."""
    chance = np.random.default_rng(3)
    told = paired(pair)
    draws = [paired((pair[0][words], pair[1][words])) for words in (chance.integers(0, N, N) for _ in range(400))]
    for name in ("saved", "kld", "ppl", "same_top"):
        scatter = np.std([getattr(draw, name).value for draw in draws])
        assert getattr(told, name).error == pytest.approx(scatter, rel=0.15), name


def test_pairing_knows_the_difference_better_than_two_separate_measurements(pair: tuple[Tokens, Tokens]) -> None:
    together, alone = paired(pair), apart(pair)
    for name in ("saved", "kld", "ppl", "same_top"):
        one, other = getattr(together, name), getattr(alone, name)
        assert one.value == pytest.approx(other.value, rel=1e-5, abs=1e-9), name
        assert one.error < other.error / 2, name
    assert together.sure


def test_without_tokens_the_two_count_as_independent(pair: tuple[Tokens, Tokens]) -> None:
    one, other = summarise(pair[0]), summarise(pair[1])
    found = apart(pair)
    assert_close(found.kld, one.kld.value - other.kld.value, math.hypot(one.kld.error, other.kld.error))
    ratio = one.kld.value / other.kld.value
    assert found.saved.error == pytest.approx(
        ratio * math.hypot(one.kld.error / one.kld.value, other.kld.error / other.kld.value)
    )


def test_a_baseline_that_is_the_same_saves_nothing_and_exactly_nothing(pair: tuple[Tokens, Tokens]) -> None:
    """As Q8_0, which makes no use of an imatrix: no figure may differ by as much as a rounding."""
    found = paired((pair[0], pair[0]))
    assert (found.saved, found.kld, found.ppl, found.same_top) == (Estimate(0.0, 0.0),) * 4
    assert (found.verdict, found.sure) == ("not needed", False)


@pytest.mark.parametrize(
    ("saved", "verdict"),
    [
        (-0.5, "not needed"),
        (0.0, "not needed"),
        (math.nextafter(LITTLE, 0), "not needed"),
        (LITTLE, "take it"),
        (MUCH, "take it"),
        (math.nextafter(MUCH, 1), "do not go without"),
        (1.0, "do not go without"),
    ],
)
def test_the_rule_at_its_borders(saved: float, verdict: str) -> None:
    assert verdict_by_rule(saved) == verdict


def test_the_rule_that_is_printed_is_the_one_that_is_applied() -> None:
    assert "less than 3 %" in RULE.replace("3%", "3 %")
    assert "more than 10 %" in RULE.replace("10%", "10 %")
    assert (LITTLE, MUCH) == (0.03, 0.10)


@pytest.mark.parametrize(("error", "sure"), [(0.004, True), (0.006, False)])
def test_sure_is_more_than_two_standard_errors(error: float, sure: bool, pair: tuple[Tokens, Tokens]) -> None:
    level = summarise(pair[0])
    mine, theirs = replace(level, kld=Estimate(0.99, 0.0)), replace(level, kld=Estimate(1.0, error))
    found = compare("Q4_K_M", mine, theirs)
    assert found.saved.value == pytest.approx(0.01)
    assert found.sure is sure


@pytest.mark.parametrize(
    ("with_imatrix", "error", "n_tokens", "verdict"),
    [
        (0.5, 0.01, 4000, "do not go without"),
        (0.5, 0.3, 4000, "undecided"),  # half is saved, or nothing
        (0.95, 0.03, 4000, "undecided"),
        (0.99, 0.02, 4000, "not needed"),  # at most a twentieth
        (1.2, 0.3, 4000, "undecided"),
        (1.2, 0.01, 4000, "not needed"),
        (0.5, 0.0, 5, "undecided"),  # too few tokens for an error
    ],
)
def test_a_verdict_takes_enough_tokens(
    with_imatrix: float, error: float, n_tokens: int, verdict: str, pair: tuple[Tokens, Tokens]
) -> None:
    level = replace(summarise(pair[0]), n_tokens=n_tokens)
    mine, baseline = replace(level, kld=Estimate(with_imatrix, 0.0)), replace(level, kld=Estimate(1.0, error / with_imatrix))
    found = compare("Q4_K_M", mine, baseline)
    assert found.verdict == verdict
    assert found.remark == ("too few tokens" if verdict == "undecided" else found.remark)


def test_what_is_rounding_has_nothing_to_save(pair: tuple[Tokens, Tokens]) -> None:
    level = summarise(pair[0])
    found = compare("F16", replace(level, kld=Estimate(1e-6, 1e-8)), replace(level, kld=Estimate(3e-6, 1e-8)))
    assert found.verdict == "not needed"


def test_a_baseline_without_divergence_has_nothing_to_save(pair: tuple[Tokens, Tokens]) -> None:
    level = summarise(pair[0])
    found = compare("F16", replace(level, kld=Estimate(0.0, 0.0)), replace(level, kld=Estimate(0.0, 0.0)))
    assert (found.saved, found.verdict, found.sure) == (Estimate(0.0, 0.0), "not needed", False)
