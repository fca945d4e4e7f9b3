"""Plan a pass: many levels from one reading of the model, and the finished outputs it may copy tensors from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from imatrix_runner.engines.jobs import Donor, PassLevel, QuantizeJob, TensorTarget
from imatrix_runner.engines.roundings import STOCK, rounding_of
from imatrix_runner.quantize.recipe import Recipe

DEFAULT_BUFFER_MIB = 1024


def lineage(source: str, engine: str) -> str:
    """Return what two outputs must share for one to copy tensors of the other: the model's content and the library."""
    return _digest([source, engine])


def pass_level(
    name: str, recipe: Recipe, job: QuantizeJob, inputs: Mapping[str, str], covered: Collection[str] = ()
) -> PassLevel:
    """Return one output of a pass. Its fingerprint also covers what ``inputs`` may not show: the imatrix's name, which is
    written into the file, and the types, which llama.cpp chose. ``covered``: the weights whose inputs have a covariance."""
    wanted = job.options.rounding
    tensors = tuple(
        TensorTarget(
            tensor.name,
            tensor.original,
            tensor.type,
            rounding_of(tensor.type, wanted, has_covariance=tensor.original in covered) if tensor.changes else STOCK,
        )
        for tensor in recipe.tensors
    )
    imatrix = job.imatrix.name if job.imatrix is not None else ""
    # Spelt out, because the fingerprint of stock levels may not change: unfinished ones are continued by it.
    spelt = [{"name": each.name, "original": each.original, "type": each.type} for each in tensors]
    others = [each.rounding for each in tensors] if wanted != STOCK else []
    return PassLevel(name, job, tensors, _digest([dict(inputs), imatrix, spelt, *others]))


def buffer_bytes(max_buffer_size: int | None) -> int:
    """Return the limit on a pass's buffers, in bytes; ``max_buffer_size`` in MiB, as in ``--max-buffer-size``."""
    return (max_buffer_size or DEFAULT_BUFFER_MIB) << 20


def donor(files: Sequence[Path], ledger: Path) -> Donor | None:
    """Return a finished output that a pass may copy from; None if it has no ledger."""
    return Donor(tuple(files), ledger) if ledger.is_file() else None


def _digest(value: object) -> str:
    return "sha256:" + hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
