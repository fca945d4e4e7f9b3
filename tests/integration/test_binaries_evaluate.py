"""The binaries engine's evaluation: llama-perplexity's own file and figures, and the embedded engine's beside them."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.logits import is_whole, read_head, read_tokens
from imatrix_runner.engines.files.token_scores import read_token_scores
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.measures import Divergence, Estimate, MeasureJob, ReferenceJob
from imatrix_runner.evaluate.kld_statistics import summarise
from imatrix_runner.events import Event, Progress, ignore
from imatrix_runner.process import Runner
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.toolchain.store import cache_dir
from support.llama_tools import BareTools
from support.perplexity_tools import PATIENT, perplexity_that

CHUNKS = 8
OPTIONS = CollectOptions(threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def patient(tools: BareTools, folder: Path) -> BinariesEngine:
    return BinariesEngine(perplexity_that(PATIENT, tools.toolchain, folder / "patient"), Runner())


@pytest.fixture(scope="module")
def embedded() -> EmbeddedEngine:
    return EmbeddedEngine(find(os.environ, cache_dir()), Runner())


@pytest.fixture(scope="module")
def refer_job(demo_model: Path, folder: Path) -> ReferenceJob:
    text, out = resource(HELD_OUT_TEXT), folder / "reference.logits"
    return ReferenceJob("refer", demo_model, text, ChunkRange(0, CHUNKS), out, OPTIONS, "of this", folder / "refer.log")


@pytest.fixture(scope="module")
def base(patient: BinariesEngine, refer_job: ReferenceJob) -> Path:
    patient.make_reference(refer_job, ignore)
    return refer_job.out


def judge_job(model: Path, base: Path, out: Path) -> MeasureJob:
    return MeasureJob("judge", model, base, out, OPTIONS, "of that", None)


def summary_of(found: Divergence) -> dict[str, Estimate]:
    return {name: value for name, value in vars(found).items() if isinstance(value, Estimate)}


def test_the_reference_is_the_embedded_engine_s_but_for_the_last_bit(
    patient: BinariesEngine, embedded: EmbeddedEngine, refer_job: ReferenceJob, folder: Path
) -> None:
    events: list[Event] = []
    patient.make_reference(refer_job, events.append)
    embedded.make_reference(replace(refer_job, out=folder / "ours.logits"), ignore)
    theirs, ours = read_head(refer_job.out), read_head(folder / "ours.logits")
    assert theirs == ours
    assert is_whole(refer_job.out, theirs, "of this")
    assert np.array_equal(read_tokens(refer_job.out, theirs), read_tokens(folder / "ours.logits", ours))
    one = np.fromfile(refer_job.out, "<u2", offset=theirs.rows_at).astype(np.int32)
    other = np.fromfile(folder / "ours.logits", "<u2", offset=ours.rows_at).astype(np.int32)
    assert (one != other).mean() < 1e-4
    assert not list(folder.glob(".*"))
    told = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in told] == sorted(event.done for event in told)
    assert {event.total for event in told} == {CHUNKS}
    assert all(event.note.startswith("PPL ") for event in told)


def test_a_reference_of_something_else_is_written_anew(patient: BinariesEngine, base: Path, refer_job: ReferenceJob) -> None:
    other = replace(refer_job, out=base.with_name("other.logits"))
    patient.make_reference(other, ignore)
    patient.make_reference(replace(other, chunks=ChunkRange(0, 2), fingerprint="of something else"), ignore)
    head = read_head(other.out)
    assert head.n_chunks == 2
    assert is_whole(other.out, head, "of something else")
    assert not is_whole(other.out, head, "of this")


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_the_figures_are_the_embedded_engine_s_as_far_as_they_are_printed(
    level: str,
    patient: BinariesEngine,
    embedded: EmbeddedEngine,
    tools: BareTools,
    demo_model: Path,
    base: Path,
    folder: Path,
) -> None:
    job = judge_job(tools.quantize(demo_model, folder / f"{level}.gguf", level), base, folder / f"{level}.scored")
    events: list[Event] = []
    theirs = patient.measure_level(job, events.append)
    embedded.measure_level(job, ignore)
    ours = summarise(read_token_scores(job.out, job.fingerprint, OPTIONS.n_ctx).reshape(-1))
    assert theirs.n_tokens == ours.n_tokens == CHUNKS * 255
    shares = ("dp", "dp_rms", "same_top")  # printed as percents with three digits, all else with six
    for name, estimate in summary_of(theirs).items():
        digit = 1.01e-5 if name in shares else 1.01e-6
        mine = summary_of(ours)[name]
        assert estimate.value == pytest.approx(mine.value, abs=digit), name
        assert estimate.error == pytest.approx(mine.error, abs=digit), name
    assert theirs.correlation == pytest.approx(ours.correlation, abs=1.01e-4)
    assert theirs.kld_at == pytest.approx(dict(ours.kld_at), abs=1.01e-6)
    assert theirs.dp_at == pytest.approx(dict(ours.dp_at), abs=1.01e-5)
    assert events[-1] == Progress("judge", CHUNKS, CHUNKS, f"KLD {theirs.kld.value:.5f}")
    assert {event.done for event in events if isinstance(event, Progress)} <= set(range(1, CHUNKS + 1))


def test_the_source_does_not_differ_from_itself(patient: BinariesEngine, demo_model: Path, base: Path, folder: Path) -> None:
    found = patient.measure_level(judge_job(demo_model, base, folder / "itself"), ignore)
    assert abs(found.kld.value) < 1e-5
    assert found.same_top.value > 0.999
    assert all(math.isfinite(each.value) and math.isfinite(each.error) for each in summary_of(found).values())


def test_so_many_chunks_of_a_reference_are_those_of_one_that_has_no_more(
    patient: BinariesEngine, demo_model: Path, base: Path, refer_job: ReferenceJob, tools: BareTools, folder: Path
) -> None:
    level = tools.quantize(demo_model, folder / "limited.gguf", "Q3_K_M")
    short = replace(refer_job, out=folder / "short.logits", chunks=ChunkRange(0, 4))
    patient.make_reference(short, ignore)
    job = judge_job(level, base, folder / "limited.scored")
    assert patient.measure_level(replace(job, limit=4), ignore) == patient.measure_level(replace(job, base=short.out), ignore)
    assert patient.measure_level(replace(job, limit=CHUNKS + 1), ignore).n_tokens == CHUNKS * 255
    assert not list(folder.glob(".*"))
