"""Sets of covariances in a real session: planned, collected once, kept, and collected anew when something changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.context.context import Session
from imatrix_runner.documents.corpus import open_corpus
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, UsageError
from imatrix_runner.events import Event, Finished, Progress, Started
from imatrix_runner.imatrix.covariances import CovarianceSet, obtain_covariances
from support.covariances import OPTIONS, RANGES
from support.mixing import Mixing
from support.mounts import mounted
from support.synthetic import SyntheticEngine


class Sets:
    """Obtains sets of one model in one workspace; ``told`` are the events of the last time."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.told: list[Event] = []
        mixing = Mixing.of(model, folder, folder, sink=lambda event: self.told.append(event))
        self.frozen, self.session, self.text = mixing.planner.frozen, mixing.planner.session, text

    def obtain(
        self,
        options: CollectOptions = OPTIONS,
        ranges: Sequence[ChunkRange] = RANGES,
        session: Session | None = None,
        memory_bytes: int | None = None,
    ) -> CovarianceSet:
        self.told.clear()
        corpus = open_corpus(self.text)
        return obtain_covariances(self.frozen, session or self.session, corpus, options, ranges, memory_bytes=memory_bytes)

    def refused(self, **changes: object) -> RunnerError:
        with pytest.raises(RunnerError) as caught:
            self.obtain(**changes)  # type: ignore[arg-type]
        assert all((caught.value.what, caught.value.why, caught.value.todo))
        return caught.value


@pytest.fixture
def sets(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> Sets:
    return Sets(tiny_model, tiny_text, tmp_path / "tiny")


def test_a_set_is_collected_once(sets: Sets) -> None:
    first = sets.obtain()
    assert first.folder == sets.session.workspace.covariances
    assert len(first.weights) == 14
    started, *progress, finished = sets.told
    assert started == Started("covariances", "covariances of 8 inputs, 640 tokens", 5, "chunks")
    assert all(isinstance(event, Progress) for event in progress)
    assert isinstance(finished, Finished)
    assert finished.status == "done"
    assert sets.obtain() == first
    assert sets.told == []
    assert sets.obtain(replace(OPTIONS, threads=1, ppl=True)) == first
    assert sets.told == []


def test_what_changes_the_numbers_makes_another_set(sets: Sets) -> None:
    found = [
        sets.obtain(),
        sets.obtain(replace(OPTIONS, n_batch=128)),
        sets.obtain(ranges=(ChunkRange(0, 2),)),
        sets.obtain(replace(OPTIONS, process_output=True), ranges=(ChunkRange(0, 2),), memory_bytes=2 << 20),
    ]
    assert len({each.fingerprint for each in found}) == 4
    assert "output.weight" in found[3].weights
    assert isinstance(sets.told[0], Started)
    assert sets.told[0].title == "covariances of 9 inputs, 256 tokens, the text computed 3 times"
    assert sets.told[0].total == 6
    assert [event.done for event in sets.told if isinstance(event, Progress)][-1] == 6


def test_what_cannot_be_obtained_is_refused(sets: Sets, tmp_path: Path) -> None:
    for ranges in ((), (ChunkRange(0, 500),)):
        error = sets.refused(ranges=ranges)
        assert isinstance(error, InvalidDataError)
        assert error.what == "The calibration text is too short for covariances"
    assert isinstance(sets.refused(memory_bytes=1 << 19), EngineError)
    error = sets.refused(session=replace(sets.session, engine=SyntheticEngine()))
    assert isinstance(error, UsageError)
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        workspace = replace(sets.session.workspace, root=disk)
        error = sets.refused(session=replace(sets.session, workspace=workspace))
        assert isinstance(error, NoSpaceError)
        assert "needed" in error.why
