"""A pass that several workers share: what is left to compute, each worker's part of it, and what a worker wrote.

The grain is a pair of a tensor and a type. Which worker computes a pair changes no byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from imatrix_runner.engines.roundings import STOCK, Rounding


class LedgerEntry(msgspec.Struct, frozen=True):
    """A finished tensor: its name in the model, its type, its weights' key
    (:func:`~imatrix_runner.engines.worker.quantize.work_list.weights_key`), its place, and the CRC-32 of its slabs' CRC-32s."""

    tensor: str
    type: str
    weights: str
    file: int
    offset: int
    bytes: int
    crc: int


@dataclass(frozen=True)
class WantedPlace:
    """Where an output wants a tensor: the level's name, the number of its file, the byte offset there."""

    level: str
    file: int
    offset: int


@dataclass(frozen=True)
class WantedPair:
    """A type that a tensor has to be quantised to, how it is rounded, its size there in bytes, and where it goes."""

    type: str
    n_bytes: int
    places: tuple[WantedPlace, ...]
    rounding: Rounding = STOCK


@dataclass(frozen=True)
class PassWork:
    """A tensor that has to be computed: its name in the model, its elements, its size there in bytes, and the wanted types."""

    tensor: str
    elements: int
    source_bytes: int
    pairs: tuple[WantedPair, ...]


@dataclass(frozen=True)
class PassPart:
    """A worker's part of a pass whose outputs were prepared
    (:meth:`~imatrix_runner.engines.embedded.engine.EmbeddedEngine.prepare_pass`).

    ``units``: what is reported as done together; with ``ordered`` only those whose numbers are given to the engine, as they are
    given. ``slab``: elements per checksum, as prepared.

    Without ``scratch`` the worker writes into the outputs and records what is on the disk in its own ledger next to each
    (``name`` is part of its file name, so no two running workers may share one). With it, a folder of its own, the worker
    writes each pair of a unit once into one file there, and records nothing: who reads the file removes it.
    """

    name: str
    units: tuple[tuple[PassWork, ...], ...]
    slab: int
    ordered: bool = False
    scratch: Path | None = None


@dataclass(frozen=True)
class WrittenPair:
    """A finished pair: the ledger's entry for each level that wants it, and where it lies in the unit's scratch file."""

    entries: Mapping[str, LedgerEntry] = field(default_factory=dict)
    offset: int = 0
