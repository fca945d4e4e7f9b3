"""Rounds rows of a tensor to a type: with llama-quantize's bytes, by a refined search, or with error feedback.

Rows are rounded one by one whatever the rounding, so cutting a tensor into slabs changes no byte. What error feedback needs of
an input, the factor of its covariance, is made once and shared by all threads and by all weights that read that input.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.engines.files.covariance_file import StoredCovariance, read_covariance, set_fingerprint, stored_covariances
from imatrix_runner.engines.files.imatrix_weights import Values
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.roundings import FEEDBACK, STOCK, Rounding
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceTensor
from imatrix_runner.engines.worker.quantize.rounding.factor import Factor, FactorError, factorise
from imatrix_runner.engines.worker.quantize.rounding.feedback import FeedbackKernels
from imatrix_runner.engines.worker.quantize.rounding.refined import RefinedKernels
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.errors import ToolchainError

DAMPING = 0.1
"""Share of the mean of a covariance's diagonal that is added to the diagonal. From 0.01 to 0.1 the demo model's levels differ
by 3 % at most, and 1 is worse by a tenth to a quarter (docs/measurements.md); the larger holds better for other texts."""

_VERSION = 1
"""Raised when a refined search or error feedback writes other bytes from the same inputs."""

_MOST_FACTORS = 2
"""Factors held at a time: that of the input being worked on, and that of the next, which other threads may have begun."""


def floor_of_tokens(n_columns: int) -> int:
    """Tokens that an expert must have seen for its covariance to be used: fewer than columns say nothing about some of them."""
    return n_columns


@dataclass
class _Slot:
    """A factor, made by the first thread that needs it; None where the covariance has none."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    made: bool = False
    factor: Factor | None = None


class RowRounder:
    """Rounds rows with the kernels of one process. ``threads``: how many make one factor together. ``without_factor``: the
    tensors whose covariance has no factor, and why; they are refined instead."""

    def __init__(self, kernels: Kernels, native: Native | None, covariances: Path | None, threads: int) -> None:
        self._kernels, self._native, self._threads = kernels, native, threads
        self._covariances = stored_covariances(covariances) if covariances is not None else {}
        self._fingerprint = set_fingerprint(covariances) if covariances is not None else ""
        self._feedback: FeedbackKernels | None = None
        self._refined: RefinedKernels | None = None
        self._slots: OrderedDict[tuple[Path, int], _Slot] = OrderedDict()
        self._lock = threading.Lock()
        self.without_factor: dict[str, str] = {}

    def prepare(self, wanted: Collection[tuple[Type, Rounding]]) -> None:
        """Make the kernels ready. Raises :class:`Refusal` where there are none, which need a C compiler."""
        others = sorted({(kind.name, rounding) for kind, rounding in wanted if rounding != STOCK})
        if not others:
            return
        if self._native is None:
            raise Refusal(
                f"{others[0][1].capitalize()} rounding cannot be computed",
                "its kernels could not be compiled",
                "Install a C compiler (gcc or clang), or use --rounding stock.",
                ToolchainError.exit_code,
            )
        self._refined = RefinedKernels(self._native, self._kernels)
        self._feedback = FeedbackKernels(self._native, self._kernels)
        for name, rounding in others:
            kind = self._kernels.type(name)
            refined = not self._refined.serves(kind) or self._refined.prepare(kind)  # where feedback has no factor
            if not refined or (rounding == FEEDBACK and not self._feedback.prepare(kind)):
                raise Refusal.mismatch(f"its {kind.name} is not what {rounding} rounding writes; use --rounding stock")

    def key(self, name: str, rounding: Rounding) -> str:
        """What a tensor's bytes depend on besides its type and the imatrix; empty for stock."""
        if rounding == STOCK:
            return ""
        content = self._fingerprint if rounding == FEEDBACK and name in self._covariances else ""
        digest = hashlib.blake2b(f"{_VERSION} {DAMPING} {content}".encode(), digest_size=8).hexdigest()
        return f"{rounding} {digest}"

    def round(
        self,
        name: str,
        tensor: SourceTensor,
        kind: Type,
        rounding: Rounding,
        rows: range,
        source: int,
        target: int,
        weights: Values | None,
        *,
        extreme: bool,
    ) -> None:
        """Round ``rows`` of a tensor, as float32 at the address ``source``, to ``target``. ``weights``: those of all experts.
        ``extreme``: see :meth:`Kernels.quantize`. It describes the whole slab, so other roundings check rows themselves:
        bytes may not depend on where a tensor is cut."""
        n_per_row, row_bytes = tensor.n_per_row, kind.row_bytes(tensor.n_per_row)
        first = None if weights is None else int(weights.ctypes.data)
        if rounding == STOCK and (first is None or rows.stop <= tensor.rows_per_expert):  # the shortest way, most often taken
            self._kernels.quantize(kind, source, target, len(rows), n_per_row, first, extreme=extreme)
            return
        split = weights is not None or rounding == FEEDBACK
        for expert, some in expert_rows(tensor, rows) if split else [(0, rows)]:
            at = some.start - rows.start
            given = None if first is None else first + 4 * expert * n_per_row
            numbers, into = source + 4 * at * n_per_row, target + at * row_bytes
            if rounding == STOCK:
                self._kernels.quantize(kind, numbers, into, len(some), n_per_row, given, extreme=extreme)
            elif rounding == FEEDBACK and (factor := self._factor(name, n_per_row, expert)) is not None:
                assert self._feedback is not None
                self._feedback.round(kind, numbers, into, len(some), n_per_row, factor)
            elif self._refined is not None and self._refined.serves(kind):
                self._refined.round(kind, numbers, into, len(some), n_per_row, given)
            else:
                self._kernels.quantize(kind, numbers, into, len(some), n_per_row, given, extreme=extreme)

    def _factor(self, name: str, n_per_row: int, expert: int) -> Factor | None:
        """The factor of the covariance of a weight's input; None where there is none, or too little went into it."""
        entry = self._covariances.get(name)
        if entry is None or entry.columns != n_per_row:
            return None
        expert = expert if len(entry.tokens) > 1 else 0
        if entry.tokens[expert] < floor_of_tokens(n_per_row) and len(entry.tokens) > 1:
            return None
        with self._lock:
            slot = self._slots.setdefault((entry.path, expert), _Slot())
            self._slots.move_to_end((entry.path, expert))
            while len(self._slots) > _MOST_FACTORS:
                self._slots.popitem(last=False)
        with slot.lock:
            if not slot.made:
                slot.factor, slot.made = self._make(entry, expert), True
            return slot.factor

    def _make(self, entry: StoredCovariance, expert: int) -> Factor | None:
        assert self._feedback is not None
        try:
            with ThreadPoolExecutor(self._threads) as pool:
                return factorise(self._feedback.library, read_covariance(entry.path, expert), DAMPING, pool)
        except FactorError as error:
            self.without_factor |= dict.fromkeys(entry.weights, str(error))
            return None


def expert_rows(tensor: SourceTensor, rows: range) -> Iterator[tuple[int, range]]:
    """Split rows of a tensor by expert, each of which has its own weights: its number, and its rows among them."""
    per_expert = tensor.rows_per_expert
    row = rows.start
    while row < rows.stop:
        expert = row // per_expert
        stop = min(rows.stop, (expert + 1) * per_expert)
        yield expert, range(row, stop)
        row = stop
