"""Which level to take: never one that another beats in size and divergence, and the one that meets a target."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.evaluate.picks import NEAR_SOURCE, USABLE, Measure, front, recommend, target

measures = st.lists(
    st.builds(
        Measure,
        level=st.sampled_from([f"L{number}" for number in range(40)]),
        n_bytes=st.integers(1, 50),
        kld=st.floats(0, 2, allow_subnormal=False) | st.just(0.0),
        same_top=st.floats(0, 1) | st.none(),
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
    on_front = {each.level for each in front(measures)}
    assert len(picks) <= 3
    assert len({pick.level for pick in picks}) == len(picks)
    assert {pick.level for pick in picks} <= on_front
    assert bool(picks) == bool(measures)
    by_name = {each.level: each for each in measures}
    quality = next((by_name[pick.level] for pick in picks if pick.why == "quality"), None)
    if quality is not None and any(each.kld <= NEAR_SOURCE for each in measures):
        assert quality.kld <= NEAR_SOURCE
        assert quality.n_bytes == min(each.n_bytes for each in measures if each.kld <= NEAR_SOURCE)
    for pick in picks:
        agreement = by_name[pick.level].same_top
        if pick.why == "small":
            assert agreement is not None
        if pick.why in ("small", "balanced"):
            assert agreement is None or agreement >= USABLE


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


def test_nothing_measured_nothing_recommended() -> None:
    assert recommend([]) == ()
    assert front([]) == []


@given(measures, st.floats(0.001, 2) | st.none(), st.integers(1, 50) | st.none())
def test_a_target_is_met_by_the_best_level_that_meets_it(
    measures: list[Measure], kld: float | None, n_bytes: int | None
) -> None:
    if kld is None and n_bytes is None:
        return
    meeting = [each for each in measures if (kld is None or each.kld <= kld) and (n_bytes is None or each.n_bytes <= n_bytes)]
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
