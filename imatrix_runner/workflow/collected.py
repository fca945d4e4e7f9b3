"""What the journal keeps of a collection: facts of the step that made a matrix, read back as they were written."""

from __future__ import annotations

import msgspec

from imatrix_runner.imatrix.convergence import Point


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
    manifest: str | None = None
    parse_special: bool | None = None
    template: str | None = None
    sources: list[SourceShare] = []


class CollectedFacts(msgspec.Struct, frozen=True):
    """``stopped``: what ended the collection: ``chunks``, ``converged``, ``covered`` or ``text``."""

    dataset: str
    calibration: CalibrationFacts | None = None
    ppl: float | None = None
    ppl_error: float | None = None
    stopped: str | None = None
    curve: list[Point] = []
