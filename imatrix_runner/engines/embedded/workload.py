"""What a pass has to do: for every tensor of the model the distinct types that outputs still want of it. No native call.

A pair of tensor and type is computed once, or copied from an output that has it already: one finished before (a donor), or one
of this pass that was interrupted. Which pair that is, is told by the model, the library, the type and the tensor's slice of the
imatrix (:func:`weights_key`); types that ignore the imatrix are the same with any.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from imatrix_runner.engines.base import Donor
from imatrix_runner.engines.embedded import ledger
from imatrix_runner.engines.embedded.headers import Place, Source, SourceTensor
from imatrix_runner.engines.embedded.kernels import Kernels, Type, are_wild_weights
from imatrix_runner.engines.embedded.outputs import Output
from imatrix_runner.engines.embedded.weights import Values
from imatrix_runner.models.ggml_types import IGNORE_WEIGHTS

NO_WEIGHTS = "none"
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")  # src/llama-quant.cpp, tensor_name_match_token_embd


@dataclass(frozen=True)
class Copy:
    """Where a pair lies already, and the checksum it had when it was written."""

    path: Path
    offset: int
    crc: int


@dataclass
class Part:
    """One type of one tensor and the outputs that want it. Without ``copies`` it is computed, or if the type is the source's
    own taken as it is. ``weighted``: by the tensor's weights; ``crcs``: of every slab written so far."""

    kind: Type
    weighted: bool
    key: str
    targets: list[tuple[Output, Place]]
    copies: list[Copy]
    crcs: dict[int, int] = field(default_factory=dict)

    @property
    def alive(self) -> list[tuple[Output, Place]]:
        return [target for target in self.targets if target[0].spoiled is None]


@dataclass
class Work:
    """One tensor, cut into slabs of ``rows`` rows; ``left`` slabs are not done. ``read_weights`` reads its slice of the
    imatrix, which is held from the first slab to the last."""

    name: str
    tensor: SourceTensor
    parts: list[Part]
    rows: int
    read_weights: Callable[[], Values]
    left: int = 0
    wild_weights: bool = False
    _weights: Values | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.left = len(self.slabs)

    def weights(self) -> Values:
        """One float32 for every column (of every expert)."""
        with self._lock:
            if self._weights is None:
                self._weights = self.read_weights()
                self.wild_weights = are_wild_weights(self._weights)
            return self._weights

    def slab_done(self) -> bool:
        """One slab more is done; whether it was the last."""
        with self._lock:
            self.left -= 1
            if self.left == 0:
                self._weights = None
            return self.left == 0

    @property
    def slabs(self) -> range:
        """The first row of each slab; a tensor without elements has one slab all the same, so that it is recorded."""
        return range(0, max(self.tensor.rows, 1), self.rows)

    def computes(self, part: Part) -> bool:
        return part.kind != self.tensor.kind and not part.copies

    @property
    def cost(self) -> int:
        """Elements to quantise."""
        return sum(self.tensor.n_elements for part in self.parts if self.computes(part))


def weights_key(kind: Type, weights: Values | None) -> str:
    """Which weights a type is made with: empty where it ignores them, else a digest of their bytes."""
    if kind.name.upper() in IGNORE_WEIGHTS:
        return ""
    return NO_WEIGHTS if weights is None else hashlib.blake2b(weights.tobytes(), digest_size=12).hexdigest()


def plan_work(
    source: Source, outputs: Sequence[Output], weights: Mapping[bytes, Values], copies: Copies, kernels: Kernels, slab: int
) -> list[Work]:
    """Everything left to do, in the order of the model's files. Levels that cannot be made are spoiled, with the reason."""
    wanted = {
        output: {target.original: target for target in output.level.tensors if target.name in output.places}
        for output in outputs
    }
    works: list[Work] = []
    for name, tensor in source.tensors.items():
        given = weights.get(name.encode())
        values = given if given is not None and given.size == _weights_wanted(tensor) else None
        parts: dict[str, Part] = {}
        for output in outputs:
            target = wanted[output].get(name)
            if target is None or name in output.ledger.entries:
                continue
            place = output.places[target.name]
            if why := _impossible(name, tensor, place.kind, given, output, kernels):
                output.spoiled = output.spoiled or (name, why)
                continue
            if place.kind.name not in parts:
                parts[place.kind.name] = _part(name, tensor, place.kind, values, copies)
            parts[place.kind.name].targets.append((output, place))
        if parts:
            rows = max(1, slab // tensor.n_per_row)
            works.append(Work(name, tensor, list(parts.values()), rows, partial(weights.__getitem__, name.encode())))
    return works


def _part(name: str, tensor: SourceTensor, kind: Type, values: Values | None, copies: Copies) -> Part:
    key = weights_key(kind, values)
    return Part(kind, values is not None, key, [], copies.of(name, kind, key) if kind != tensor.kind else [])


def _weights_wanted(tensor: SourceTensor) -> int:
    return tensor.n_per_row * (tensor.shape[2] if len(tensor.shape) > 2 else 1)


def _impossible(name: str, tensor: SourceTensor, kind: Type, given: Values | None, output: Output, kernels: Kernels) -> str:
    """Why llama-quantize would give up at this tensor, in its words; empty if it would not."""
    if kind == tensor.kind:
        return ""
    if tensor.kind.is_quantised and not output.level.job.options.allow_requantize:
        return f"requantizing from type {tensor.kind.name} is disabled"
    if len(tensor.shape) > 3 and tensor.shape[3] > 1:
        return "it has four dimensions"  # of which llama-quantize forgets the last, and then aborts
    if not kernels.can_widen(tensor.kind):
        return f"cannot dequantize/convert tensor type {tensor.kind.name}"
    unfit = given is not None and given.size != _weights_wanted(tensor)
    if given is not None and unfit and name not in _EMBEDDINGS:
        return f"imatrix size {given.size} is different from tensor size {_weights_wanted(tensor)} for {name}"
    if (given is None or unfit) and kernels.needs_weights(kind):
        return f"Missing importance matrix for tensor {name} in a very low-bit quantization"
    return ""


class Copies:
    """What lies in outputs already, by what it is."""

    def __init__(self, lineage: str, slab: int) -> None:
        self._lineage, self._slab = lineage, slab
        self._known: dict[tuple[str, str, str], list[Copy]] = {}

    def of(self, tensor: str, kind: Type, key: str) -> list[Copy]:
        return list(self._known.get((tensor, kind.name, key), ()))

    def add_donor(self, donor: Donor) -> None:
        """A finished output; of another model or library it has nothing to give."""
        found = ledger.read(donor.ledger)
        if found is None or found[0].lineage != self._lineage or found[0].slab != self._slab:
            return
        self._add(found[1], donor.files)

    def add_output(self, output: Output) -> None:
        """An output of this pass that was begun before."""
        self._add(output.ledger.entries, [file.path for file in output.files])

    def _add(self, entries: Mapping[str, ledger.Entry], files: Sequence[Path]) -> None:
        for entry in entries.values():
            if entry.file < len(files):
                copy = Copy(files[entry.file], entry.offset, entry.crc)
                self._known.setdefault((entry.tensor, entry.type, entry.weights), []).append(copy)
