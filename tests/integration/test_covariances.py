"""Covariances against the activations themselves and the imatrix, over architectures; groups, threads, stops, refusals."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.covariance_jobs import CovarianceJob, WeightInput, grouped, triangle
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.covariance_file import read_covariance, stored_covariances
from imatrix_runner.engines.jobs import ChunkRange, CollectJob
from imatrix_runner.errors import EngineError, InterruptedRunError, InvalidDataError, RunnerError, ToolchainError
from imatrix_runner.events import Event, Progress, ignore
from imatrix_runner.imatrix.formats import read
from imatrix_runner.imatrix.matrix import Matrix, add
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.covariances import OPTIONS, PLENTY, RANGES, bytes_in, captured, collected_set, covariance_job
from support.passes import engine_of, set_floats
from support.tiny_architectures import write_architecture
from support.tiny_models import write_llama_gguf


@pytest.fixture(scope="module")
def engine(toolchain: Toolchain) -> EmbeddedEngine:
    return engine_of(toolchain)


@pytest.fixture
def job(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> CovarianceJob:
    return covariance_job(tiny_model, tiny_text, tmp_path / "covariances")


def imatrix_of(engine: EmbeddedEngine, job: CovarianceJob, folder: Path) -> Matrix:
    """The imatrix of the same chunks, as one range after the other."""
    folder.mkdir()
    engine.collect(
        CollectJob("imatrix", job.model, job.text, job.ranges, folder, job.options, "print", job.log), ignore, lambda _: True
    )
    return add([read(folder / chunks.file_name, exact=True).matrix for chunks in job.ranges])


def same_tokens(covariances: CovarianceJob, imatrix: Matrix) -> None:
    """Of every weight that both have, tokens are the imatrix's counts, and every token has the same share of the trace."""
    found = stored_covariances(covariances.folder)
    assert set(found) == {name for name in imatrix.entries if name in covariances.weights}
    for name, stored in found.items():
        entry = imatrix.entries[name]
        assert stored.matrices * stored.columns == entry.sums.size
        if len(entry.counts) == stored.matrices:
            assert stored.tokens == tuple(entry.counts.tolist()), name
        traces = [float(np.trace(read_covariance(stored.path, each))) for each in range(stored.matrices)]
        assert traces == pytest.approx([stored.columns * (tokens > 0) for tokens in stored.tokens], rel=1e-5), name


@pytest.mark.parametrize("kind", ["dense", "mixture", "tied"])
def test_covariances_are_those_of_the_activations(
    kind: str, engine: EmbeddedEngine, toolchain: Toolchain, tiny_text: Path, tmp_path: Path
) -> None:
    """Against products in float64 of what another callback caught, every token with the same weight; also of the output
    projection, of each expert by itself."""
    model = tmp_path / "model.gguf"
    if kind == "mixture":
        write_llama_gguf(model, layers=1, experts=8, dtype="f16")
    else:
        write_llama_gguf(model, tied=kind == "tied", odd=True)
    job = covariance_job(model, tiny_text, tmp_path / "covariances", replace(OPTIONS, process_output=True))
    found = collected_set(engine, job)
    assert set(found) == set(job.weights)
    assert ("token_embd.weight" if kind == "tied" else "output.weight") in found
    caught = captured(job, tmp_path, toolchain.directory)
    for name, stored in found.items():
        for matrix, tokens in enumerate(stored.tokens):
            rows = caught.get(f"{name} {matrix}", np.zeros((0, stored.columns))).astype(np.float64)
            assert len(rows) == tokens
            covariance = read_covariance(stored.path, matrix)
            rows /= np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
            exact = rows.T @ rows / max(1, tokens)
            assert np.array_equal(covariance, covariance.T)
            norms = np.sqrt(np.diag(exact))
            assert (np.abs(covariance - exact) <= 1e-6 * np.outer(norms, norms)).all(), name


@pytest.mark.parametrize("architecture", ["phi3", "qwen3moe", "deepseek2", "mamba", "rwkv7", "jamba"])
def test_inputs_and_tokens_are_those_of_the_imatrix_of_many_architectures(
    architecture: str, engine: EmbeddedEngine, tiny_text: Path, tmp_path: Path
) -> None:
    """Fused, 3-D and expert weights, recurrent and hybrid: the same weights and tokens."""
    model = write_architecture(architecture, tmp_path / "model.gguf")
    job = covariance_job(model, tiny_text, tmp_path / "covariances")
    collected_set(engine, job)
    same_tokens(job, imatrix_of(engine, job, tmp_path / "imatrix"))


