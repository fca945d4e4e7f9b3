"""``evaluate --until-precise``: levels end after different numbers of chunks, with the scores that a whole measurement has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.logits import scored_tokens
from imatrix_runner.engines.files.token_scores import TOKEN
from imatrix_runner.evaluate import measure, measure_ranges
from imatrix_runner.evaluate.precision import possible_ends, relative_error, spread_chunks
from support.evaluations import CONTEXT, LEVELS, Place, make_levels
from support.in_process import CommandLine
from support.shuffled_ranges import ShuffledRanges

MOST = 38
ROWS = scored_tokens(CONTEXT)


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_levels(tmp_path_factory.mktemp("made"), tiny_model, tiny_text)
    place.text.write_text(place.text.read_text(encoding="utf-8") * 4, encoding="utf-8")
    return place


def stored(place: Place, name: str) -> np.ndarray[tuple[int, int], np.dtype[np.void]]:
    """The token scores in a file, [n_chunks, rows]."""
    data, record = (place.workspace.evaluation / name).read_bytes()[32:], ROWS * TOKEN.itemsize
    chunks = [data[at : at + record] for at in range(0, len(data), record + 4)]
    return np.frombuffer(b"".join(chunks), TOKEN).reshape(-1, ROWS)


def precise(place: Place, cli: CommandLine, share: str) -> None:
    done = place.evaluate(cli, "--until-precise", share, chunks=MOST)
    assert done.code == 0, done.err


def test_each_level_ends_where_its_error_is_small_enough(made: Place, cli: CommandLine, tmp_path: Path) -> None:
    whole, place = made.copy(tmp_path / "whole"), made.copy(tmp_path / "precise")
    assert whole.evaluate(cli, chunks=MOST).code == 0
    precise(place, cli, "14%")
    order = spread_chunks(MOST, 4)
    for name in LEVELS:
        figures = place.figures()[name]
        n_chunks, kld = figures.evaluation.n_chunks, stored(place, f"{name}.spread.scored")["kld"]
        assert (len(kld), figures.divergence.n_tokens) == (n_chunks, n_chunks * ROWS)
        assert n_chunks in possible_ends(MOST, 4)
        assert relative_error(kld) < 0.14 or n_chunks == MOST
        assert all(relative_error(kld[:done]) >= 0.14 for done in possible_ends(MOST, 4) if done < n_chunks)
        assert (kld == stored(whole, f"{name}.scored")["kld"][list(order[:n_chunks])]).all()
    assert min(each.evaluation.n_chunks for each in place.figures().values()) < MOST
    assert not place.evaluate(cli, "--until-precise", "14%", "--dry-run", "--json", chunks=MOST).document["plan"]["levels"][0][
        "reason"
    ]


def test_more_precise_goes_on_and_less_precise_is_known(
    made: Place, cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh, steps, ranges = (made.copy(tmp_path / name) for name in ("fresh", "steps", "ranges"))
    precise(fresh, cli, "12%")
    precise(steps, cli, "20%")
    few = steps.facts()
    precise(steps, cli, "12%")
    assert steps.facts() == fresh.facts()
    before = steps.runs()
    precise(steps, cli, "20%")
    assert (steps.facts(), steps.runs()) == (few, before)  # nothing was computed

    # An engine that computes ranges in any order
    shuffled = ShuffledRanges(tmp_path / "scratch", seed=1)

    def measurer(engine: EmbeddedEngine) -> ShuffledRanges:
        shuffled.engine = engine
        return shuffled

    monkeypatch.setattr(EmbeddedEngine, "range_measurer", property(measurer))
    monkeypatch.setattr(measure, "ranges_of", lambda _model, _engine, held_out: measure_ranges.cut(held_out.extent.n_chunks, 4))
    precise(ranges, cli, "12%")
    assert ranges.divergences() == fresh.divergences()


def test_pairs_and_texts_that_are_too_short(made: Place, cli: CommandLine, tmp_path: Path) -> None:
    place = made.copy(tmp_path / "work")
    done = place.evaluate(cli, "--until-precise", "14%", "--ab", "--levels", "IQ2_XS,Q4_K_M", chunks=MOST)
    assert done.code == 0, done.err
    assert all(pair.kld.error > 0 for pair in place.pairs().values())
    short = place.evaluate(cli, "--until-precise", "0.1%", "--levels", "Q4_K_M", chunks=12)
    assert short.code == 0
    assert "Q4_K_M: all 12 chunks of held-out.txt give no error below 0.1 %" in short.err
    refused = place.evaluate(cli, "--until-precise", "2%", "--engine", "binaries")
    assert refused.code == 2
    assert "--until-precise needs the embedded engine" in refused.err
