"""An engine's jobs and their results: collection, dry runs, the single pass, the check of finished levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.engines.pass_parts import PassPart, PassWork, WrittenPair
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.fingerprints import counted_apart, harmless, spelt


@dataclass(frozen=True)
class CollectOptions:
    """How chunks are computed; names and defaults are llama-imatrix's.

    ``n_gpu_layers`` is llama.cpp's ``-ngl`` as typed (a number, ``auto`` or ``all``), ``tensor_split`` its ``-ts``,
    ``split_mode`` its ``-sm``, ``main_gpu`` its ``-mg``, ``override_tensors`` its ``-ot`` (each ``REGEX=BUFFER``),
    ``flash_attn`` its ``-fa`` (``on``, ``off``, ``auto``); empty or None: llama.cpp's default. ``repack`` false is its
    ``--no-repack``; an engine also leaves repacking out where it does not work (then
    :meth:`~imatrix_runner.engines.contract.Engine.arithmetic` says so). ``extra`` are further llama-imatrix options, passed
    through unread."""

    n_ctx: int = field(
        default=512,
        metadata={
            **counted_apart("the input 'context'", "imatrix", "figures"),
            **harmless("an answer's context is as long as its prompt needs", "answers"),
        },
    )
    n_batch: int = field(
        default=2048,
        metadata={
            **spelt("-b", always=True),
            **harmless("how many prompts are answered in parallel follows from their lengths", "answers"),
        },
    )
    n_ubatch: int = field(default=512, metadata=spelt("-ub", always=True))
    threads: int | None = field(default=None, metadata=harmless("each row is computed by one thread"))
    n_gpu_layers: str = field(default="", metadata=spelt("-ngl"))
    tensor_split: str = field(default="", metadata=spelt("-ts"))
    split_mode: str = field(default="", metadata=spelt("-sm"))
    main_gpu: int | None = field(default=None, metadata=spelt("-mg"))
    override_tensors: tuple[str, ...] = field(default=(), metadata=spelt("-ot"))
    flash_attn: str = field(default="", metadata=spelt("-fa"))
    mmap: bool = field(
        default=True,
        metadata={**spelt("--no-mmap"), **harmless("mapped or read, the weights are the same", "figures", "answers")},
    )
    repack: bool = field(default=True, metadata=spelt("--no-repack"))
    parse_special: bool = field(
        default=False,
        metadata={
            **spelt("--parse-special"),
            **harmless("a text to measure on is always read as plain text", "figures"),
            **counted_apart("the input 'template': only a prompt that one wrote has special tokens", "answers"),
        },
    )
    process_output: bool = field(
        default=False, metadata={**spelt("--process-output"), **harmless("only an imatrix has sums", "figures", "answers")}
    )
    ppl: bool = field(default=True, metadata=harmless("the perplexity is read off on the way and changes no sum"))
    extra: tuple[str, ...] = field(
        default=(), metadata={**spelt(""), **harmless("only llama-imatrix is given them", "figures", "answers")}
    )

    @property
    def chunks_at_once(self) -> int:
        """How many chunks llama-imatrix computes in parallel, as sequences of one batch."""
        return max(1, self.n_batch // self.n_ctx)

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of a chunk: the predictions in its second half."""
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

    ``fingerprint`` covers everything that the sums depend on: an engine may leave unfinished work in ``folder`` and continue
    it exactly for a job with the same fingerprint. ``ordered``: only those ranges whose places in ``ranges`` are given to the
    engine (:class:`~imatrix_runner.process.Orders`), as they are given.
    """

    step: str
    model: Path
    text: Path
    ranges: tuple[ChunkRange, ...]
    folder: Path
    options: CollectOptions
    fingerprint: str
    log: Path | None
    ordered: bool = False


@dataclass(frozen=True)
class Perplexity:
    """Sums over scored tokens: ``nll`` of -ln p, ``nll2`` of its square (None where the engine does not report it)."""

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
class CollectedRange:
    """One finished range: its file (sums and counts of these chunks only), times, and perplexity.

    ``perplexity`` may cover fewer chunks than the range: llama-imatrix sometimes loses its last lines of output.
    ``processor``: features of the one that computed it, as llama.cpp names them (empty: not known).
    """

    chunks: ChunkRange
    path: Path
    seconds: float
    load_seconds: float
    perplexity: Perplexity
    processor: str = ""


LEDGER_NAME = "ledger.jsonl"
"""Name of the file, next to an output of a pass, that lists the tensors already on disk."""

_TYPES_ONLY = counted_apart("the types in its recipe", "content")


@dataclass(frozen=True)
class QuantizeOptions:
    """llama-quantize's own options, the same for every level of a run. Two belong to one level: ``pins``, further
    ``--tensor-type`` entries, placed after the user's because llama-quantize takes the first match; and ``rounding``, how its
    numbers are rounded, for which llama-quantize has no option. Two are llama-gguf-split's: ``split_max_size``, in megabytes
    (10^6 bytes), and ``split_max_tensors``, of which at most one is given."""

    allow_requantize: bool = field(default=False, metadata={**spelt("--allow-requantize"), **_TYPES_ONLY})
    leave_output_tensor: bool = field(default=False, metadata={**spelt("--leave-output-tensor"), **_TYPES_ONLY})
    pure: bool = field(default=False, metadata={**spelt("--pure"), **_TYPES_ONLY})
    keep_split: bool = field(default=False, metadata=spelt("--keep-split"))
    include_weights: tuple[str, ...] = field(default=(), metadata=spelt("--include-weights"))
    exclude_weights: tuple[str, ...] = field(default=(), metadata=spelt("--exclude-weights"))
    tensor_types: tuple[str, ...] = field(default=(), metadata={**spelt("--tensor-type"), **_TYPES_ONLY})
    override_kv: tuple[str, ...] = field(default=(), metadata=spelt("--override-kv"))
    output_tensor_type: str = field(default="", metadata={**spelt("--output-tensor-type"), **_TYPES_ONLY})
    token_embedding_type: str = field(default="", metadata={**spelt("--token-embedding-type"), **_TYPES_ONLY})
    tensor_type_file: Path | None = field(default=None, metadata=counted_apart("the hash of its content"))
    prune_layers: str = field(default="", metadata=spelt("--prune-layers"))
    max_buffer_size: int | None = field(
        default=None, metadata=harmless("rows are quantised one by one, whatever the buffer holds")
    )
    pins: tuple[str, ...] = field(default=(), metadata={**spelt("--tensor-type"), **_TYPES_ONLY})
    rounding: Rounding = field(default=STOCK, metadata=spelt("--rounding"))
    split_max_size: int | None = field(default=None, metadata=spelt("--split-max-size", form="{}M"))
    split_max_tensors: int | None = field(default=None, metadata=spelt("--split-max-tensors"))

    @property
    def is_split(self) -> bool:
        """Whether the level is to be cut into shards as llama-gguf-split does; one that fits into one is not."""
        return self.split_max_size is not None or self.split_max_tensors is not None

    @property
    def unsplit(self) -> QuantizeOptions:
        """The same options for a level in one file, which holds the same tensors."""
        return replace(self, split_max_size=None, split_max_tensors=None)


@dataclass(frozen=True)
class QuantizeJob:
    """Write ``source`` as llama.cpp ftype ``ftype`` to ``out`` (where it becomes shards: their common stem). ``shards``: number
    of tensors in each shard, as llama-gguf-split cuts a level; empty for one that is not cut so."""

    step: str
    source: Path
    out: Path
    ftype: str
    options: QuantizeOptions
    imatrix: Path | None
    threads: int | None
    log: Path | None
    shards: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fallback:
    """A tensor whose row length is not a multiple of the wanted type's block size, and the type llama.cpp took instead."""

    tensor: str
    wanted: str
    got: str


