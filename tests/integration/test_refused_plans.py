"""A model that llama.cpp refuses costs one attempt, however many levels are planned, and every level has its own reason."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import DryRun, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.levels import resolve_levels
from imatrix_runner.errors import RunnerError
from imatrix_runner.imatrix.expected import expect
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Outcome, Runner
from imatrix_runner.quantize.resolve import Resolver
from imatrix_runner.quantize.usable_imatrix import expected_weights
from imatrix_runner.toolchain.store import cache_dir
from support.in_process import CommandLine
from support.tiny_architectures import write_architecture
from support.tiny_models import write_llama_gguf

LEVELS = ("Q8_0", "Q4_K_M", "Q99_X", "Q4_0", "IQ9_9")
"""Two of them are no types of llama.cpp's."""


class CountingRunner(Runner):
    """A runner that knows how many programs it was asked to run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def run(self, *arguments: Any, **options: Any) -> Outcome:
        self.runs += 1
        return super().run(*arguments, **options)


def damaged(model: Path, key: str, value: int) -> Path:
    """Have a number of the metadata be another."""
    data = bytearray(model.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 4] = struct.pack("<I", value)
    model.write_bytes(data)
    return model


def wrong_width(folder: Path) -> Path:
    """Its heads are half as wide as its metadata says of their rotation."""
    return damaged(write_llama_gguf(folder / "wide-BF16.gguf"), "llama.embedding_length", 128)


def sound(folder: Path) -> Path:
    return write_llama_gguf(folder / "sound-BF16.gguf")


def unknown_architecture(folder: Path) -> Path:
    model = write_llama_gguf(folder / "strange-BF16.gguf")
    model.write_bytes(model.read_bytes().replace(b"llama", b"lxama"))
    return model


def no_blocks(folder: Path) -> Path:
    """llama.cpp takes that for impossible, and aborts."""
    return damaged(write_llama_gguf(folder / "empty-BF16.gguf"), "llama.block_count", 0)


def test_a_model_that_ends_every_worker_ends_two(tmp_path: Path) -> None:
    """The second shows that it is not the level."""
    model, runner = no_blocks(tmp_path), CountingRunner()
    engine = EmbeddedEngine(find(os.environ, cache_dir()), runner)
    jobs = [QuantizeJob(name, model, tmp_path / "out", name, QuantizeOptions(), None, 1, None) for name in LEVELS]
    told = engine.dry_runs(jobs, tmp_path / "plan.log")
    assert runner.runs == 2
    assert len(told) == len(jobs)
    for job, error in zip(jobs, told, strict=True):
        assert isinstance(error, RunnerError)
        assert error.what == f"llama.cpp cannot plan {job.ftype}"
        assert "killed by SIGABRT" in error.why


@pytest.mark.parametrize(
    ("made", "failing"),
    [(wrong_width, LEVELS), (unknown_architecture, LEVELS), (sound, ("Q99_X", "IQ9_9"))],
)
def test_one_worker_says_why_each_level_fails(made: Callable[[Path], Path], failing: tuple[str, ...], tmp_path: Path) -> None:
    """Also where only some fail."""
    model = made(tmp_path)
    runner = CountingRunner()
    engine = EmbeddedEngine(find(os.environ, cache_dir()), runner)
    jobs = [QuantizeJob(name, model, tmp_path / "out", name, QuantizeOptions(), None, 1, None) for name in LEVELS]
    together = engine.dry_runs(jobs, tmp_path / "plan.log")
    assert runner.runs == 1
    for job, told in zip(jobs, together, strict=True):
        if job.ftype not in failing:
            assert told == engine.dry_run(job)
            continue
        with pytest.raises(RunnerError) as alone:
            engine.dry_run(job)
        assert isinstance(told, type(alone.value))
        assert (told.what, told.why) == (alone.value.what, alone.value.why)
        assert told.todo.startswith(alone.value.todo)  # and where the log is
    assert any(isinstance(told, DryRun) for told in together) == (made is sound)


@pytest.mark.parametrize("uncovered", ["keep", "q4_k"])
def test_pins_of_all_levels_are_planned_by_one_worker_more(uncovered: str, tmp_path: Path) -> None:
    """The first answers show which tensors are pinned, and the recipes are those of levels that are planned alone."""
    model = open_gguf(
        write_architecture("glm4moe", tmp_path / "mtp-BF16.gguf", dtype="BF16"), allow_requantize=False, name="mtp"
    )
    runner, options = CountingRunner(), QuantizeOptions()
    engine = EmbeddedEngine(find(os.environ, cache_dir()), runner)
    weights = expected_weights(expect(model), options)
    alone = Resolver(model, engine, options, None, weights, uncovered=uncovered)
    levels = resolve_levels(("Q2_K", "Q4_K_M"), engine.types)
    together = alone.asked(levels, None)
    asked = runner.runs
    found = [together.resolve(level, None) for level in levels]
    assert 2 <= asked == runner.runs <= 3
    assert any(each.pinned for each in found)
    assert found == [alone.resolve(level, None) for level in levels]
    assert runner.runs > asked + len(levels)


@pytest.mark.parametrize("engine", ["embedded", "binaries"])
def test_advise_stops_at_a_model_that_cannot_be_loaded(
    engine: str, tiny_text: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr("imatrix_runner.app.advise.probe", lambda model, *_: timed.append(model.name))
    done = cli("advise", wrong_width(tmp_path), "-f", tiny_text, "-c", "128", "--engine", engine)
    assert done.code == 6
    assert "Error: llama.cpp can make no level of wide-BF16.gguf." in done.err
    assert "Why: the model's metadata says 64 rotary dimensions, but its heads have 32." in done.err
    assert timed == []
