"""A mix against the stock levels of its size: interpolated between two, paired by chunks, and said in words."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.mix_verdict import MeasuredSize, MixVerdict, against_stock, describe

MIB = 1 << 20


def measured(
    name: str, mib: float, kld: float, error: float = 0.0, chunks: npt.NDArray[np.float64] | None = None
) -> MeasuredSize:
    return MeasuredSize(name, int(mib * MIB), Estimate(kld, error), chunks)


STOCK = (measured("Q2_K", 100, 0.4), measured("Q3_K_M", 200, 0.1), measured("Q4_K_M", 400, 0.025))


def verdict(mix: MeasuredSize, stock: tuple[MeasuredSize, ...] = STOCK, chosen_against: str = "Q3_K_M") -> MixVerdict:
    found = against_stock(mix, stock, chosen_against)
    assert found is not None
    return found


@pytest.mark.parametrize("mib", [100 * 2**0.5, 150, 390])
def test_between_two_levels_log_kld_is_linear_in_log_bytes(mib: float) -> None:
    """The stock levels have a KLD of 4000 / MiB^2; so has stock between them."""
    found = verdict(measured("MIX", mib, 0.5 * 4000 / mib**2))
    assert found.ratio.value == pytest.approx(0.5)
    assert [each.level for each in found.stock] == (["Q2_K", "Q3_K_M"] if mib < 200 else ["Q3_K_M", "Q4_K_M"])


def test_the_nearest_in_size_is_named() -> None:
    assert verdict(measured("MIX", 210, 0.05)).nearest == "Q3_K_M"
    assert verdict(measured("MIX", 390, 0.05)).nearest == "Q4_K_M"


def test_a_level_of_the_same_size_is_compared_with_alone() -> None:
    found = verdict(measured("MIX", 199.95, 0.08))
    assert [each.level for each in found.stock] == ["Q3_K_M"]
    assert found.ratio.value == pytest.approx(0.8)


def test_stock_that_other_stock_beats_does_not_count() -> None:
    """A large level with a large KLD would make every mix of its size look good."""
    found = verdict(measured("MIX", 300, 0.05), (*STOCK, measured("Q4_0", 301, 0.2)))
    assert [each.level for each in found.stock] == ["Q3_K_M", "Q4_K_M"]


def test_beyond_the_ends_it_is_compared_with_the_level_it_was_chosen_against() -> None:
    assert [each.level for each in verdict(measured("MIX", 90, 0.3), chosen_against="Q2_K").stock] == ["Q2_K"]
    assert [each.level for each in verdict(measured("MIX", 500, 0.01), chosen_against="Q4_K_M").stock] == ["Q4_K_M"]
    assert against_stock(measured("MIX", 500, 0.01), STOCK, "Q5_K_M") is None
    assert against_stock(measured("MIX", 150, 0.2), STOCK[:1], "Q3_K_M") is None


def test_a_divergence_of_nothing_is_compared_with_nothing() -> None:
    assert against_stock(measured("MIX", 150, 0.0), STOCK, "Q2_K") is None
    assert against_stock(measured("MIX", 150, 0.1), (measured("BF16", 150, 0.0),), "BF16") is None


def test_the_error_is_that_of_the_ratio_over_texts() -> None:
    """As spread as the ratios that resampled chunks give; chunks that are hard for one level are hard for the others."""
    rng = np.random.default_rng(3)
    hard = rng.lognormal(0, 1, 200)
    small, large, mix = (hard * kld * rng.lognormal(0, 0.2, 200) for kld in (0.1, 0.025, 0.03))

    def sized(name: str, mib: float, chunks: npt.NDArray[np.float64]) -> MeasuredSize:
        return measured(name, mib, float(chunks.mean()), float(chunks.std(ddof=1)) / math.sqrt(len(chunks)), chunks)

    found = verdict(sized("MIX", 283, mix), (sized("Q3_K_M", 200, small), sized("Q4_K_M", 400, large)))
    ratios = []
    for _ in range(2000):
        at = rng.integers(0, 200, 200)
        again = verdict(sized("MIX", 283, mix[at]), (sized("Q3_K_M", 200, small[at]), sized("Q4_K_M", 400, large[at])))
        ratios.append(again.ratio.value)
    assert found.ratio.error == pytest.approx(np.std(ratios), rel=0.1)


def test_without_chunks_the_error_is_an_upper_bound() -> None:
    found = verdict(measured("MIX", 200, 0.05, 0.005), (measured("Q3_K_M", 200, 0.1, 0.02),))
    assert found.ratio.error == pytest.approx(0.5 * math.hypot(0.1, 0.2))


def test_better_is_by_two_standard_errors() -> None:
    chunks = np.array([1.0, 1.0])
    assert verdict(measured("MIX", 200, 0.09, 0, 0.09 * chunks), (measured("Q3_K_M", 200, 0.1, 0, 0.1 * chunks),)).is_better
    assert not verdict(measured("MIX", 200, 0.09, 0.006), (measured("Q3_K_M", 200, 0.1),)).is_better


def test_the_typical_chunk_counts_where_one_chunk_decides_the_whole() -> None:
    """Twenty chunks improve by a tenth; the one that is half of the divergence does not, and makes the mean uncertain."""
    stock = np.array([1.0] * 20 + [20.0])
    mix = np.array([0.9] * 10 + [0.88] * 10 + [20.0])

    def sized(name: str, chunks: npt.NDArray[np.float64]) -> MeasuredSize:
        return measured(name, 200, float(chunks.mean()), 0, chunks)

    found = verdict(sized("MIX", mix), (sized("Q3_K_M", stock),))
    assert found.ratio.value + 2 * found.ratio.error > 1
    assert found.typical is not None
    assert found.typical.value == pytest.approx(math.exp(np.log(mix / stock).mean()))
    assert found.is_better
    worse = verdict(sized("MIX", np.array([0.9] * 20 + [24.0])), (sized("Q3_K_M", stock),))
    assert not worse.is_better, "what is worse over all tokens is not better"


def test_words() -> None:
    won = verdict(measured("MIX", 200, 0.05, 0.001))
    assert describe(won, "held.txt") == "MIX is better than stock on held.txt: its KLD is 0.50 ± 0.01 of that of Q3_K_M."
    lost = verdict(measured("MIX", 210, 0.1, 0.001))
    assert describe(lost, "held.txt") == (
        "MIX is not better than stock on held.txt by 2 standard errors: its KLD is 1.10 ± 0.01 of that of stock between Q3_K_M "
        "and Q4_K_M. Take Q3_K_M (200.00 MiB) instead."
    )


def test_levels_measured_on_different_numbers_of_chunks_are_compared_on_those_that_all_have() -> None:
    """The later chunks are ten times as hard, and the stock level was not measured on them."""
    hard = np.concatenate((np.full(12, 0.1), np.full(12, 1.0)))
    mix = measured("MIX", 200, float(0.8 * hard.mean()), 0.01, 0.8 * hard)
    stock = measured("Q3_K_M", 200, 0.1, 0.01, hard[:12])
    found = verdict(mix, (stock,))
    assert found.ratio.value == pytest.approx(0.8)
    assert found.typical is not None
    assert found.typical.value == pytest.approx(0.8)
    assert found.kld == mix.kld  # the figure that tables show
