"""Levels measured in ranges of chunks that arrive in any order: the scores of one job after another, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.evaluate import measure, measure_ranges
from support.command_line import run_command
from support.evaluations import LEVELS, Place, make_levels
from support.in_process import CommandLine
from support.shuffled_ranges import ShuffledRanges

MOST = 14
RANGES = (ChunkRange(0, 4), ChunkRange(4, 4), ChunkRange(8, 4), ChunkRange(12, 2))
SCORES = len(RANGES) * (1 + len(LEVELS))


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_levels(tmp_path_factory.mktemp("made"), tiny_model, tiny_text)


@pytest.fixture(scope="module")
def usual(made: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Measured in one job after another."""
    place = made.copy(tmp_path_factory.mktemp("usual") / "work")
    assert place.evaluate(lambda *words: run_command(*words, cwd=place.work), chunks=MOST).code == 0
    return place


@pytest.fixture
def bare(made: Place, tmp_path: Path) -> Place:
    return made.copy(tmp_path / "work")


def scored(place: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.workspace.evaluation.iterdir()}


def in_ranges(monkeypatch: pytest.MonkeyPatch, ranges: ShuffledRanges) -> None:
    def measurer(engine: EmbeddedEngine) -> ShuffledRanges:
        ranges.engine = engine
        return ranges

    monkeypatch.setattr(EmbeddedEngine, "range_measurer", property(measurer))
    monkeypatch.setattr(measure, "ranges_of", lambda _model, _engine, held_out: measure_ranges.cut(held_out.extent.n_chunks, 4))


def test_any_order_gives_the_same_bytes_and_figures(
    usual: Place, bare: Place, cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranges = ShuffledRanges(tmp_path / "scratch", seed=1, at_once=3)  # each range twice, with some of the levels
    in_ranges(monkeypatch, ranges)
    done = bare.evaluate(cli, chunks=MOST)
    assert done.code == 0
    assert {each.chunks for each in ranges.handed} == set(RANGES)
    assert len(ranges.handed) == SCORES + len(RANGES)
    assert scored(bare) == scored(usual)
    assert bare.facts() == usual.facts()
    assert bare.evaluate(cli, chunks=MOST).code == 0
    assert len(ranges.handed) == SCORES + len(RANGES)


def test_interrupted_it_continues_either_way(
    usual: Place, bare: Place, cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First one job after another on the first chunks, then in ranges, interrupted twice, then one job after another again;
    and nothing that was handed over is computed twice."""
    with monkeypatch.context() as patch:
        assert bare.evaluate(cli, "--levels", "Q8_0", chunks=6).code == 0
        handed = []
        for seed, most in ((2, 5), (3, 7)):
            ranges = ShuffledRanges(tmp_path / "scratch", seed, most)
            in_ranges(patch, ranges)
            assert bare.evaluate(cli, chunks=MOST).code == 130
            handed += [(each.chunks, each.subject) for each in ranges.handed]
        subjects = [each for each in handed if each[1] is not None]
        assert len(subjects) == len(set(subjects)) >= 8
        assert any(path.suffix == ".ahead" for path in bare.workspace.evaluation.iterdir())
    assert bare.evaluate(cli, chunks=MOST).code == 0
    assert scored(bare) == scored(usual)
    assert bare.facts() == usual.facts()


def test_a_level_that_cannot_be_measured_stops_no_other(
    usual: Place, bare: Place, cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare.spoil("Q4_K_M")
    with monkeypatch.context() as patch:
        in_ranges(patch, ShuffledRanges(tmp_path / "scratch", 5))
        done = bare.evaluate(cli, "--json", chunks=MOST)
    plain = bare.evaluate(cli, "--json", "--again", chunks=MOST)
    assert done.code == plain.code == 100
    assert done.document["measured"]["failed"] == plain.document["measured"]["failed"]
    assert done.document["measured"]["levels"] == plain.document["measured"]["levels"]
    assert done.document["measured"]["levels"].keys() == {"Q8_0", "IQ2_XS"}
