"""Files of scored tokens that another program sealed: what is in them gives figures, is computed again, or is refused."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from imatrix_runner.engines.files.token_scores import TOKEN, TokenScoresFile, read_token_scores, token_scores_bytes
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.errors import RunnerError
from imatrix_runner.evaluate.kld_statistics import summarise
from imatrix_runner.evaluate.measure import Subject, _require_numbers
from imatrix_runner.journal import Journal, StepRecord
from support.evaluations import Place, make_levels
from support.in_process import CommandLine

N_CTX = 64
ROWS = (token_scores_bytes(1, N_CTX) - token_scores_bytes(0, N_CTX) - 4) // TOKEN.itemsize
SEED, COUNT = 20261201, 400
LEVEL = "Q4_K_M"

FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e-45, 3.4e38, -3.4e38, 1e18, 700.0)
WHOLE = (0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)

Scores = npt.NDArray[np.void]


def usual(draw: random.Random) -> Scores:
    """One chunk as a level near its source has it."""
    tokens = np.zeros(ROWS, TOKEN)
    for token in tokens:
        token["nll"] = token["base"] = draw.uniform(0.0, 9.0)
        token["kld"], token["dp"], token["same"] = draw.uniform(0.0, 0.1), draw.uniform(-0.1, 0.1), draw.random() < 0.9
    return tokens


def damaged(tokens: Scores, draw: random.Random) -> str:
    """Have one field of one token, or of all, be a number that no measurement gives; say which."""
    field = draw.choice(TOKEN.names or ())
    number = draw.choice(WHOLE if field == "same" else FLOATS)
    place = slice(None) if draw.random() < 1 / 4 else draw.randrange(len(tokens))
    with np.errstate(over="ignore"):
        tokens[field][place] = number
    return f"{field}[{place}] = {number}"


def sealed(tokens: Scores) -> bytes:
    data = tokens.tobytes()
    return data + zlib.crc32(data).to_bytes(4, "little")


def test_numbers_of_other_types(tmp_path: Path) -> None:
    """Whatever is read is summed up without a warning of numpy's, and only finite figures come into a journal."""
    path, draw = tmp_path / "level.scored", random.Random(SEED)
    TokenScoresFile(path, "print", N_CTX).close()
    head = path.read_bytes()
    subject = Subject("level", "evaluate level", tmp_path / "level.gguf", {}, "")
    kept = refused = dropped = 0
    for _ in range(COUNT):
        chunks = [usual(draw) for _ in range(3)]
        what = damaged(draw.choice(chunks), draw)
        path.write_bytes(head + b"".join(map(sealed, chunks)))
        found = read_token_scores(path, "print", N_CTX)
        with closing(TokenScoresFile(path, "print", N_CTX)) as scored:
            assert scored.chunks == len(found), what
        if len(found) < len(chunks):
            dropped += 1
            assert what.startswith(("same", "kld")), what
            continue
        figures = summarise(found.reshape(-1))
        try:
            _require_numbers(figures, subject, 512)
            record = StepRecord.now({}, [], "", 0.0, facts=figures)
            Journal(tmp_path / "journal.json").record("evaluate level", record)
        except RunnerError:
            refused += 1
        else:
            kept += 1
            assert 0 <= figures.same_top.value <= 1, what
    assert min(kept, refused, dropped) > COUNT // 40


def test_lengths_of_other_files(tmp_path: Path) -> None:
    """Cut anywhere, with another head, or for chunks of another length: the whole chunks count, from the first on."""
    path, draw = tmp_path / "level.scored", random.Random(SEED)
    TokenScoresFile(path, "print", N_CTX).close()
    whole = path.read_bytes() + b"".join(sealed(usual(draw)) for _ in range(3))
    each = len(sealed(usual(draw)))
    for length in [*range(0, 64, 7), *(draw.randrange(len(whole)) for _ in range(100)), len(whole)]:
        path.write_bytes(whole[:length])
        assert len(read_token_scores(path, "print", N_CTX)) == max(0, length - 32) // each
    for fingerprint, n_ctx in (("other", N_CTX), ("print", 32), ("print", 128), ("", N_CTX)):
        assert len(read_token_scores(path, fingerprint, n_ctx)) == 0
    assert len(read_token_scores(tmp_path, "print", N_CTX)) == len(read_token_scores(tmp_path / "none", "print", N_CTX)) == 0


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One level, not measured yet."""
    folder = tmp_path_factory.mktemp("measured")
    return make_levels(folder, tiny_model, tiny_text, levels=(LEVEL,))


def as_nan(path: Path) -> None:
    tokens = usual(random.Random(SEED))
    tokens["kld"][3] = float("nan")
    path.write_bytes(path.read_bytes()[:32] + sealed(tokens) * 8)


def as_absurd(path: Path) -> None:
    tokens = usual(random.Random(SEED))
    tokens["same"][3] = 7
    path.write_bytes(path.read_bytes()[:32] + sealed(tokens) * 8)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_text(path: Path) -> None:
    path.write_text("hello\n" * 1000, encoding="utf-8")


@pytest.mark.parametrize("damage", [as_nan, as_absurd, as_folder, as_text])
def test_behind_the_command_line(damage: Callable[[Path], None], measured: Place, cli: CommandLine, tmp_path: Path) -> None:
    """A measurement that finds such a file computes its tokens again, to the same figures."""
    place = measured.copy(tmp_path / "work")
    done = place.evaluate(cli)
    assert done.code == 0, done.err
    undisturbed: dict[str, Divergence] = place.divergences()
    damage(place.workspace.evaluation / f"{LEVEL}.scored")
    journal = json.loads(place.workspace.journal.read_bytes())
    journal["steps"] = {step: record for step, record in journal["steps"].items() if not step.startswith("evaluate ")}
    place.workspace.journal.write_text(json.dumps(journal), encoding="utf-8")
    done = place.evaluate(cli)
    assert "Traceback" not in done.err
    if damage is as_folder:
        assert done.code == 100
        assert "The file system refused while writing scored tokens" in done.out
        assert f"{LEVEL}.scored: Is a directory" in done.out
    else:
        assert done.code == 0, done.err
        assert place.divergences() == undisturbed
