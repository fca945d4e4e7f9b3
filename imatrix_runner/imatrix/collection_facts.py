"""The journal's record of a collection: the inputs that decide a matrix, and the facts of the step that made it.

Names and meanings stay; a fact that earlier programs did not write has a default.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from imatrix_runner.imatrix.convergence import Point
from imatrix_runner.steps import Inputs


class ImatrixInputs(Inputs, frozen=True, kw_only=True):
    """What a collected matrix depends on. ``chunks`` and ``options`` are fingerprints of options."""

    model_file: str
    calibration_text: str
    calibration_manifest: str | UnsetType = UNSET
    context: str
    chunks: str
    options: str
    engine: str


class SourceShare(msgspec.Struct, frozen=True):
    """One source of a built calibration text, and its share of the text."""

    name: str
    sha256: str
    licence: str
    share: float


class CalibrationFacts(msgspec.Struct, frozen=True):
    """A calibration text; what follows ``sha256`` is there only if this program built the text."""

    path: str
    bytes: int
    sha256: str
    manifest: str | UnsetType | None = UNSET
    parse_special: bool | UnsetType | None = UNSET
    template: str | UnsetType | None = UNSET
    sources: tuple[SourceShare, ...] | UnsetType = UNSET


class CollectedFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How a matrix was collected. ``tokens``: of the whole text; ``ppl_chunks``: the number of chunks of ``ppl``; ``stopped``:
    what ended it: ``chunks``, ``converged``, ``covered`` or ``text``; ``parse_special``: whether special tokens were parsed;
    ``processors``: features of those that computed the sums, where they differ."""

    chunks: int | UnsetType = UNSET
    ranges: str | UnsetType = UNSET
    tokens: int | UnsetType = UNSET
    dataset: str
    calibration: CalibrationFacts | None = None
    ppl: float | None = None
    ppl_error: float | None = None
    ppl_chunks: int | UnsetType = UNSET
    load_seconds: float | UnsetType = UNSET
    stopped: str | None = None
    curve: tuple[Point, ...] | UnsetType = UNSET
    parse_special: bool | UnsetType = UNSET
    processors: tuple[str, ...] | UnsetType = UNSET
