"""The contract between the rooms that plan work and the engines that compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from imatrix_runner.errors import InterruptedRunError, RunnerError
from imatrix_runner.events import Sink
from imatrix_runner.toolchain.probe import QuantType

if TYPE_CHECKING:
    from imatrix_runner.engines.measures import Divergence, JudgeJob, ReferJob


@dataclass(frozen=True)
class CollectOptions:
    """How chunks are computed; names and defaults are llama-imatrix's.

    ``n_gpu_layers`` is llama.cpp's ``-ngl`` as typed (a number, ``auto`` or ``all``), ``tensor_split`` its ``-ts``,
    ``split_mode`` its ``-sm``, ``main_gpu`` its ``-mg``, ``override_tensors`` its ``-ot`` (each ``REGEX=BUFFER``),
    ``flash_attn`` its ``-fa`` (``on``, ``off``, ``auto``); empty or None: llama.cpp's default. ``repack`` false is its
    ``--no-repack``; an engine also leaves repacking out where it does not work (then :meth:`Engine.arithmetic` says so).
    ``extra`` are further llama-imatrix options, passed through unread.
    """

    n_ctx: int = 512
    n_batch: int = 2048
    n_ubatch: int = 512
    threads: int | None = None
    n_gpu_layers: str = ""
    tensor_split: str = ""
    split_mode: str = ""
    main_gpu: int | None = None
    override_tensors: tuple[str, ...] = ()
    flash_attn: str = ""
    mmap: bool = True
    parse_special: bool = False
    process_output: bool = False
    ppl: bool = True
    repack: bool = True
    extra: tuple[str, ...] = ()

    @property
    def chunks_at_once(self) -> int:
        """llama-imatrix computes so many chunks side by side, as sequences of one batch."""
        return max(1, self.n_batch // self.n_ctx)

    @property
    def scored_tokens(self) -> int:
        """Tokens of a chunk that count for the perplexity: the second half's predictions."""
        return self.n_ctx - 1 - self.n_ctx // 2


@dataclass(frozen=True)
class ChunkRange:
    """Chunks ``first`` .. ``first + count - 1`` of the tokenised calibration text."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count

    @property
    def file_name(self) -> str:
        """``000012-000024.gguf``"""
        return f"{self.first:06d}-{self.end:06d}.gguf"


@dataclass(frozen=True)
class CollectJob:
    """Collect ``ranges`` of chunks in the order given, each into one complete imatrix file ``folder / range.file_name``.

    ``fingerprint`` stands for everything the sums depend on: an engine may leave unfinished work in ``folder`` and continue
    from it, exactly, when the same fingerprint comes again.
    """

    step: str
    model: Path
    text: Path
    ranges: tuple[ChunkRange, ...]
    folder: Path
    options: CollectOptions
    fingerprint: str
    log: Path | None


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihoods of scored tokens, summed: ``nll`` and their squares (None where the tool does not tell)."""

    nll: float = 0.0
    nll2: float | None = 0.0
    tokens: int = 0

    def __add__(self, other: Perplexity) -> Perplexity:
        squares = None if self.nll2 is None or other.nll2 is None else self.nll2 + other.nll2
        return Perplexity(self.nll + other.nll, squares, self.tokens + other.tokens)

    @property
    def value(self) -> float | None:
        """exp(mean nll); None when nothing was scored."""
        return math.exp(min(self.nll / self.tokens, 700.0)) if self.tokens else None

    @property
    def error(self) -> float | None:
        """llama-imatrix's ``+/-``: the standard error of the mean nll times the perplexity."""
        if self.nll2 is None or self.tokens < 2 or self.value is None:
            return None
        variance = self.nll2 / self.tokens - (self.nll / self.tokens) ** 2
        error = math.sqrt(variance / (self.tokens - 1)) * self.value if variance > 0 else math.inf
        return error if math.isfinite(error) else None


@dataclass(frozen=True)
class Piece:
    """One finished range: its file (sums and counts of just these chunks) and what was measured on the way.

    ``perplexity`` may cover fewer chunks than the range: llama-imatrix loses its last lines now and then.
    """

    chunks: ChunkRange
    path: Path
    seconds: float
    load_seconds: float
    perplexity: Perplexity


LEDGER_NAME = "ledger.jsonl"
"""The file beside an output of a pass that says which of its tensors are on the disk."""

