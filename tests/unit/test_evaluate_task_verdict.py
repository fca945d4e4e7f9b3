"""Scores of tasks, paired by item: tests, verdicts, and the items that would be needed."""

from __future__ import annotations

import random

import pytest

from imatrix_runner.evaluate.tasks.task_verdict import TaskItems, compare_scores, mcnemar


def binary(lost: int, gained: int, both: int, neither: int) -> TaskItems:
    source = (1.0,) * (lost + both) + (0.0,) * (gained + neither)
    level = (0.0,) * lost + (1.0,) * (both + gained) + (0.0,) * neither
    return TaskItems("t", "acc", source, level)


@pytest.mark.parametrize(
    ("lost", "gained", "p"), [(0, 0, 1.0), (5, 5, 1.0), (8, 0, 2 / 2**8), (1, 9, 22 / 1024), (3, 1, 10 / 16)]
)
def test_mcnemar_is_exact(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


@pytest.mark.parametrize(
    ("items", "verdict"),
    [
        (binary(20, 2, 100, 78), "alarm"),
        (binary(2, 20, 100, 78), "better"),
        (binary(60, 20, 1000, 920), "worse"),  # 2 points of 2000 items
        (binary(7, 3, 20, 20), "no difference seen"),  # 8 points, but of 50 items
        (binary(0, 0, 100, 100), "no difference seen"),
    ],
)
def test_the_alarm_needs_both_five_points_and_more_than_chance(items: TaskItems, verdict: str) -> None:
    found = compare_scores(items)
    assert (found.verdict, found.test) == (verdict, "McNemar")
    assert found.difference.value == pytest.approx((found.gained - found.lost) / found.n_items)
    assert found.score.value - found.source.value == pytest.approx(found.difference.value)


def test_more_items_are_needed_the_more_of_them_differ() -> None:
    calm, restless = compare_scores(binary(3, 3, 50, 44)), compare_scores(binary(20, 20, 30, 30))
    assert 140 < calm.needed < 200 < restless.needed < 1400
    # as many items as are needed do show five points, in about four of five tries
    draw, n = random.Random(5), restless.needed
    seen = 0
    for _ in range(200):
        moves = draw.choices((-1, 1, 0), weights=(0.2 + 0.025, 0.2 - 0.025, 0.6), k=n)
        seen += mcnemar(moves.count(-1), moves.count(1)) < 0.05
    assert 0.65 < seen / 200 < 0.9


def test_other_scores_are_resampled_and_always_give_the_same() -> None:
    draw = random.Random(1)
    source = tuple(draw.random() for _ in range(120))
    lower = tuple(max(0.0, value - 0.12 - 0.1 * draw.random()) for value in source)
    found = compare_scores(TaskItems("t", "f1", source, lower))
    assert (found.verdict, found.test, found.lost) == ("alarm", "bootstrap", None)
    assert found == compare_scores(TaskItems("t", "f1", source, lower))
    assert compare_scores(TaskItems("t", "loss", source, lower, higher=False)).verdict == "better"


def test_perplexities_are_ratios_of_sums() -> None:
    draw = random.Random(2)
    words = tuple(float(draw.randrange(5, 50)) for _ in range(80))
    source = tuple(-2.0 * count * (1 + 0.2 * draw.random()) for count in words)
    worse = tuple(value * 1.1 for value in source)
    found = compare_scores(TaskItems("t", "word_perplexity", source, worse, words, higher=False, log=True))
    assert found.verdict == "alarm"
    assert found.score.value > found.source.value > 7
    same = compare_scores(TaskItems("t", "word_perplexity", source, source, words, higher=False, log=True))
    assert (same.verdict, same.difference.value) == ("no difference seen", 0.0)
