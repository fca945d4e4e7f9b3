"""The contract between the rooms that plan work and the engines that compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from imatrix_runner.events import Sink


@dataclass(frozen=True)
class CollectOptions:
    """How chunks are computed; names and defaults are llama-imatrix's.

    ``n_gpu_layers`` is llama.cpp's ``-ngl`` as typed (a number, ``auto`` or ``all``; empty: its default).
    ``extra`` are further llama.cpp options, passed through unread.
    """

    n_ctx: int = 512
    n_batch: int = 2048
    n_ubatch: int = 512
    threads: int | None = None
    n_gpu_layers: str = ""
    parse_special: bool = False
    process_output: bool = False
    ppl: bool = True
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChunkRange:
    """Chunks ``first`` .. ``first + count - 1`` of the tokenised calibration text."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclass(frozen=True)
class CollectJob:
    """Collect one range of chunks into one complete imatrix file ``out``."""

    step: str
    model: Path
    text: Path
    out: Path
    chunks: ChunkRange
    options: CollectOptions
    log: Path | None


@dataclass(frozen=True)
class Collected:
    """What a finished :class:`CollectJob` measured. ``ppl`` is the perplexity (None when not asked for) of the range's first
    ``ppl_chunks``: llama-imatrix may lose its last lines, and the rest of the range with them."""

    seconds: float
    load_seconds: float
    ppl: float | None
    ppl_chunks: int


@dataclass(frozen=True)
class QuantizeOptions:
    """llama-quantize's own options, the same for every level of a run; but ``pins``, which are ours and a level's: further
    ``--tensor-type`` entries that come after all the user gave, because in llama-quantize the first match wins."""

    allow_requantize: bool = False
    leave_output_tensor: bool = False
    pure: bool = False
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    output_tensor_type: str = ""
    token_embedding_type: str = ""
    tensor_types: tuple[str, ...] = ()
    tensor_type_file: Path | None = None
    pins: tuple[str, ...] = ()
    prune_layers: str = ""
    keep_split: bool = False
    override_kv: tuple[str, ...] = ()
    max_buffer_size: int | None = None


@dataclass(frozen=True)
class QuantizeJob:
    """Write ``source`` as llama.cpp ftype ``ftype`` to ``out`` (with ``keep_split``: the shards' common stem)."""

    step: str
    source: Path
    out: Path
    ftype: str
    options: QuantizeOptions
    imatrix: Path | None
    threads: int | None
    log: Path | None


@dataclass(frozen=True)
class Fallback:
    """A tensor whose row length does not divide into the wanted type's blocks, and the type llama.cpp took instead."""

    tensor: str
    wanted: str
    got: str


@dataclass(frozen=True)
class DryRun:
    """What llama.cpp says it would do: the source of every recipe.

    ``types``: tensor name -> ggml type name (lower case, as ggml prints it) for every tensor of the output, in its order;
    ``needs_imatrix`` is only ever true when none was given.
    """

    types: Mapping[str, str]
    fallbacks: tuple[Fallback, ...]
    needs_imatrix: bool


@dataclass(frozen=True)
class Quantized:
    """What a finished :class:`QuantizeJob` reported."""

    seconds: float
    fallbacks: tuple[Fallback, ...] = ()
    without_weights: tuple[str, ...] = field(default=())


class Engine(Protocol):
    """Computes in child processes. Failures are :class:`~imatrix_runner.errors.EngineError` or a more exact error of ours."""

    @property
    def name(self) -> str: ...

    def identity(self) -> str:
        """The program, version and build: part of every fingerprint, because other builds may give other bytes."""
        ...

    def count_tokens(self, model: Path, text: Path, *, parse_special: bool, log: Path | None) -> int:
        """Tokens of ``text`` as the model's own tokenizer and the collector see them (BOS included)."""
        ...

    def collect(self, job: CollectJob, sink: Sink) -> Collected: ...

    def dry_run(self, job: QuantizeJob) -> DryRun: ...

    def quantize(self, job: QuantizeJob, sink: Sink) -> Quantized: ...