OnPiece = Callable[[Piece], bool]
"""Hears of every finished range, in order; false ends the job: what it has is enough."""


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
    ``needs_imatrix`` is only ever true when none was given. ``row_bytes``: bytes of one row by type (upper case) and row
    length, for types that only the engine's programs know. ``certain``: false where the programs could not say what they do
    with the model and made a skeleton of it instead; then another type in the finished file is no error. ``required``: tensors
    for which they refuse to do without imatrix data.
    """

    types: Mapping[str, str]
    fallbacks: tuple[Fallback, ...]
    needs_imatrix: bool
    row_bytes: Mapping[tuple[str, int], int] = field(default_factory=dict)
    certain: bool = True
    required: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantized:
    """What a finished :class:`QuantizeJob` reported."""

    seconds: float
    fallbacks: tuple[Fallback, ...] = ()
    without_weights: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class TensorTarget:
    """One tensor of an output: its name there, its name in the model, and the ggml type it becomes."""

    name: str
    original: str
    type: str


@dataclass(frozen=True)
class PassLevel:
    """One output of a pass. ``job`` says what llama-quantize would be told, ``tensors`` (in the output's order) what becomes of
    each; ``fingerprint`` stands for everything its bytes depend on: an unfinished output of the same is continued."""

    name: str
    job: QuantizeJob
    tensors: tuple[TensorTarget, ...]
    fingerprint: str


@dataclass(frozen=True)
class Donor:
    """A finished output whose tensors may be copied: its files, and the ledger that says how they came to be."""

    files: tuple[Path, ...]
    ledger: Path


@dataclass(frozen=True)
class PassJob:
    """Many levels from one reading of the model.

    ``lineage`` stands for the model and the library: tensors of a donor with another one are not ours to copy.
    ``buffer_bytes`` bounds what is held of tensors at a time. ``own_kernels``: where the engine has quicker ones than
    llama.cpp's that give the same bytes, it may use them.
    """

    step: str
    sources: tuple[Path, ...]
    levels: tuple[PassLevel, ...]
    donors: tuple[Donor, ...]
    lineage: str
    imatrix: Path | None
    threads: int | None
    buffer_bytes: int
    log: Path | None
    own_kernels: bool = True


@dataclass(frozen=True)
class CheckJob:
    """Read the files of one output again: every row, and against ``ledger`` (if there is one) every byte."""

    step: str
    files: tuple[Path, ...]
    ledger: Path | None
    threads: int | None
    log: Path | None


@dataclass(frozen=True)
class PassedLevel:
    """How a level of a pass ended: whole on disk beside its ledger, or (``tensor``, ``why``) spoiled by one tensor.

    ``computed``, ``copied`` and ``kept`` count its tensors: quantised now, taken from a donor, or there from a run before.
    """

    name: str
    tensor: str = ""
    why: str = ""
    computed: int = 0
    copied: int = 0
    kept: int = 0
    without_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class TypeCost:
    """What a pass spent on one type: pairs of a tensor and this type, how many outputs wanted them, seconds of threads."""

    type: str
    pairs: int
    wanted: int
    elements: int
    seconds: float


@dataclass(frozen=True)
class PassFigures:
    """Where a pass's time went, in seconds of threads but for ``seconds``. ``shares``: by level, its part of the time for
    types; what several levels want alike counts for each of them in equal parts."""

    seconds: float
    threads: int
    types: tuple[TypeCost, ...]
    tables: float
    reading: float
    widening: float
    checking: float
    writing: float
    shares: Mapping[str, float] = field(default_factory=dict)


OnePass = Callable[[PassJob, Sink], tuple[tuple[PassedLevel, ...], PassFigures]]
"""Writes all levels of a job, each beside its ledger; at a stop what is done stays, and the same job continues."""


def attempt(engine: Engine, job: QuantizeJob) -> DryRun | RunnerError:
    """One dry run, its error as a value; but a stop stops."""
    try:
        return engine.dry_run(job)
    except InterruptedRunError:
        raise
    except RunnerError as error:
        return error


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

    def arithmetic(self) -> str:
        """The identity, and whatever else the sums of an imatrix depend on."""
        ...

    @property
    def types(self) -> tuple[QuantType, ...]:
        """Every quantisation type that can be made, with llama-quantize's names."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """The GPUs it sees, one line each."""
        ...

    @property
    def counts_experts(self) -> bool:
        """Whether a collected matrix says how many tokens each expert saw, and keeps a tensor of which one saw none."""
        ...

    def collect(self, job: CollectJob, sink: Sink, on_piece: OnPiece) -> None:
        """Compute the job's ranges. Progress counts the chunks done of the whole job; a stop ends it after what can be kept."""
        ...

    def refer(self, job: ReferJob, sink: Sink) -> None:
        """Write what the source predicts. Progress counts chunks; a stop ends it after what can be kept."""
        ...

    def judge(self, job: JudgeJob, sink: Sink) -> Divergence | None:
        """Compare a level with the source. None: the scored tokens lie in ``job.out``
        (:func:`~imatrix_runner.engines.embedded.scored.read_scored`), else what the engine itself makes of them."""
        ...

    def dry_run(self, job: QuantizeJob) -> DryRun: ...

    def dry_runs(self, jobs: Sequence[QuantizeJob], log: Path | None) -> list[DryRun | RunnerError]:
        """Several at once, for less than one by one: for each job its answer, or the error it alone would have raised."""
        ...

    def quantize(self, job: QuantizeJob, sink: Sink) -> Quantized: ...

    @property
    def one_pass(self) -> OnePass | None:
        """Makes many levels in one reading of the model; None where levels are made one by one."""
        ...

    def command(self, job: QuantizeJob) -> str:
        """A line that whoever has llama.cpp's programs could type to get the same file: for the journal."""
        ...
