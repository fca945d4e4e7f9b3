"""Files at equal size: verdicts on constructed divergences, whose true ratios are known."""

from __future__ import annotations

import numpy as np
import pytest

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.equal_size import at_equal_size, kld_ratio, size_choices
from imatrix_runner.evaluate.mix_verdict import MeasuredSize

CHUNKS = 40
HARD = np.exp(np.random.default_rng(1).normal(0, 1.0, CHUNKS))
"""How hard each chunk is, for every file."""


def file(name: str, n_bytes: int, kld: float, *, noise: float = 0.02, chunks: int = CHUNKS) -> MeasuredSize:
    draw = np.random.default_rng(sum(map(ord, name)))
    means = kld * HARD / HARD.mean() * np.exp(draw.normal(0, noise, CHUNKS))
    means *= kld / means.mean()
    return MeasuredSize(name, n_bytes, Estimate(float(means[:chunks].mean()), 0.1 * kld), means[:chunks])


LADDER = [file("Q2_K", 1000, 0.4), file("Q3_K_M", 1400, 0.1), file("Q3_K_L", 1500, 0.12), file("Q4_K_M", 2000, 0.025)]


@pytest.mark.parametrize(
    ("n_bytes", "factor", "outcome", "instead"),
    [
        (1700, 0.8, "take it", ""),
        (1700, 1.25, "take ours", "Q3_K_M"),
        (1700, 1.0, "no difference seen", ""),
        (1200, 0.9, "take it", ""),
        (2000, 1.1, "take ours", "Q4_K_M"),
    ],
)
def test_a_file_is_compared_with_the_levels_around_its_size(n_bytes: int, factor: float, outcome: str, instead: str) -> None:
    small, large = (LADDER[0], LADDER[1]) if n_bytes < 1400 else (LADDER[1], LADDER[3])  # Q3_K_L is beaten by Q3_K_M
    share = np.log(n_bytes / small.n_bytes) / np.log(large.n_bytes / small.n_bytes)
    expected = np.exp((1 - share) * np.log(small.kld.value) + share * np.log(large.kld.value))
    verdict = at_equal_size(file("theirs", n_bytes, factor * expected), LADDER)
    assert (verdict.outcome, verdict.instead) == (outcome, instead)
    assert verdict.ratio is not None
    assert verdict.ratio.value == pytest.approx(factor, rel=1e-6)
    assert verdict.ratio.low < verdict.ratio.value < verdict.ratio.high
    assert verdict.between == (("Q4_K_M",) if n_bytes == 2000 else (small.level, large.level))


@pytest.mark.parametrize(
    ("n_bytes", "why"),
    [(990, "it is smaller than Q2_K (1000 B)"), (2010, "it is larger than Q4_K_M")],
)
def test_beyond_the_ladder_there_is_no_honest_comparison(n_bytes: int, why: str) -> None:
    verdict = at_equal_size(file("theirs", n_bytes, 0.1), LADDER)
    assert (verdict.outcome, verdict.ratio) == ("no honest comparison", None)
    assert why in verdict.why


def test_without_levels_or_chunks_there_is_none_either() -> None:
    assert at_equal_size(file("theirs", 1700, 0.1), []).why == "no own level was measured on this text"
    assert "at least 8 chunks" in at_equal_size(file("theirs", 1700, 0.1, chunks=7), LADDER).why


def test_pairs_are_sharper_than_files_alone() -> None:
    """Chunks differ by a factor of ten; the same chunks are resampled for both files, so 5 % is seen all the same."""
    ratio = kld_ratio(file("a", 1, 0.1), (file("b", 1, 0.105),), (1.0,))
    assert ratio is not None
    assert ratio.lower
    assert ratio == kld_ratio(file("a", 1, 0.1), (file("b", 1, 0.105),), (1.0,))  # the seed is fixed
    noisy = kld_ratio(file("a", 1, 0.1, noise=0.5), (file("c", 1, 0.105, noise=0.5),), (1.0,))
    assert noisy is not None
    assert not noisy.lower


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    draw, inside = np.random.default_rng(7), 0
    for _ in range(200):
        hard = np.exp(draw.normal(0, 0.7, CHUNKS))
        pair = [
            MeasuredSize(name, 1, Estimate(0.1, 0.0), hard * np.exp(draw.normal(0, 0.2, CHUNKS))) for name in ("one", "other")
        ]
        ratio = kld_ratio(pair[0], pair[1:], (1.0,))
        assert ratio is not None
        inside += ratio.low <= 1 <= ratio.high
    assert 175 <= inside <= 199


def test_a_larger_file_is_taken_where_it_is_better_beyond_doubt() -> None:
    theirs = [file("T-Q3", 1410, 0.0999), file("T-Q4", 1990, 0.018), file("T-Q5", 2500, 0.0179)]
    choices = size_choices([*LADDER, *theirs])
    assert [choice.name for choice in choices] == ["Q2_K", "Q3_K_M", "T-Q4"]
    assert [choice.over for choice in choices] == ["", "Q2_K", "Q3_K_M"]
    assert size_choices([file("few", 10, 0.1, chunks=4)]) == ()