@dataclass(frozen=True)
class DryRun:
    """What llama.cpp says it would do: the source of every recipe.

    ``types``: tensor name -> ggml type name (lower case, as ggml prints it) for every tensor of the output, in its order;
    ``needs_imatrix`` can be true only if no imatrix was given. ``row_bytes``: bytes of one row by type (upper case) and row
    length, for types that only the engine's programs know. ``certain``: false where the programs could not plan the model
    itself and quantised a skeleton of it instead; another type in the finished file is then not an error. ``required``:
    tensors that they refuse to quantise without imatrix data.
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
    """One tensor of an output: its name there, its name in the model, the ggml type it becomes, and how it is rounded to it."""

    name: str
    original: str
    type: str
    rounding: Rounding = STOCK


@dataclass(frozen=True)
class PassLevel:
    """One output of a pass. ``job`` is the equivalent llama-quantize job, ``tensors`` (in the output's order) give the type of
    each; ``fingerprint`` covers everything that its bytes depend on: an unfinished output with the same one is continued."""

    name: str
    job: QuantizeJob
    tensors: tuple[TensorTarget, ...]
    fingerprint: str


@dataclass(frozen=True)
class Donor:
    """A finished output whose tensors may be copied: its files, and the ledger that records how they were made."""

    files: tuple[Path, ...]
    ledger: Path


@dataclass(frozen=True)
class Native:
    """The compiled library of native kernels, and the file with the results of comparing them with the ggml in use."""

    library: Path
    proofs: Path


@dataclass(frozen=True)
class PassJob:
    """Many levels from one reading of the model.

    ``lineage`` identifies the model and the library: tensors of a donor with another lineage are not copied.
    ``buffer_bytes`` bounds the memory for tensors. ``native_kernels``: the engine may use kernels that are faster than
    llama.cpp's and give the same bytes; it then sets ``native`` to their library. ``covariances``: the folder of those of the
    model's inputs, for tensors that are rounded with error feedback. ``part``: what of the pass one of several workers does; it
    copies nothing, and leaves it to a pass without part to take in what all workers recorded, and to finish the levels.
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
    native_kernels: bool = True
    native: Native | None = None
    covariances: Path | None = None
    part: PassPart | None = None


@dataclass(frozen=True)
class CheckJob:
    """Validate every row in the files of one output, and compare all bytes with the checksums in ``ledger`` (if not None)."""

    step: str
    files: tuple[Path, ...]
    ledger: Path | None
    threads: int | None
    log: Path | None


@dataclass(frozen=True)
class PassedLevel:
    """How a level of a pass ended: complete on disk with its ledger, or spoiled by one tensor (``tensor``, ``why``).

    ``computed``, ``copied`` and ``kept`` count its tensors: quantised now, taken from a donor, or left by an earlier run.
    ``without_feedback``: those that were to be rounded with error feedback, and could not.
    """

    name: str
    tensor: str = ""
    why: str = ""
    computed: int = 0
    copied: int = 0
    kept: int = 0
    without_weights: tuple[str, ...] = ()
    without_feedback: tuple[str, ...] = ()


@dataclass(frozen=True)
class TypeCost:
    """What a pass spent on one type: pairs of a tensor and this type, how many outputs wanted them, thread seconds."""

    type: str
    pairs: int
    wanted: int
    elements: int
    seconds: float


@dataclass(frozen=True)
class PassFigures:
    """Where a pass's time went, in thread seconds except for ``seconds``. ``shares``: by level, its share of the time for
    types; the time for what several levels share is divided equally among them."""

    seconds: float
    threads: int
    types: tuple[TypeCost, ...]
    tables: float
    reading: float
    widening: float
    checking: float
    writing: float
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedPass:
    """What is left to compute of a pass whose outputs are there, and the elements per checksum."""

    works: tuple[PassWork, ...]
    slab: int


@dataclass(frozen=True)
class PartEnd:
    """How a part of a pass ended. ``rest`` is None where it ended by itself; where the library aborted the worker it is the job
    without the levels that were ``lost``, with which another worker goes on."""

    rest: PassJob | None
    lost: tuple[PassedLevel, ...] = ()


@dataclass(frozen=True)
class PassedUnit:
    """A unit of a :class:`~imatrix_runner.engines.pass_parts.PassPart` that is done.

    ``scratch``: the file with its pairs, one after the other, if the part has such a folder. ``spoiled``: the levels that this
    worker found impossible so far, and why; what only they want is not in ``written``. ``figures``: where the time went since
    the unit that was reported before. ``without_factor``: the tensors that could not be rounded with error feedback so far.
    """

    number: int
    written: tuple[WrittenPair, ...]
    figures: PassFigures
    scratch: Path | None = None
    spoiled: tuple[PassedLevel, ...] = ()
    without_factor: tuple[str, ...] = ()
