"""Results of testing the kernels of a compiled library: a file that the worker writes and the engine reads."""

from __future__ import annotations

from pathlib import Path

import msgspec

from imatrix_runner.errors import RunnerError
from imatrix_runner.files import read_json, write_json


class Proofs(msgspec.Struct):
    """Names of kernels: ``proven`` gave ggml's bytes in less time, ``refuted`` did not. ``trying``: tests that began and did
    not end because the process died, perhaps of the kernel."""

    proven: list[str] = []
    refuted: list[str] = []
    trying: list[str] = []


def recall_proofs(path: Path) -> Proofs:
    """The stored results; empty if the file is missing or damaged, so that the kernels are tested again."""
    try:
        return read_json(path, Proofs, limit=1 << 16)
    except RunnerError:
        return Proofs()


def remember_proofs(path: Path, proofs: Proofs) -> None:
    """Store the results. If that fails, the kernels are tested again next time."""
    try:
        write_json(path, proofs)
    except RunnerError:
        return
