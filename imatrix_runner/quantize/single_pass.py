"""Plan a pass: many levels from one reading of the model, and the finished outputs it may copy tensors from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from imatrix_runner.engines.base import Donor, PassLevel, QuantizeJob, TensorTarget
from imatrix_runner.quantize.recipe import Recipe

DEFAULT_BUFFER_MIB = 1024


def lineage(source: str, engine: str) -> str:
    """What two outputs must have in common for one to copy tensors of the other: the model's content and the library."""
    return _digest([source, engine])


def pass_level(name: str, recipe: Recipe, job: QuantizeJob, inputs: Mapping[str, str]) -> PassLevel:
    """One output of a pass. Its fingerprint also has what ``inputs`` need not tell: the imatrix's name is written into the
    file, and the types are llama.cpp's answer."""
    tensors = tuple(TensorTarget(tensor.name, tensor.original, tensor.type) for tensor in recipe.tensors)
    imatrix = job.imatrix.name if job.imatrix is not None else ""
    return PassLevel(name, job, tensors, _digest([dict(inputs), imatrix, tensors]))


def buffer_bytes(max_buffer_size: int | None) -> int:
    """The bound on a pass's buffers; ``max_buffer_size`` in MiB, as ``--max-buffer-size`` takes it."""
    return (max_buffer_size or DEFAULT_BUFFER_MIB) << 20


def donor(files: Sequence[Path], ledger: Path) -> Donor | None:
    """A finished output that a pass may copy from, if there is a ledger of it."""
    return Donor(tuple(files), ledger) if ledger.is_file() else None


def _digest(value: object) -> str:
    return "sha256:" + hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
