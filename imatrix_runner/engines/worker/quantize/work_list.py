"""The work of a pass: for every tensor of the model the distinct types that outputs still need. No native calls.

A pair of tensor and type is computed once, or copied from an output that has it already: a finished one (a donor), or an
interrupted one of this pass. A pair is identified by the model, the library, the type and the tensor's slice of the imatrix
(:func:`weights_key`); types that ignore the imatrix are the same with any.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from imatrix_runner.engines.files import ledger
from imatrix_runner.engines.files.imatrix_weights import Values
from imatrix_runner.engines.jobs import Donor
from imatrix_runner.engines.pass_parts import LedgerEntry, PassWork, WantedPair, WantedPlace
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type, are_extreme_weights
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceHeader, SourceTensor, TensorPlace
from imatrix_runner.engines.worker.quantize.output_files import LevelOutput, OutputFile
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import RowRounder
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.models.ggml_types import IGNORE_WEIGHTS

NO_WEIGHTS = "none"
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
"""Tensors for which an imatrix of another size is ignored (src/llama-quant.cpp, ``tensor_name_match_token_embd``)."""


@dataclass(frozen=True)
class Copy:
    """The place of a pair that is on disk already, and its checksum when it was written."""

    path: Path
    offset: int
    crc: int


@dataclass(frozen=True)
class ScratchPlace:
    """Where a pair goes in place of its outputs: a file, and the byte offset there."""

    file: OutputFile
    offset: int


@dataclass
class TensorWork:
    """One type of one tensor and the outputs that want it. Without ``copies`` it is computed, or taken unchanged if the type is
    the source's own. ``weighted``: quantised with the tensor's weights; ``rounding``: how; ``crcs``: of every slab written so
    far; ``scratch``: where it is written, if not to the outputs."""

    kind: Type
    weighted: bool
    rounding: Rounding
    key: str
    targets: list[tuple[LevelOutput, TensorPlace]]
    copies: list[Copy]
    crcs: dict[int, int] = field(default_factory=dict)
    scratch: ScratchPlace | None = None

    def write(self, offset: int, data: memoryview) -> None:
        """Write part of the tensor, ``offset`` bytes from its beginning, to every output that is not spoiled."""
        if self.scratch is not None:
            self.scratch.file.write(self.scratch.offset + offset, data)
            return
        for output, place in self.alive:
            output.write(place, offset, data)

    @property
    def is_wanted(self) -> bool:
        """Whether an output that is not spoiled wants it."""
        return self.targets[0][0].spoiled is None or any(output.spoiled is None for output, _ in self.targets)

    @property
    def alive(self) -> list[tuple[LevelOutput, TensorPlace]]:
        return [target for target in self.targets if target[0].spoiled is None]


@dataclass
class Work:
    """One tensor, cut into slabs of ``rows`` rows; ``left`` slabs are not done. ``read_weights`` reads its slice of the
    imatrix, which is held from the first slab to the last. ``slab_cost``: elements to quantise in one slab, on average."""

    name: str
    tensor: SourceTensor
    parts: list[TensorWork]
    rows: int
    read_weights: Callable[[], Values]
    left: int = 0
    extreme_weights: bool = False
    slab_cost: float = 0.0
    _weights: Values | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.left = len(self.slabs)
        self.slab_cost = self.cost / self.left

    def weights(self) -> Values:
        """One float32 for every column (of every expert)."""
        with self._lock:
            if self._weights is None:
                self._weights = self.read_weights()
                self.extreme_weights = are_extreme_weights(self._weights)
            return self._weights

    def slabs_done(self, count: int) -> bool:
        """Count more slabs as done; returns whether the last was among them."""
        with self._lock:
            self.left -= count
            if self.left == 0:
                self._weights = None
            return self.left == 0

    @property
    def slabs(self) -> range:
        """The first row of each slab; a tensor without elements has one slab too, so that it is recorded."""
        return range(0, max(self.tensor.rows, 1), self.rows)

    def computes(self, part: TensorWork) -> bool:
        return not part.copies and part.kind.number != self.tensor.kind.number

    @property
    def cost(self) -> int:
        """Elements to quantise."""
        return sum(self.tensor.n_elements for part in self.parts if self.computes(part))


def weights_key(kind: Type, weights: Values | None) -> str:
    """Key of the weights that a type is made with: empty if it ignores them, else a digest of their bytes."""
    if kind.name.upper() in IGNORE_WEIGHTS:
        return ""
    return NO_WEIGHTS if weights is None else hashlib.blake2b(weights.tobytes(), digest_size=12).hexdigest()


def plan_work(
    source: SourceHeader,
    outputs: Sequence[LevelOutput],
    weights: Mapping[str, Mapping[bytes, Values]],
    copies: Copies,
    kernels: Kernels,
    rounder: RowRounder,
    slab: int,
) -> list[Work]:
    """All remaining work, in the order of the model's files. Levels that cannot be made are spoiled, with the reason.

    ``weights``: by level, the values of one and the same imatrix that it is made with."""
    wanted = {
        output: {target.original: target for target in output.level.tensors if target.name in output.places}
        for output in outputs
    }
    works: list[Work] = []
    for name, tensor in source.tensors.items():
        read = next((partial(each.__getitem__, name.encode()) for each in weights.values() if name.encode() in each), None)
        known = read() if read is not None else None
        parts: dict[tuple[str, bool, Rounding], TensorWork] = {}
        for output in outputs:
            target = wanted[output].get(name)
            if target is None or name in output.entries:
                continue
            place = output.places[target.name]
            given = known if name.encode() in weights[output.level.name] else None
            values = given if given is not None and given.size == weights_wanted(tensor) else None
            if why := _impossible(name, tensor, place.kind, given, output, kernels):
                output.spoiled = output.spoiled or (name, why)
                continue
            rounding = target.rounding if place.kind != tensor.kind else STOCK
            part = (place.kind.name, values is not None, rounding)
            if part not in parts:
                further = rounder.key(name, rounding)
                parts[part] = _part(name, tensor, place.kind, values, rounding, further, copies)
            parts[part].targets.append((output, place))
        if parts:
            rows = max(1, slab // tensor.n_per_row)
            works.append(Work(name, tensor, list(parts.values()), rows, read or _no_weights))
    return works


def left_works(works: Sequence[Work]) -> tuple[PassWork, ...]:
    """What of ``works`` has to be computed, as other workers are told."""
    return tuple(
        PassWork(work.name, work.tensor.n_elements, work.tensor.n_bytes, pairs) for work in works if (pairs := _pairs_of(work))
    )


def _pairs_of(work: Work) -> tuple[WantedPair, ...]:
    return tuple(
        WantedPair(
            part.kind.name,
            alive[0][1].n_bytes,
            tuple(WantedPlace(output.level.name, place.file, place.offset) for output, place in alive),
            part.rounding,
        )
        for part in work.parts
        if work.computes(part) and (alive := part.alive)
    )


def plan_part(
    source: SourceHeader,
    outputs: Mapping[str, LevelOutput],
    weights: Mapping[str, Mapping[bytes, Values]],
    kernels: Kernels,
    rounder: RowRounder,
    slab: int,
    unit: Sequence[PassWork],
) -> list[Work]:
    """The work of a unit, as another worker planned it; of levels that are not in ``outputs`` nothing.

    Raises :class:`Refusal` if the model is another one."""
    nothing = Copies("", slab)
    works: list[Work] = []
    for wanted in unit:
        name, key = wanted.tensor, wanted.tensor.encode()
        tensor = source.tensors.get(name)
        if tensor is None or (tensor.n_elements, tensor.n_bytes) != (wanted.elements, wanted.source_bytes):
            raise _another(source, name)
        read = next((partial(each.__getitem__, key) for each in weights.values() if key in each), None)
        known = read() if read is not None else None
        parts: list[TensorWork] = []
        for pair in wanted.pairs:
            kind = kernels.type(pair.type)
            if tensor.rows * kind.row_bytes(tensor.n_per_row) != pair.n_bytes:
                raise _another(source, name)
            places = [place for place in pair.places if place.level in outputs]
            if not places:
                continue
            given = known if key in weights[places[0].level] else None
            values = given if given is not None and given.size == weights_wanted(tensor) else None
            part = _part(name, tensor, kind, values, pair.rounding, rounder.key(name, pair.rounding), nothing)
            part.targets += [
                (outputs[place.level], TensorPlace(place.file, place.offset, kind, pair.n_bytes)) for place in places
            ]
            parts.append(part)
        if parts:
            works.append(Work(name, tensor, parts, max(1, slab // tensor.n_per_row), read or _no_weights))
    return works


def begun_again(work: Work, scratch: OutputFile | None, offset: int) -> Work:
    """The same work with nothing done. Its pairs go to ``scratch`` from a byte offset on, one after the other, if that is
    given."""
    parts: list[TensorWork] = []
    for part in work.parts:
        parts.append(replace(part, crcs={}, scratch=ScratchPlace(scratch, offset) if scratch is not None else None))
        offset += part.targets[0][1].n_bytes
    return Work(work.name, work.tensor, parts, work.rows, work.read_weights)


def _another(source: SourceHeader, tensor: str) -> Refusal:
    return Refusal.invalid(
        f"{source.files[0].name} is not the model of this pass",
        f"{tensor} differs from what was planned",
        "Make sure that every machine of the cluster has the same file.",
    )


def _no_weights() -> Values:
    raise AssertionError("a part without weights asked for them")


def _part(
    name: str, tensor: SourceTensor, kind: Type, values: Values | None, rounding: Rounding, further: str, copies: Copies
) -> TensorWork:
    """``further``: what the bytes depend on besides the type and the imatrix."""
    key = " ".join(filter(None, (weights_key(kind, values), further)))
    known = copies.of(name, kind, key) if kind != tensor.kind else []
    return TensorWork(kind, values is not None, rounding, key, [], known)


def weights_wanted(tensor: SourceTensor) -> int:
    """Number of values that the imatrix must have for a tensor."""
    return tensor.n_per_row * (tensor.shape[2] if len(tensor.shape) > 2 else 1)


def _impossible(
    name: str, tensor: SourceTensor, kind: Type, given: Values | None, output: LevelOutput, kernels: Kernels
) -> str:
    """Why llama-quantize would fail at this tensor, in its words; empty if it would not."""
    if kind == tensor.kind:
        return ""
    if tensor.kind.is_quantised and not output.level.job.options.allow_requantize:
        return f"requantizing from type {tensor.kind.name} is disabled"
    if len(tensor.shape) > 3 and tensor.shape[3] > 1:
        return "it has four dimensions"  # llama-quantize ignores the fourth, then aborts
    if not kernels.can_widen(tensor.kind):
        return f"cannot dequantize/convert tensor type {tensor.kind.name}"
    unfit = given is not None and given.size != weights_wanted(tensor)
    if given is not None and unfit and name not in EMBEDDINGS:
        return f"imatrix size {given.size} is different from tensor size {weights_wanted(tensor)} for {name}"
    if (given is None or unfit) and kernels.needs_weights(kind):
        return f"Missing importance matrix for tensor {name} in a very low-bit quantization"
    return ""


class Copies:
    """Index of tensors already on disk, by tensor, type and imatrix slice."""

    def __init__(self, lineage: str, slab: int) -> None:
        self._lineage, self._slab = lineage, slab
        self._known: dict[tuple[str, str, str], list[Copy]] = {}

    def of(self, tensor: str, kind: Type, key: str) -> list[Copy]:
        return list(self._known.get((tensor, kind.name, key), ()))

    def add_donor(self, donor: Donor) -> None:
        """Add a finished output; one of another model, library or slab size is ignored."""
        found = ledger.read(donor.ledger)
        if found is None or found[0].lineage != self._lineage or found[0].slab != self._slab:
            return
        self._add(found[1], donor.files)

    def add_output(self, output: LevelOutput) -> None:
        """Add an output of this pass with tensors from an earlier run."""
        self._add(output.entries, [file.path for file in output.files])

    def _add(self, entries: Mapping[str, LedgerEntry], files: Sequence[Path]) -> None:
        for entry in entries.values():
            if entry.file < len(files):
                copy = Copy(files[entry.file], entry.offset, entry.crc)
                self._known.setdefault((entry.tensor, entry.type, entry.weights), []).append(copy)
