"""The journal's record of a finished level: the inputs that decide its bytes, and the facts from its plan.

Names and meanings stay; a fact that earlier programs did not write has a default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from imatrix_runner.engines.jobs import Fallback
from imatrix_runner.engines.roundings import Rounding
from imatrix_runner.files import encode_json
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.steps import Inputs, step_id
from imatrix_runner.untrusted import UnreadableError, from_json


class LevelInputs(Inputs, frozen=True, kw_only=True):
    """What a level's bytes depend on. ``options``: its ftype and the fingerprint of options."""

    model_file: str
    imatrix: str
    options: str
    engine: str


@dataclass(frozen=True)
class LevelFacts:
    """The figures of a level, from its recipe or from the journal. ``recipe`` is the recipe's fingerprint (empty in journals
    from before it was stored); ``is_source``: no tensor's type changes."""

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
        """Whether a file of ``n_bytes`` differs from its source and is smaller (``source_bytes`` 0: not known)."""
        return not self.is_source and (n_bytes < source_bytes or not source_bytes)


@dataclass(frozen=True)
class MadeFacts:
    """A finished level: the facts from its plan, with its actual size. ``share``: its share of the work of a pass;
    ``without_weights``: tensors that llama-quantize found no weights for; ``copied_from``: the level with the same tensors that
    it is a copy of; ``ftype``: llama-quantize's name of the ftype that the level is based on. ``rounding``: of its numbers,
    where it is not llama-quantize's; ``without_feedback``: tensors that error feedback could not round, which are refined."""

    level: LevelFacts
    share: float | None = None
    without_weights: tuple[str, ...] = ()
    copied_from: str | UnsetType = UNSET
    ftype: str | UnsetType = UNSET
    rounding: Rounding | UnsetType = UNSET
    without_feedback: tuple[str, ...] | UnsetType = UNSET


def uncut(options: str) -> str:
    """Return the options of a level (in its inputs) without those that only say how it is cut into shards."""
    return re.sub(r" --split-max-(?:size \d+M|tensors \d+)(?= |$)", "", options)


def ftype_of(record: StepRecord) -> str:
    """Return llama-quantize's name of the ftype that a level is based on. Earlier versions stored it only as the first word of
    the options."""
    return record.facts_as(MadeFacts).ftype or record.inputs_as(LevelInputs).options.split(" ")[0]


def facts_of_level(record: StepRecord) -> LevelFacts:
    """Return the facts from a level's plan. Raises :class:`InvalidDataError` for a journal that stores them differently."""
    return record.facts_as(MadeFacts).level


def release_level(journal: Journal, name: str) -> None:
    """Record that a level's files may be gone, because they were published: reports still list it."""
    record = journal.get(step_id("level", name))
    if record is not None:
        journal.remember(released=encode_json({**_released(journal), name: record.finished}).decode())


def is_released(journal: Journal, name: str, record: StepRecord) -> bool:
    """Whether the files of this making of a level were removed after they were published."""
    return _released(journal).get(name) == record.finished


def _released(journal: Journal) -> dict[str, str]:
    """When each released level was made, by name."""
    try:
        return from_json(journal.fact("released") or "{}", dict[str, str])
    except UnreadableError:
        return {}
