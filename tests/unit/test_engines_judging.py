"""A row of logits against the reference's: the definitions, in plain float64, and the odd rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from imatrix_runner.engines.files.logits import LogitsHead, read_head, read_rows, row_words
from imatrix_runner.engines.worker.evaluate.logit_math import compare_rows, keep_rows
from imatrix_runner.errors import InvalidDataError

N, VOCAB = 40, 501
F64 = npt.NDArray[np.float64]


@pytest.fixture
def logits() -> npt.NDArray[np.float32]:
    return (np.random.default_rng(1).standard_normal((N, VOCAB), dtype=np.float32) * 4).astype(np.float32)


@pytest.fixture
def targets() -> npt.NDArray[np.int32]:
    return np.random.default_rng(2).integers(0, VOCAB, N, dtype=np.int32)


def log_softmax(logits: npt.NDArray[np.float32]) -> F64:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    answer: F64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return answer


def test_rows_hold_the_log_probabilities_in_16_bits(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> None:
    rows, nll = keep_rows(logits, targets)
    assert rows.shape == (N, row_words(VOCAB))
    scale, least = rows[:, :4].copy().view("<f4").T
    kept = scale[:, None] * rows[:, 4 : 4 + VOCAB].astype(np.float64) + least[:, None]
    exact = log_softmax(logits)
    floor = exact.max(axis=1, keepdims=True) - 16
    assert np.abs(kept - np.maximum(exact, floor)).max() < 16 / 65535
    assert nll == pytest.approx(-exact[np.arange(N), targets], abs=1e-5)


def test_figures_of_a_token_are_their_definitions(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> None:
    other = logits + np.random.default_rng(3).standard_normal(logits.shape, dtype=np.float32) / np.float32(2)
    tokens = compare_rows(other, keep_rows(logits, targets)[0], targets)
    base, mine, at = log_softmax(logits), log_softmax(other), (np.arange(N), targets)
    assert tokens["kld"] == pytest.approx((np.exp(base) * (base - mine)).sum(axis=1), abs=1e-4, rel=1e-3)
    assert tokens["nll"] == pytest.approx(-mine[at], abs=1e-5)
    heard = base[at] > base.max(axis=1) - 16
    assert heard.mean() > 0.5
    assert tokens["base"][heard] == pytest.approx(-base[at][heard], abs=3e-4)
    assert tokens["dp"] == pytest.approx(np.exp(mine[at]) - np.exp(base[at]), abs=1e-4)
    assert np.array_equal(tokens["same"], base.argmax(axis=1) == mine.argmax(axis=1))


def test_a_token_that_both_rule_out_adds_nothing(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> None:
    """Some models mask tokens with -inf."""
    logits[:, 7] = -np.inf
    targets[targets == 7] = 8
    other = logits + np.float32(0.5) * np.roll(np.nan_to_num(logits, neginf=0), 1, axis=1)
    found = compare_rows(other, keep_rows(logits, targets)[0], targets)
    without = [np.delete(each, 7, axis=1) for each in (logits, other)]
    moved = targets - (targets > 7)
    assert np.isfinite(found["kld"]).all()
    assert found["kld"] == pytest.approx(
        compare_rows(without[1], keep_rows(without[0], moved)[0], moved)["kld"], abs=1e-4, rel=1e-3
    )


def test_a_likely_token_that_the_level_rules_out_is_infinitely_far(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]
) -> None:
    rows = keep_rows(logits, targets)[0]
    other = logits.copy()
    other[3, logits[3].argmax()] = -np.inf
    kld = compare_rows(other, rows, targets)["kld"]
    assert np.isinf(kld[3])
    assert np.isfinite(np.delete(kld, 3)).all()


def test_rows_are_read_where_they_lie(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32], tmp_path: Path) -> None:
    head = LogitsHead(21, VOCAB, 4)
    rows = keep_rows(logits, targets)[0].reshape(4, head.rows, -1)
    path = tmp_path / "base"
    path.write_bytes(head.pack() + bytes(4 * 4 * 21) + rows.tobytes())
    assert read_head(path) == head
    assert np.array_equal(read_rows(path, head, 2, 3, 5), rows[2, 3:8])
    assert np.array_equal(read_rows(path, head, 3, 0, head.rows), rows[3])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidDataError, match="cannot be compared with"):
        read_rows(path, head, 3, 0, head.rows)
