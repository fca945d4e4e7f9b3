"""The plan: what a request leads to, decided from facts alone. Nothing here touches a file or a process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.engines.base import Fallback, QuantizeOptions
from imatrix_runner.engines.binaries.argv import quantize_options
from imatrix_runner.journal import Record, describe_changes, differences
from imatrix_runner.quantize.levels import Level
from imatrix_runner.quantize.resolve import Resolved

State = Literal["todo", "up-to-date", "fails"]
ImatrixAction = Literal["none", "use", "fetch", "generate", "up-to-date"]

MOST_JOBS = 4

MOVE_AWAY = "Move the file away or delete it to have the level made."


@dataclass(frozen=True)
class ImatrixStep:
    """``generate`` makes ``path``; ``fetch`` (told by a dry run only) downloads it;
    ``use`` and ``up-to-date`` read it; ``none`` quantises without. ``reason`` is for people;
    ``n_bytes`` is about what making it writes, its ranges and snapshots too."""

    action: ImatrixAction
    path: Path | None
    reason: str
    n_chunks: int | None = None
    n_tokens: int | None = None
    n_bytes: int = 0

    @property
    def present(self) -> bool:
        """Whether levels are made with an imatrix."""
        return self.action != "none"


@dataclass(frozen=True)
class LevelFacts:
    """The figures of a level, from its recipe or from the journal. ``recipe`` is the recipe's fingerprint (empty in journals of
    before it was kept); ``is_source``: no tensor's type changes."""

    n_bytes: int | None
    bits_per_weight: float | None
    needs_imatrix: bool
    fallbacks: tuple[Fallback, ...]
    fallback_share: float
    weightless: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    recipe: str = ""
    is_source: bool = False

    def gains(self, n_bytes: int, source_bytes: int) -> bool:
        """Whether a file of ``n_bytes`` is another one than its source, and smaller (``source_bytes`` 0: not known)."""
        return not self.is_source and (n_bytes < source_bytes or not source_bytes)


@dataclass(frozen=True)
class LevelStep:
    """One level: its state and why, the files it gives, and the fingerprints of what goes in. ``remedy``: what to do about one
    that fails."""

    level: Level
    state: State
    reason: str
    files: tuple[Path, ...]
    inputs: Mapping[str, str]
    facts: LevelFacts
    resolved: Resolved | None = None
    remedy: str = ""

    @property
    def step(self) -> str:
        return step_name(self.level)


@dataclass(frozen=True)
class MeasureStep:
    """What the levels will be measured with: ``n_chunks`` of ``n_ctx`` tokens of a text, in ``n_passes`` of the source. The
    measurement's own files take ``n_bytes`` at most at a time. ``twins``: levels are made without imatrix, too."""

    text: str
    n_chunks: int
    n_ctx: int
    n_passes: int
    n_bytes: int
    twins: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, before it happens. ``free_bytes``: on the work directory's disk."""

    workspace: Path
    model: str
    imatrix: ImatrixStep
    levels: tuple[LevelStep, ...]
    free_bytes: int
    measure: MeasureStep | None = None
    notes: tuple[str, ...] = ()
    """What is to be known before levels are made (:mod:`imatrix_runner.workflow.plan_notes`)."""

    @property
    def todo(self) -> tuple[LevelStep, ...]:
        return tuple(step for step in self.levels if step.state == "todo")

    @property
    def failing(self) -> tuple[LevelStep, ...]:
        return tuple(step for step in self.levels if step.state == "fails")

    @property
    def new_bytes(self) -> int:
        """Bytes the imatrix and the levels to do will write (levels whose size only a fork knows count as nothing)."""
        return self.imatrix.n_bytes + sum(step.facts.n_bytes or 0 for step in self.todo)


def step_name(level: Level) -> str:
    return f"level-{level.name}"


def level_inputs(
    level: Level, options: QuantizeOptions, *, source: str, imatrix: str, engine: str, further: str
) -> dict[str, str]:
    """The named fingerprints of one level. Threads and the buffer's size are left out: they do not change a byte.
    ``further`` stands for what the options do not tell (the content of a file)."""
    flags = quantize_options(
        QuantizeOptions(**{**vars(level.apply(options)), "max_buffer_size": None, "tensor_type_file": None})
    )
    return {
        "model file": source,
        "imatrix": imatrix,
        "options": " ".join((level.ftype, *flags, further)).strip(),
        "engine": engine,
    }


def plan_level(
    level: Level,
    files: tuple[Path, ...],
    inputs: Mapping[str, str],
    record: Record | None,
    *,
    intact: bool,
    resolved: Resolved | None,
    foreign: bool,
) -> LevelStep:
    """Decide one level. ``intact``: its recorded outputs are unchanged; ``foreign``: a file of that name is there which
    no record of ours explains. ``resolved`` may be missing only for a level that is up to date."""
    if record is not None and intact and not differences(record, inputs):
        return LevelStep(level, "up-to-date", "made before from the same inputs", files, inputs, facts_of_record(record))
    assert resolved is not None
    facts = facts_of(resolved)
    if resolved.recipe.failures:
        failure = resolved.recipe.failures[0]
        return LevelStep(level, "fails", failure.why, files, inputs, facts, resolved, failure.todo)
    if foreign:
        why = f"{files[0].name} is there and was not made here"
        return LevelStep(level, "fails", why, files, inputs, facts, resolved, MOVE_AWAY)
    return LevelStep(level, "todo", _why_todo(record, inputs, intact), files, inputs, facts, resolved)


def _why_todo(record: Record | None, inputs: Mapping[str, str], intact: bool) -> str:
    if record is None:
        return "not made yet"
    changed = differences(record, inputs)
    if not changed:
        assert not intact
        return "the file is gone or was changed"
    return "changed: " + "; ".join(describe_changes(record.inputs, inputs))


def facts_of(resolved: Resolved) -> LevelFacts:
    recipe = resolved.recipe
    return LevelFacts(
        recipe.file_bytes,
        recipe.bits_per_weight,
        recipe.needs_imatrix,
        recipe.fallbacks,
        recipe.fallback_share,
        recipe.weightless,
        recipe.unseen,
        resolved.pinned,
        recipe.fingerprint,
        recipe.is_source,
    )


@dataclass(frozen=True)
class _MadeFacts:
    level: LevelFacts


def facts_of_record(record: Record) -> LevelFacts:
    """What the plan said of a level when it was made. Raises :class:`InvalidDataError` for a journal that has it otherwise."""
    return record.facts_as(_MadeFacts).level


def needs_dry_run(record: Record | None, inputs: Mapping[str, str], *, intact: bool) -> bool:
    """Whether a level's recipe must be asked for: not if it will be skipped anyway."""
    return record is None or not intact or bool(differences(record, inputs))


def plan_jobs(wanted: int | None, levels: int, memory_each: int, available: int, cores: int | None = None) -> int:
    """How many llama-quantize run side by side: as asked for, else bounded by levels, cores, memory and :data:`MOST_JOBS`.

    Several with fewer threads beat one with all: each has long single-threaded stretches (reading, checking, writing).
    """
    if wanted is not None:
        return max(1, min(wanted, levels))
    fit = max(1, int(0.8 * available) // max(1, memory_each))
    return max(1, min(levels, cores or os.cpu_count() or 1, fit, MOST_JOBS))


def order_levels(steps: Sequence[LevelStep]) -> list[LevelStep]:
    """Largest first, so that parallel jobs end together; unknown sizes first of all."""
    return sorted(steps, key=lambda step: -(step.facts.n_bytes or 1 << 62))
