"""A reference that says nothing about the text is recognised from its file, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from imatrix_runner.engines.files.logits import LogitsHead
from imatrix_runner.engines.files.plausible import no_language_model, uniform_guess
from imatrix_runner.engines.worker.evaluate.logit_math import keep_rows

VOCAB, CONTEXT, CHUNKS = 320, 32, 3
HEAD = LogitsHead(CONTEXT, VOCAB, CHUNKS)
Logits = Callable[[npt.NDArray[np.int32]], npt.NDArray[np.float32]]


def write(path: Path, logits: Logits, *, same_text: bool = False) -> Path:
    """A reference of a model whose logits [rows, VOCAB] of a chunk are what ``logits`` makes of its tokens."""
    chance = np.random.default_rng(3)
    tokens = chance.integers(0, VOCAB, (CHUNKS, CONTEXT)).astype(np.int32)
    if same_text:
        tokens[:] = 7
    first = CONTEXT // 2
    rows = [keep_rows(logits(chunk), chunk[first + 1 :])[0] for chunk in tokens]
    path.write_bytes(HEAD.pack() + tokens.astype("<i4").tobytes() + b"".join(each.tobytes() for each in rows))
    assert path.stat().st_size == HEAD.n_bytes
    return path


def knowing(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Gives the next token a part of the probability."""
    logits = np.random.default_rng(int(tokens[0])).normal(0, 1, (HEAD.rows, VOCAB)).astype(np.float32)
    logits[np.arange(HEAD.rows), tokens[CONTEXT // 2 + 1 :]] += 3
    return logits


def test_a_model_that_knows_something_may_be_one(tmp_path: Path) -> None:
    assert no_language_model(write(tmp_path / "base", knowing), HEAD) == ""


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        (lambda tokens: np.zeros((HEAD.rows, VOCAB), np.float32), "the same after every text"),
        (lambda tokens: np.tile(np.arange(VOCAB, dtype=np.float32) / 50, (HEAD.rows, 1)), "the same after every text"),
        (
            lambda tokens: np.random.default_rng(1).normal(0, 1, (HEAD.rows, VOCAB)).astype(np.float32),
            "depend on the position alone",
        ),
        (
            lambda tokens: np.random.default_rng(int(tokens[0])).normal(0, 0.01, (HEAD.rows, VOCAB)).astype(np.float32),
            "a uniform guess among its 320 tokens has 320",
        ),
        (
            lambda tokens: np.random.default_rng(int(tokens[0])).normal(0, 3, (HEAD.rows, VOCAB)).astype(np.float32),
            "a uniform guess among its 320 tokens has 320",
        ),
    ],
    ids=["zero", "constant", "by position", "uniform", "worse than uniform"],
)
def test_one_that_says_nothing_of_the_text_is_refused(logits: Logits, why: str, tmp_path: Path) -> None:
    assert why in no_language_model(write(tmp_path / "base", logits), HEAD)


def test_log_probabilities_that_are_none_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "base", knowing)
    data = bytearray(path.read_bytes())
    for at in range(HEAD.rows_at, len(data), HEAD.chunk_bytes // HEAD.rows):
        least = np.frombuffer(bytes(data[at + 4 : at + 8]), "<f4")
        data[at + 4 : at + 8] = (least - 0.5).astype("<f4").tobytes()
    path.write_bytes(data)
    assert f"add up to {math.exp(-0.5):.3g}" in no_language_model(path, HEAD)


def test_a_text_of_one_token_tells_nothing_about_the_model(tmp_path: Path) -> None:
    """After the same text the same prediction is right."""

    def certain(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        logits = np.zeros((HEAD.rows, VOCAB), np.float32)
        logits[:, tokens[0]] = 4
        return logits

    assert no_language_model(write(tmp_path / "base", certain, same_text=True), HEAD) == ""


def test_only_written_chunks_are_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "base", knowing)
    path.write_bytes(path.read_bytes()[: HEAD.rows_at + HEAD.chunk_bytes])
    assert no_language_model(path, HEAD, 1) == ""
    assert no_language_model(path, HEAD, 0) == ""


@pytest.mark.parametrize(("perplexity", "refused"), [(10, False), (8_000, False), (29_000, True), (32_000, True), (1e9, True)])
def test_a_perplexity_near_the_vocabulary_s_size_or_above_it_is_a_guess(perplexity: float, refused: bool) -> None:
    assert bool(uniform_guess(math.log(perplexity), 32_000)) is refused
