"""Which level to take: never one that another beats in size and divergence, and the one that meets a target."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.evaluate.recommendations import FAR, PRECISE, USABLE, Measure, front, recommend, target, unfit
from support.reports import divergence

measures = st.lists(
    st.builds(
        Measure,
        level=st.sampled_from([f"L{number}" for number in range(40)]),
        n_bytes=st.integers(1, 50),
        kld=st.floats(0, 2, allow_subnormal=False) | st.just(0.0),
        same_top=st.floats(0, 1) | st.none(),
        error=st.sampled_from([0.0, 0.001, 0.1, math.inf]),
        eligible=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda each: each.level,
)

USUAL = [
    Measure("Q8_0", 850, 0.0008, 0.985),
    Measure("Q6_K", 656, 0.0021, 0.974),
    Measure("Q5_K_M", 568, 0.0061, 0.957),
    Measure("Q4_K_M", 489, 0.018, 0.926),
    Measure("Q4_0", 464, 0.047, 0.881),
    Measure("IQ4_XS", 443, 0.023, 0.917),
    Measure("Q3_K_M", 400, 0.061, 0.864),
    Measure("IQ2_M", 293, 0.26, 0.72),
]


def beats(one: Measure, other: Measure) -> bool:
    return one.n_bytes <= other.n_bytes and one.kld <= other.kld and (one.n_bytes, one.kld) != (other.n_bytes, other.kld)


@given(measures)
def test_the_front_holds_what_nothing_beats(measures: list[Measure]) -> None:
    best = front(measures)
    unbeaten = [each for each in measures if not any(beats(other, each) for other in measures)]
    assert {(each.n_bytes, each.kld) for each in best} == {(each.n_bytes, each.kld) for each in unbeaten}
    assert [each.n_bytes for each in best] == sorted({each.n_bytes for each in best})
    assert [each.kld for each in best] == sorted({each.kld for each in best}, reverse=True)


def test_a_level_that_a_smaller_one_beats_is_not_on_the_front() -> None:
    assert [each.level for each in front(USUAL)] == ["IQ2_M", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]


@given(measures)
def test_at_most_three_are_recommended_each_once_and_from_the_front(measures: list[Measure]) -> None:
    picks = recommend(measures)
    on_front = {each.level for each in front([each for each in measures if each.eligible])}
    assert len(picks) <= 3
    assert len({pick.level for pick in picks}) == len(picks)
    assert {pick.level for pick in picks} <= on_front
    by_name = {each.level: each for each in measures}
    for pick in picks:
        level = by_name[pick.level]
        assert level.eligible
        assert level.kld <= FAR
        assert level.same_top is None or level.same_top >= USABLE
        assert level.kld <= 1e-4 or level.error <= PRECISE * level.kld
        assert pick.why != "small" or level.same_top is not None


@given(measures)
def test_whoever_gets_no_recommendation_reads_why(measures: list[Measure]) -> None:
    assert bool(unfit(measures)) == (bool(measures) and not recommend(measures))


def test_the_usual_levels_get_a_pick_for_quality_a_bend_and_a_small_one() -> None:
    picks = {pick.why: pick.level for pick in recommend(USUAL)}
    assert picks["quality"] == "Q5_K_M"
    assert picks.get("small", picks.get("balanced")) == "IQ4_XS"


def test_without_agreement_known_there_is_a_bend_and_no_small_one() -> None:
    picks = recommend([replace(each, same_top=None) for each in USUAL])
    assert [(pick.why, pick.level) for pick in picks] == [("quality", "Q5_K_M"), ("balanced", "IQ4_XS")]


def test_without_a_level_near_the_source_the_closest_is_named_and_why() -> None:
    pick = recommend(USUAL[4:])[0]
    assert (pick.why, pick.level) == ("quality", "IQ4_XS")
    assert "none has a mean KLD of at most 0.01" in pick.rule


def test_a_level_that_is_far_from_its_source_is_not_recommended_for_quality() -> None:
    """IQ1_S of Llama-3-8B has 2.25 nats: the best of what was asked for may still be bad."""
    bad = [Measure("IQ1_S", 200, 2.25, 0.33), Measure("IQ1_M", 220, 1.39, 0.44)]
    assert recommend(bad) == ()
    assert "the closest, IQ1_M, has a mean KLD of 1.39 and the source's top token in 44.0 % of cases" in unfit(bad)
    assert recommend([Measure("Q4_0", 464, 0.047, 0.881)]) == ()  # near in the mean, but one word in eight is another


def test_a_figure_from_too_few_tokens_recommends_nothing() -> None:
    few = [Measure("Q4_K_M", 489, 0.018, 0.926, error=0.0010), Measure("Q8_0", 850, 0.0008, 0.985, error=0.0001)]
    assert recommend(few) == ()
    assert "The standard error of Q8_0's mean KLD is 12 %" in unfit(few)
    assert recommend([replace(each, error=0.04 * each.kld) for each in few])


def test_two_tokens_have_no_standard_error_and_recommend_nothing() -> None:
    found = replace(divergence(0.018), n_tokens=2)
    found = replace(found, kld=replace(found.kld, error=0.0))
    few = [Measure.of("Q4_K_M", 489, found)]
    assert recommend(few) == ()
    assert "too few tokens were scored" in unfit(few)
    pick = target(few, 0.05, None)
    assert pick is not None
    assert pick.rule.endswith("measured on too few tokens")


def test_a_level_without_any_divergence_needs_no_more_tokens() -> None:
    assert [pick.level for pick in recommend([Measure("F16", 1000, 3e-6, 0.999, error=1e-6)])] == ["F16"]


def test_the_source_itself_is_never_a_pick() -> None:
    source = Measure("Q8_0", 850, 0.0, 1.0, eligible=False)
    assert recommend([source]) == ()
    assert unfit([source]) == "No level is recommended: none is smaller than the source."
    assert "Q8_0" not in {pick.level for pick in recommend([source, *USUAL[1:]])}
    assert target([source], 0.1, None) is None


def test_nothing_measured_nothing_recommended() -> None:
    assert recommend([]) == ()
    assert front([]) == []


@given(measures, st.floats(0.001, 2) | st.none(), st.integers(1, 50) | st.none())
def test_a_target_is_met_by_the_best_level_that_meets_it(
    measures: list[Measure], kld: float | None, n_bytes: int | None
) -> None:
    if kld is None and n_bytes is None:
        return
    eligible = [each for each in measures if each.eligible]
    meeting = [each for each in eligible if (kld is None or each.kld <= kld) and (n_bytes is None or each.n_bytes <= n_bytes)]
    pick = target(measures, kld, n_bytes)
    if not meeting:
        assert pick is None
        return
    assert pick is not None
    named = next(each for each in measures if each.level == pick.level)
    assert named in meeting
    if n_bytes is None:
        assert named.n_bytes == min(each.n_bytes for each in meeting)
    else:
        assert named.kld == min(each.kld for each in meeting)


@pytest.mark.parametrize(
    ("kld", "n_bytes", "level", "rule"),
    [
        (0.05, None, "IQ4_XS", "the smallest with a mean KLD of at most 0.05"),
        (0.02, None, "Q4_K_M", "the smallest with a mean KLD of at most 0.02"),
        (None, 470, "IQ4_XS", "the closest to the source with at most 470 B"),
        (0.1, 600, "Q5_K_M", "the closest to the source with at most 600 B and a mean KLD of at most 0.1"),
    ],
)
def test_a_target_is_told_with_its_rule(kld: float | None, n_bytes: int | None, level: str, rule: str) -> None:
    pick = target(USUAL, kld, n_bytes)
    assert pick is not None
    assert (pick.why, pick.level, pick.rule) == ("target", level, rule)


def test_a_target_that_nothing_meets_names_no_level() -> None:
    assert target(USUAL, 0.0001, None) is None
    assert target(USUAL, None, 100) is None
    assert target(USUAL, 0.01, 400) is None
