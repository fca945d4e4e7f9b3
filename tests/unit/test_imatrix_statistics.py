"""The figures of ``imatrix stats``, against values computed by hand; bounds and symmetries over any numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.imatrix.matrix import MatrixEntry
from imatrix_runner.imatrix.statistics import Statistics, TensorStatistics, locate, statistics
from support.values import entry, matrix

Q0, Q1, Q2 = (f"blk.{layer}.attn_q.weight" for layer in range(3))

mean_squares = st.lists(st.floats(0, 2.0**40, width=32), min_size=1, max_size=40)


def of(entries: Mapping[str, MatrixEntry]) -> Statistics:
    return statistics(matrix(entries))


def only(found: Statistics) -> TensorStatistics:
    (item,) = found.tensors
    return item


def test_the_figures_of_four_columns() -> None:
    # Mean squares 1, 1, 2, 4: Σ = 8, Σ² = 22, so σ² = 22/4 − 2² = 1.5, and p = 1/8, 1/8, 1/4, 1/2.
    item = only(of({Q0: entry([10, 10, 20, 40], 10)}))
    assert (item.total, item.minimum, item.maximum, item.mean, item.elements) == (8, 1, 4, 2, 4)
    assert item.deviation == pytest.approx(math.sqrt(1.5), rel=1e-7)
    assert item.entropy == 1.75
    assert item.entropy_percent == 87.5
    assert (item.active, item.active_percent) == (1, 100)
    # (4 − 2)/1.2247 = 1.63 is above 1, (2 − 2)/1.2247 is not.
    assert (item.zd, item.zd_percent) == (0.25, 25)
    assert item.cosine == 0


def test_columns_count_as_active_above_the_threshold_only() -> None:
    item = only(of({Q0: entry([0, 1e-5, 1.1e-5, 3], 1)}))
    assert item.active_percent == 50


@pytest.mark.parametrize(
    ("sums", "entropy", "percent"), [([5], 0, 0), ([0, 0], 0, 0), ([7, 0, 0, 0], 0, 0), ([3, 3, 3, 3], 2, 100)]
)
def test_entropy_at_its_ends(sums: list[float], entropy: float, percent: float) -> None:
    item = only(of({Q0: entry(sums, 3)}))
    assert (item.entropy, item.entropy_percent) == (entropy, percent)
    assert math.copysign(1, item.entropy) == 1  # or it would print as -0.0000


def test_experts_without_tokens_are_left_out_of_the_figures_but_not_of_the_coverage() -> None:
    found = of({"blk.4.ffn_up_exps.weight": entry([[2, 4], [0, 0], [30, 50]], [2, 0, 10])})
    item = only(found)
    assert (item.elements, item.total, item.minimum, item.maximum) == (4, 11, 1, 5)
    (coverage,) = found.experts
    assert (coverage.name, coverage.layer, coverage.tensor) == ("blk.4.ffn_up_exps.weight", 4, "ffn_up_exps")
    assert (coverage.experts, coverage.without_tokens) == (3, 1)
    assert (coverage.fewest, coverage.median, coverage.most) == (0, 2, 10)


def test_a_tensor_without_any_data_is_named_and_breaks_the_chain_of_layers() -> None:
    found = of({Q0: entry([1, 2], 1), Q1: entry([0, 0], 0), Q2: entry([1, 2], 1)})
    assert found.without_data == (Q1,)
    assert [(item.name, item.cosine) for item in found.tensors] == [(Q0, 0), (Q2, 0)]
    assert [item.layer for item in found.layers] == [0, 2]


def test_the_cosine_compares_sums_with_the_layer_before() -> None:
    found = of({Q0: entry([3, 4], 1), Q1: entry([30, 40], 7), Q2: entry([4, 3], 1), "output.weight": entry([3, 4], 1)})
    assert [(item.name, item.cosine) for item in found.tensors] == [
        (Q0, 0),
        (Q1, 1),
        (Q2, pytest.approx(24 / 25)),
        ("output.weight", 0),
    ]


def test_layers_are_compared_in_the_order_of_their_numbers() -> None:
    entries = {f"blk.{layer}.attn_q.weight": entry([1, layer], 1) for layer in (10, 9, 2, 11, 1)}
    cosines = {item.layer: item.cosine for item in of(entries).tensors}
    assert [layer for layer, cosine in cosines.items() if cosine == 0] == [1, 9]
    assert cosines[10] == pytest.approx((1 + 90) / math.sqrt(82 * 101))


def test_there_is_no_cosine_with_another_width_or_with_zeros() -> None:
    found = of({Q0: entry([1, 2], 1), Q1: entry([1, 2, 3], 1), Q2: entry([0, 0, 0], 1)})
    assert [item.cosine for item in found.tensors] == [0, 0, 0]


def test_layers_are_averaged_with_the_columns_as_weight() -> None:
    (layer,) = of(
        {
            "blk.5.attn_q.weight": entry([1, 1, 2, 4], 1),  # Σ 8, ZD 1/4
            "blk.5.ffn_up.weight": entry([6, 6], 1),  # Σ 12, ZD 0
            "output.weight": entry([1000], 1),
        }
    ).layers
    assert (layer.layer, layer.tensors, layer.elements) == (5, 2, 6)
    assert layer.total == pytest.approx((4 * 8 + 2 * 12) / 6)
    assert layer.zd_percent == pytest.approx(100 * (4 * 0.25) / 6)
    assert layer.cosine == 0


def test_the_sum_is_that_of_float32_one_after_the_other() -> None:
    # 2²⁴ + 1 is not a float32: each 1 after it is lost, where float64 or pairwise sums would keep them.
    item = only(of({Q0: entry([2**24, *[1] * 64], 1)}))
    assert item.total == 2**24


def test_what_overflows_float32_is_computed_in_float64() -> None:
    found = of({Q0: entry([1e30, 3e30], 1), Q1: entry([2e30, 6e30], 1)})
    item = found.tensors[1]
    assert item.deviation == pytest.approx(2e30)
    assert item.cosine == pytest.approx(1)
    assert all(math.isfinite(layer.total) for layer in found.layers)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1])
def test_numbers_that_mean_nothing_are_refused(bad: float) -> None:
    with pytest.raises(InvalidDataError, match="attn_q"):
        of({Q0: entry([1, bad], 1)})


def test_negative_counts_are_refused() -> None:
    with pytest.raises(InvalidDataError, match="attn_q"):
        of({Q0: entry([1, 2], -1)})


@pytest.mark.parametrize(
    ("name", "layer", "tensor"),
    [
        ("blk.3.attn_q.weight", 3, "attn_q"),
        ("blk.12.ffn_down_exps.weight", 12, "ffn_down_exps"),
        ("dec.blk.7.cross_attn_k.weight", 7, "cross_attn_k"),
        ("output.weight", None, "output"),
        ("blk.x.attn_q.weight", None, "attn_q"),
        ("blk.3.attn_q.bias", 3, "blk.3.attn_q.bias"),
        ("weight", None, "weight"),
        ("blk", None, "blk"),
    ],
)
def test_names_tell_layer_and_tensor(name: str, layer: int | None, tensor: str) -> None:
    assert locate(name) == (layer, tensor)


class _CountingEntries(Mapping[str, MatrixEntry]):
    """Entries that are made when looked up, and remember how often."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.asked = names, list[str]()

    def __getitem__(self, name: str) -> MatrixEntry:
        self.asked.append(name)
        return entry([1, 2, 3], 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_every_entry_is_read_once() -> None:
    names = [f"blk.{layer}.{tensor}.weight" for layer in range(12) for tensor in ("attn_q", "ffn_up")]
    entries = _CountingEntries(sorted(names))
    assert len(of(entries).tensors) == len(names)
    assert sorted(entries.asked) == sorted(names)


@given(mean_squares, st.integers(1, 2**30))
def test_figures_keep_their_bounds(sums: list[float], count: int) -> None:
    item = only(of({Q0: entry(sums, count)}))
    assert item.elements == len(sums)
    assert 0 <= item.minimum <= item.maximum
    assert item.minimum * (1 - 1e-5) <= item.mean <= item.maximum * (1 + 1e-5)
    assert item.deviation >= 0
    assert 0 <= item.active <= 1
    assert 0 <= item.zd < 1
    assert -1e-5 <= item.entropy <= math.log2(len(sums)) + 1e-4
    assert -1e-3 <= item.entropy_percent <= 100.01


@given(mean_squares.filter(any), st.randoms(use_true_random=False))
def test_the_order_of_the_columns_changes_nothing_but_the_rounding(sums: list[float], random: object) -> None:
    mixed = sums.copy()
    random.shuffle(mixed)  # type: ignore[attr-defined]
    one, other = only(of({Q0: entry(sums, 3)})), only(of({Q0: entry(mixed, 3)}))
    assert (one.minimum, one.maximum, one.active) == (other.minimum, other.maximum, other.active)
    assert one.total == pytest.approx(other.total, rel=1e-5)
    assert one.entropy == pytest.approx(other.entropy, abs=1e-4)


@given(mean_squares, st.data())
def test_the_cosine_lies_between_nothing_and_one(sums: list[float], data: st.DataObject) -> None:
    before = data.draw(st.lists(st.floats(0, 2.0**40, width=32), min_size=len(sums), max_size=len(sums)))
    forth = of({Q0: entry(before, 5), Q1: entry(sums, 2)}).tensors[1].cosine
    back = of({Q0: entry(sums, 2), Q1: entry(before, 5)}).tensors[1].cosine
    assert 0 <= forth <= 1 + 1e-5
    assert forth == pytest.approx(back, rel=1e-5)
    exact = np.dot(before, sums) / (np.linalg.norm(before) * np.linalg.norm(sums)) if any(before) and any(sums) else 0
    assert forth == pytest.approx(exact, rel=1e-4, abs=1e-4)


@given(mean_squares.filter(lambda sums: max(sums) > 1e-20), st.integers(1, 20))
def test_powers_of_two_scale_without_a_trace(sums: list[float], power: int) -> None:
    # Why a legacy file's unknown chunk size does not matter: llama-imatrix multiplies sums and counts with it.
    plain = only(of({Q0: entry(sums, 3)}))
    scaled = only(of({Q0: entry([value * 2**power for value in sums], 3 * 2**power)}))
    assert scaled == plain
