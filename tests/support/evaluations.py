"""Levels of a tiny model to measure, the command line that does it, and what it left."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.evaluate.ab_verdict import Comparison
from imatrix_runner.evaluate.measurements import Measured, comparisons, measured
from imatrix_runner.events import Event, Sink
from imatrix_runner.files import sha256, stamp
from imatrix_runner.journal import Journal
from imatrix_runner.workspace import Workspace
from support.command_line import Ran, RunCommand, run_command
from support.in_process import CommandLine
from support.tiny_models import sample_text

LEVELS = ("Q8_0", "Q4_K_M", "IQ2_XS")
CHUNKS = 8
CONTEXT = 64
COMPUTE = ("-c", str(CONTEXT), "-b", "256", "-ub", "256", "-t", "1")
"""Four chunks side by side, so that eight are two batches."""

OPTIONS = CollectOptions(n_ctx=CONTEXT, n_batch=256, n_ubatch=256, threads=1)
TIMES = ("seconds", "finished")


def held_out_text(path: Path, chunks: int = 14) -> Path:
    """A text of at least so many chunks, nothing of which is in the fixture ``tiny_text``."""
    path.write_text(sample_text(450 * chunks, seed=5), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Place:
    """A work directory, with the model and the text that its levels are measured with."""

    work: Path
    model: Path
    text: Path

    @property
    def workspace(self) -> Workspace:
        name = self.model.stem.removesuffix("-BF16")
        return Workspace(self.work / name, name)

    @property
    def root(self) -> Path:
        return self.workspace.root

    @property
    def journal(self) -> Journal:
        return Journal(self.workspace.journal)

    def arguments(self, *further: str | Path, chunks: int | None = CHUNKS, text: bool = True) -> tuple[str | Path, ...]:
        """``evaluate`` of this model here."""
        limit = ("--chunks", str(chunks)) if chunks is not None else ()
        named = ("--text", self.text) if text else ()
        return ("evaluate", self.model, *named, *COMPUTE, *limit, *further, "--work-dir", self.work)

    def evaluate(
        self, run: CommandLine | RunCommand, *further: str | Path, chunks: int | None = CHUNKS, text: bool = True
    ) -> Ran:
        return run(*self.arguments(*further, chunks=chunks, text=text))

    def copy(self, to: Path) -> Place:
        """As a restored backup."""
        shutil.copytree(self.work, to)
        return replace(self, work=to)

    def figures(self) -> dict[str, Measured]:
        return measured(self.journal)

    def divergences(self) -> dict[str, Divergence]:
        return {name: each.divergence for name, each in self.figures().items()}

    def pairs(self) -> dict[str, Comparison]:
        return comparisons(self.journal)

    def facts(self) -> dict[str, object]:
        """All that the journal holds of measurements, but for when and how long."""
        steps = self.journal.steps()
        return {
            step: {key: value for key, value in msgspec.to_builtins(record).items() if key not in (*TIMES, "reason")}
            for step, record in sorted(steps.items())
            if step.split(" ")[0] in ("evaluate", "compare")
        }

    def runs(self) -> dict[str, int]:
        """How often an engine computed something for a measurement, by the name of its log."""
        logs = [*self.workspace.logs.glob("evaluate-*.log"), *self.workspace.logs.glob("check.log")]
        return {log.stem.removeprefix("evaluate-"): _runs(log) for log in logs}

    def files(self) -> set[str]:
        """What a measurement left beside the levels."""
        return {path.name for path in self.workspace.evaluation.iterdir()} if self.workspace.evaluation.is_dir() else set()

    def tree(self) -> dict[str, tuple[int, int]]:
        """Every file, with when it was written and its length."""
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in self.work.rglob("*") if path.is_file()}

    def spoil(self, level: str, number: float = math.inf) -> None:
        """Have this level's file compute no number, and the journal say that it was made so."""
        break_norm(self.workspace.level_file(level), number)
        self.accept(level)

    def accept(self, level: str) -> None:
        """Have the journal say that this level was made as its file is now."""
        file = self.workspace.level_file(level)
        journal, step = self.journal, f"level-{level}"
        output = replace(journal[step].outputs[0], stamp=stamp(file), sha256=sha256(file))
        journal.record(step, replace(journal[step], outputs=[output]))


def _runs(log: Path) -> int:
    return sum(line.startswith("$ ") for line in log.read_text(encoding="utf-8").splitlines())


def ran_since(before: Mapping[str, int], place: Place) -> dict[str, int]:
    """What the engine was asked since then, and how often."""
    return {name: count - before.get(name, 0) for name, count in place.runs().items() if count != before.get(name, 0)}


def break_norm(model: Path, number: float = math.inf) -> None:
    """Infinity in its last norm: it loads and computes no number. (NaN gets lost where activations are quantised.)"""
    import numpy as np

    from imatrix_runner.models.gguf_file import read_header

    header = read_header(model)
    norm = next(tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    with model.open("r+b") as file:
        file.seek(header.data_offset + norm.offset)
        file.write(np.array([number], "<f4").tobytes())


def zero_tensors(model: Path, *names: str) -> None:
    """Fill these tensors with zero bytes."""
    from imatrix_runner.models.gguf_file import read_header

    header = read_header(model)
    sizes = {tensor.name: tensor.n_bytes for tensor in header.tensors}
    places = {tensor.name: header.data_offset + tensor.offset for tensor in header.tensors}
    with model.open("r+b") as file:
        for name in names:
            file.seek(places[name])
            file.write(bytes(sizes[name]))


def make_levels(folder: Path, model: Path, calibration: Path, *further: str | Path, levels: tuple[str, ...] = LEVELS) -> Place:
    """Levels of ``model`` with an imatrix of ``calibration``, none measured."""
    place = Place(folder / "work", model, held_out_text(folder / "held-out.txt"))
    done = run_command(
        *("run", model, "-f", calibration, "-c", "128", "--chunks", "8", "--levels", ",".join(levels), *further),
        *("--work-dir", place.work),
        cwd=folder,
    )
    assert done.code == 0, done.err
    return place


class Watch:
    """A sink that looks how much of the disk a measurement takes whenever something happens."""

    def __init__(self, workspace: Workspace, then: Sink) -> None:
        self._workspace, self._then = workspace, then
        self.most = 0
        self.most_baselines = 0

    def __call__(self, event: Event) -> None:
        baselines = list(self._workspace.baselines.rglob("*.gguf"))
        sizes = {path: path.stat().st_size for path in (*baselines, *self._workspace.evaluation.rglob("*")) if path.is_file()}
        self.most = max(self.most, sum(sizes.values()))
        self.most_baselines = max(self.most_baselines, len(baselines))
        self._then(event)