def test_weights_that_share_an_input_share_a_file(job: CovarianceJob, engine: EmbeddedEngine) -> None:
    found = collected_set(engine, job)
    parts = (("attn_k", "attn_q", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
    assert {tuple(sorted(each.weights)) for each in found.values()} == {
        tuple(f"blk.{block}.{part}.weight" for part in shared) for block in (0, 1) for shared in parts
    }
    assert {each.tokens for each in found.values()} == {(5 * 128,)}
    assert len(list(job.folder.glob("*.covariance"))) == 8


def test_groups_and_threads_change_no_byte(job: CovarianceJob, engine: EmbeddedEngine, tmp_path: Path) -> None:
    """All inputs in one run over the text, or each in its own; on one thread or three; a mixture's experts, too."""
    told: list[Event] = []
    whole = collected_set(engine, job, told.append)
    largest = max(WeightInput(each.weights, each.columns, each.matrices).sum_bytes for each in whole.values())
    expected = bytes_in(job.folder)
    assert {event.total for event in told if isinstance(event, Progress)} == {5}
    for number, (threads, memory) in enumerate([(1, job.memory_bytes), (2, largest), (3, 2 * largest)]):
        told.clear()
        other = replace(job, folder=tmp_path / str(number), options=replace(OPTIONS, threads=threads), memory_bytes=memory)
        collected_set(engine, other, told.append)
        assert bytes_in(other.folder) == expected
        inputs = dict.fromkeys(WeightInput(each.weights, each.columns, each.matrices) for each in whole.values())
        runs = len(list(grouped(list(inputs), memory)))
        done = [event.done for event in told if isinstance(event, Progress)]
        assert done[-1] == 5 * runs
        assert {event.total for event in told if isinstance(event, Progress)} == {5 * runs}


def test_experts_on_one_thread_or_many(engine: EmbeddedEngine, tiny_text: Path, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "model.gguf", layers=1, experts=8, dtype="f16")
    jobs = [
        replace(covariance_job(model, tiny_text, tmp_path / str(threads)), options=replace(OPTIONS, threads=threads))
        for threads in (1, 2)
    ]
    for job in jobs:
        collected_set(engine, job)
    assert bytes_in(jobs[0].folder) == bytes_in(jobs[1].folder)
    same_tokens(jobs[0], imatrix_of(engine, jobs[0], tmp_path / "imatrix"))


def test_a_finished_set_is_not_computed_again(job: CovarianceJob, engine: EmbeddedEngine) -> None:
    collected_set(engine, job)
    before = {path: path.stat().st_mtime_ns for path in job.folder.iterdir()}
    collected_set(engine, replace(job, model=job.model.with_name("gone.gguf")))
    assert {path: path.stat().st_mtime_ns for path in job.folder.iterdir()} == before
    told: list[Event] = []
    (job.folder / "000003.covariance").unlink()
    assert stored_covariances(job.folder) == {}
    collected_set(engine, job, told.append)
    assert len(told) == len(RANGES) + 1  # one group: the missing input
    assert {path: path.stat().st_mtime_ns for path in before if path.name not in ("000003.covariance", "covariances.json")} == {
        path: time for path, time in before.items() if path.name not in ("000003.covariance", "covariances.json")
    }


def test_another_fingerprint_replaces_the_set(job: CovarianceJob, engine: EmbeddedEngine) -> None:
    collected_set(engine, job)
    (job.folder / ".000001.covariance.part").write_bytes(b"left by a kill")
    other = replace(job, fingerprint="other", ranges=(ChunkRange(1, 1),), weights=job.weights[:2])
    found = collected_set(engine, other)
    assert set(found) == set(other.weights)
    assert stored_covariances(job.folder, job.fingerprint) == {}


def test_a_stop_finishes_the_batch_and_the_rest_gives_the_same_bytes(
    job: CovarianceJob, engine: EmbeddedEngine, tmp_path: Path
) -> None:
    """Also where unfinished sums belong to several groups of a job that may use less memory. The worker computes on until the
    request reaches it: on a busy machine it may then have finished all."""
    job = replace(job, options=replace(OPTIONS, n_batch=128), ranges=(ChunkRange(0, 20),))
    collected_set(engine, job)
    whole = bytes_in(job.folder)
    largest = 8 * triangle(512)
    left = []
    for at, memory, then in ((1, PLENTY, PLENTY), (8, PLENTY, largest), (25, largest, PLENTY)):
        stop, told = Stop(), list[Event]()
        stopped = replace(job, folder=tmp_path / f"stopped-{at}", memory_bytes=memory)

        def notice(event: Event, at: int = at, stop: Stop = stop, told: list[Event] = told) -> None:
            told.append(event)
            if len(told) == at:
                stop.request()

        stopping = EmbeddedEngine(engine.bindings, Runner(stop), cache_dir())
        with pytest.raises(InterruptedRunError):
            stopping.collect_covariances(stopped, notice)
        left.append((stopped.folder / "unfinished.sums").exists())
        assert left[-1] or bytes_in(stopped.folder) == whole
        collected_set(engine, replace(stopped, memory_bytes=then))
        assert bytes_in(stopped.folder) == whole
    assert any(left)


def refused(engine: EmbeddedEngine, job: CovarianceJob, why: str) -> RunnerError:
    with pytest.raises(RunnerError) as caught:
        engine.collect_covariances(job, ignore)
    assert why in caught.value.why
    assert caught.value.todo
    assert stored_covariances(job.folder) == {}
    return caught.value


def test_what_cannot_be_collected_is_refused(job: CovarianceJob, engine: EmbeddedEngine, tmp_path: Path) -> None:
    error = refused(engine, replace(job, memory_bytes=1 << 19), "its sums take 1.00 MiB, and 512.00 KiB may be used")
    assert isinstance(error, EngineError)
    refused(engine, replace(job, weights=("blk.0.attn_norm.weight",)), "saw no product with a weight that is wanted")
    error = refused(engine, replace(job, ranges=(ChunkRange(0, 500),)), "shorter now than when its tokens were counted")
    assert isinstance(error, InvalidDataError)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(job.model.read_bytes())
    set_floats(broken, "blk.0.attn_q.weight", [float("nan")])
    error = refused(engine, replace(job, model=broken), "blk.0.attn_q.weight")
    assert isinstance(error, InvalidDataError)


def test_without_a_compiler_the_error_says_so(
    job: CovarianceJob, engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    without = EmbeddedEngine(find(os.environ, cache_dir()), Runner(), tmp_path / "cache")
    error = refused(without, job, "no C compiler found (no-such-compiler)")
    assert isinstance(error, ToolchainError)
    refused(EmbeddedEngine(engine.bindings, Runner()), job, "there is no folder for them")
