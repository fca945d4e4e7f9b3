"""The binaries engine's collecting over the real programs: one file for every range, until it is told to stop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, CollectJob, CollectOptions, QuantizeJob, QuantizeOptions
from imatrix_runner.errors import InvalidDataError, ToolchainError
from imatrix_runner.events import Event, Metric, Progress, ignore
from imatrix_runner.imatrix.formats import read
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.probe import Toolchain, probe
from support.llama_tools import BareTools, fake_tools


def test_libraries_next_to_the_imatrix_are_not_where_llama_quantize_runs(
    toolchain: Toolchain, tiny_model: Path, tiny_imatrix: Path, tools: BareTools, tmp_path: Path
) -> None:
    """A llama.cpp with loadable backends would load them: an imatrix's folder may have come from anywhere."""
    where = tmp_path / "where"
    fake = fake_tools(toolchain, tmp_path / "fake", llama_quantize=f"pwd >> {where}")
    engine = BinariesEngine(probe(fake, "test"), Runner())
    own = tmp_path / "downloaded"
    own.mkdir()
    imatrix = own / tiny_imatrix.name
    imatrix.write_bytes(tiny_imatrix.read_bytes())
    job = QuantizeJob("level", tiny_model, tmp_path / "level.gguf", "Q4_K_M", QuantizeOptions(), imatrix, None, None)
    expected = tools.quantize(tiny_model, tmp_path / "theirs.gguf", "Q4_K_M", imatrix=imatrix).read_bytes()
    for library, elsewhere in (("ggml-notes.txt", False), ("libggml-cpu-evil.so", True)):
        (own / library).touch()
        engine.quantize(job, ignore)
        assert (Path(where.read_text().splitlines()[-1]) != own) is elsewhere
        assert job.out.read_bytes() == expected


RANGES = (ChunkRange(8, 4), ChunkRange(0, 3), ChunkRange(20, 2))


@pytest.fixture
def job(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> CollectJob:
    options = CollectOptions(n_ctx=128, n_batch=128)
    return CollectJob("imatrix", tiny_model, tiny_text, RANGES, tmp_path, options, "", tmp_path / "imatrix.log")


def test_every_range_is_a_file_of_its_own(engine: BinariesEngine, job: CollectJob, tools: BareTools, tmp_path: Path) -> None:
    pieces: list[CollectedRange] = []
    events: list[Event] = []

    def take(piece: CollectedRange) -> bool:
        assert piece.path.exists()
        pieces.append(piece)
        return True

    engine.collect(job, events.append, take)
    assert [piece.chunks for piece in pieces] == list(RANGES)
    assert [piece.path for piece in pieces] == [tmp_path / chunks.file_name for chunks in RANGES]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*sorted(chunks.file_name for chunks in RANGES), "imatrix.log"]
    for piece in pieces:
        given = ("-c", "128", "-b", "128", "--chunk", str(piece.chunks.first), "--chunks", str(piece.chunks.count))
        tools.imatrix(job.model, job.text, tmp_path / "theirs.gguf", *given)
        assert piece.path.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
        assert 0 <= piece.load_seconds <= piece.seconds
        # Of as many chunks as it told of: it may lose its last lines.
        assert piece.perplexity.tokens in range(0, 63 * piece.chunks.count + 1, 63)
        assert piece.perplexity.error is None
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == sorted(done)
    assert 0 < done[-1] <= 9  # the line of the last chunk may be lost, too
    assert {event.total for event in events if isinstance(event, Progress)} == {9}


def test_the_perplexity_told_on_the_way_is_that_of_the_job_so_far(engine: BinariesEngine, job: CollectJob) -> None:
    told: list[float] = []
    total = 0.0

    def tell(event: Event) -> None:
        if isinstance(event, Metric):
            told.append(event.value)

    def take(piece: CollectedRange) -> bool:
        nonlocal total
        total += piece.perplexity.nll
        tokens.append(piece.perplexity.tokens)
        return True

    tokens: list[int] = []
    engine.collect(job, tell, take)
    assert told[-1] == pytest.approx(math.exp(total / sum(tokens)))


def test_it_stops_when_it_is_told_that_it_is_enough(engine: BinariesEngine, job: CollectJob, tmp_path: Path) -> None:
    pieces: list[CollectedRange] = []

    def take(piece: CollectedRange) -> bool:
        pieces.append(piece)
        return len(pieces) < 2

    engine.collect(job, ignore, take)
    assert len(pieces) == 2
    assert not (tmp_path / RANGES[2].file_name).exists()
    assert (tmp_path / "imatrix.log").read_text().count("$ ") == 2


def test_without_perplexity_none_is_told(engine: BinariesEngine, job: CollectJob) -> None:
    pieces: list[CollectedRange] = []
    options = replace(job.options, ppl=False)
    engine.collect(replace(job, options=options, ranges=RANGES[:1]), ignore, lambda piece: bool(pieces.append(piece)))
    assert (pieces[0].perplexity.tokens, pieces[0].perplexity.value) == (0, None)


def test_a_program_that_ends_well_and_wrote_nothing_is_noticed(
    toolchain: Toolchain, job: CollectJob, tools: BareTools, tmp_path: Path
) -> None:
    script = 'while [ "$1" != -o ]; do shift; done; exit 0'
    folder = fake_tools(toolchain, tmp_path / "fake", llama_imatrix=script)
    fake = replace(toolchain, tools={name: folder / name for name in toolchain.tools})
    with pytest.raises(InvalidDataError, match="moving llama-imatrix's output"):
        BinariesEngine(fake, Runner()).collect(job, ignore, lambda piece: True)


def test_a_program_that_fails_at_once_without_a_word_is_asked_again_for_its_reason(
    toolchain: Toolchain, job: CollectJob, tmp_path: Path
) -> None:
    tried = tmp_path / "tried"
    script = f"echo x >>'{tried}'; [ $(wc -l <'{tried}') -lt 3 ] || echo \"unknown model architecture: 'new'\" >&2; exit 1"
    folder = fake_tools(toolchain, tmp_path / "fake", llama_imatrix=script)
    fake = replace(toolchain, tools={name: folder / name for name in toolchain.tools})
    with pytest.raises(ToolchainError, match="architecture new"):
        BinariesEngine(fake, Runner()).collect(job, ignore, lambda piece: True)
    assert tried.read_text() == "x\n" * 3


def test_what_it_offers_is_what_the_toolchain_offers(engine: BinariesEngine, toolchain: Toolchain) -> None:
    assert engine.types == toolchain.types
    assert engine.devices == toolchain.devices
    assert engine.identity() == toolchain.identity()


def test_ranges_of_the_real_file_can_be_read(engine: BinariesEngine, job: CollectJob) -> None:
    chunks: list[int] = []
    engine.collect(job, ignore, lambda piece: bool(chunks.append(read(piece.path).matrix.chunk_count)) or True)
    assert chunks == [4, 3, 2]
