"""The plan: the steps that a request leads to, decided from facts alone. Nothing here touches a file or a process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.imatrix.step import ImatrixStep
from imatrix_runner.journal import StepRecord, describe_changes, differences
from imatrix_runner.quantize.level_facts import LevelFacts, LevelInputs, facts_of_level
from imatrix_runner.quantize.resolve import Resolved
from imatrix_runner.steps import step_id

State = Literal["todo", "up-to-date", "fails"]

MOST_JOBS = 4

MOVE_AWAY = "Move the file away or delete it to have the level made."


@dataclass(frozen=True)
class LevelStep:
    """One level: its state and the reason, its output files, and the fingerprints of its inputs. ``remedy``: what to do about a
    failing one."""

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
        return step_id("level", self.level.name)


@dataclass(frozen=True)
class MeasureStep:
    """What the levels will be measured with: ``n_chunks`` of ``n_ctx`` tokens of a text, in ``n_passes`` of the source. The
    measurement's own files take ``n_bytes`` at most at a time. ``baselines``: levels are made without imatrix, too."""

    text: str
    n_chunks: int
    n_ctx: int
    n_passes: int
    n_bytes: int
    baselines: bool = False


@dataclass(frozen=True)
class MixingStep:
    """What choosing the types of mixes takes at most: ``n_rounded`` weights are rounded, counted once for each type;
    ``n_tokens`` are computed in ``n_probes`` trials of single tensors and ``n_recipes`` of whole recipes.
    ``tokens_per_second``, ``weights_per_second``: how fast this machine did either before, None where that is not known."""

    n_rounded: int
    n_probes: int
    n_recipes: int
    n_tokens: int
    tokens_per_second: float | None = None
    weights_per_second: float | None = None

    @property
    def rounding_seconds(self) -> float | None:
        return _seconds(self.n_rounded, self.weights_per_second)

    @property
    def trial_seconds(self) -> float | None:
        return _seconds(self.n_tokens, self.tokens_per_second)


def _seconds(amount: int, speed: float | None) -> float | None:
    """None for an unknown speed, unless nothing is to be done."""
    if not amount:
        return 0.0
    return amount / speed if speed else None


@dataclass(frozen=True)
class PredictedKld:
    """The mean KLD of a level before it is made, in nats on ``text``, from what rounding its tensors costs. Nine of ten levels
    are expected to have at most ``factor`` times it, and at least a ``factor``-th. ``scaled_by``: the levels whose measured KLD
    gives the scale."""

    kld: float
    factor: float
    text: str
    scaled_by: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, before it happens. ``free_bytes``: on the work directory's disk; ``mixing``: what comes
    before mixes whose types are not chosen yet; ``predicted``: KLD of stock levels, by name, where a cost map of the model is
    there."""

    workspace: Path
    model: str
    imatrix: ImatrixStep
    levels: tuple[LevelStep, ...]
    free_bytes: int
    measure: MeasureStep | None = None
    notes: tuple[str, ...] = ()
    """Notes to read before levels are made (:mod:`imatrix_runner.quantize.plan_notes`)."""
    predicted: Mapping[str, PredictedKld] = field(default_factory=dict)
    mixing: MixingStep | None = None

    @property
    def todo(self) -> tuple[LevelStep, ...]:
        return tuple(step for step in self.levels if step.state == "todo")

    @property
    def failing(self) -> tuple[LevelStep, ...]:
        return tuple(step for step in self.levels if step.state == "fails")

    passing_bytes: int = 0
    """Bytes that are on the disk only while levels are made, in addition to :attr:`new_bytes`."""

    @property
    def new_bytes(self) -> int:
        """The bytes that the imatrix and the levels will take (levels of a size that only a fork knows count as 0)."""
        return self.imatrix.n_bytes + sum(step.facts.n_bytes or 0 for step in self.todo)


def level_inputs(
    level: Level, options: QuantizeOptions, *, source: str, imatrix: str, engine: str, further: str
) -> dict[str, str]:
    """The named fingerprints of one level. ``further``: what the options do not show (the content of a file)."""
    words = filter(None, (level.ftype, fingerprint_of(level.apply(options), "level"), further))
    return LevelInputs(model_file=source, imatrix=imatrix, options=" ".join(words).strip(), engine=engine).named()


def plan_level(
    level: Level,
    files: tuple[Path, ...],
    inputs: Mapping[str, str],
    record: StepRecord | None,
    *,
    intact: bool,
    resolved: Resolved | None,
    foreign: bool,
) -> LevelStep:
    """Decide one level. ``intact``: its recorded outputs are unchanged; ``foreign``: there is a file of that name that no
    record explains. ``resolved`` may be missing only for a level that is up to date."""
    if record is not None and intact and not differences(record, inputs):
        return LevelStep(level, "up-to-date", "made before from the same inputs", files, inputs, facts_of_level(record))
    assert resolved is not None
    facts = facts_of(resolved)
    if resolved.recipe.failures:
        failure = resolved.recipe.failures[0]
        return LevelStep(level, "fails", failure.why, files, inputs, facts, resolved, failure.todo)
    if foreign:
        why = f"{files[0].name} is there and was not made here"
        return LevelStep(level, "fails", why, files, inputs, facts, resolved, MOVE_AWAY)
    return LevelStep(level, "todo", _why_todo(record, inputs, intact), files, inputs, facts, resolved)


def _why_todo(record: StepRecord | None, inputs: Mapping[str, str], intact: bool) -> str:
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


def needs_dry_run(record: StepRecord | None, inputs: Mapping[str, str], *, intact: bool) -> bool:
    """Whether a level needs a dry run for its recipe: not if it will be skipped anyway."""
    return record is None or not intact or bool(differences(record, inputs))


def plan_jobs(wanted: int | None, levels: int, memory_each: int, available: int, cores: int | None = None) -> int:
    """Return how many llama-quantize run in parallel: as requested, or by levels, cores, memory and :data:`MOST_JOBS`.

    Several with fewer threads are faster than one with all: each spends long on a single thread (reading, checking, writing).
    """
    if wanted is not None:
        return max(1, min(wanted, levels))
    fit = max(1, int(0.8 * available) // max(1, memory_each))
    return max(1, min(levels, cores or os.cpu_count() or 1, fit, MOST_JOBS))


def order_levels(steps: Sequence[LevelStep]) -> list[LevelStep]:
    """Largest first, so that parallel jobs end together; unknown sizes first of all."""
    return sorted(steps, key=lambda step: -(step.facts.n_bytes or 1 << 62))
