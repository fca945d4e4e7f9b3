"""Recipes: one level on one model, from llama.cpp's own dry run, with size and verdict before any work."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from imatrix_runner.engines.jobs import DryRun, Fallback, QuantizeOptions
from imatrix_runner.engines.levels import PLAIN_FTYPES, Level
from imatrix_runner.engines.shards import cut
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, padded, tensor_bytes, type_id, type_size
from imatrix_runner.models.native_types import NATIVE_TYPES, keep_native, native_tensors
from imatrix_runner.quantize.level_files import plan_shards
from imatrix_runner.quantize.usable_imatrix import NO_IMATRIX, OUTPUT, Failure, Lacks, UsableImatrix, requires_imatrix
from imatrix_runner.untrusted import whole_number

MAX_TEXT = 127  # llama_model_kv_override.val_str

_BLOCK = re.compile(r"^blk\.(\d+)\.")

_SPLIT_KEYS = {"split.no": 2, "split.count": 2, "split.tensors.count": 4}
"""The metadata that every shard has, and the bytes of its values."""


@dataclass(frozen=True)
class RecipeTensor:
    """One tensor of the output. ``shape`` in ggml order; ``n_bytes`` is None for a type only the tools know; ``original``: its
    name in the model, which differs where ``--prune-layers`` renumbers."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    n_bytes: int | None
    original: str = ""

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def changes(self) -> bool:
        return self.type != self.source_type


@dataclass(frozen=True)
class Recipe:
    """A level on a model, resolved.

    ``file_bytes``: size of the output, None when a type's size is unknown (a fork's). ``failures``: why llama-quantize would
    refuse and what to do. ``weightless``: tensors that will be quantised without weights although there is an imatrix;
    ``unseen``: those whose entry counted no token, so that all their columns have equal weights; ``starved``: those whose type
    requires the weights that the imatrix lacks (each is a failure too). ``certain``: see
    :class:`~imatrix_runner.engines.contract.DryRun`. ``further``: the options that change more of the output than types.
    ``shards``: the number of tensors in each shard, empty for a level that is not cut (or fits into one shard).
    """

    level: Level
    tensors: tuple[RecipeTensor, ...]
    fallbacks: tuple[Fallback, ...]
    weightless: tuple[str, ...]
    failures: tuple[Failure, ...]
    needs_imatrix: bool
    file_bytes: int | None
    unseen: tuple[str, ...] = ()
    starved: tuple[str, ...] = ()
    certain: bool = True
    further: str = ""
    shards: tuple[int, ...] = ()

    @property
    def n_elements(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def fingerprint(self) -> str:
        """A digest of the type of every tensor and what else decides their content: two levels of one model and imatrix with
        equal fingerprints hold the same tensors, whatever their names. Empty for a level that cannot be made."""
        if not self.tensors:
            return ""
        pairs = sorted(f"{tensor.name} {tensor.original} {tensor.type}" for tensor in self.tensors)
        # A blank line separates the two. Fingerprints of earlier versions, without the options, never equal these.
        return hashlib.sha256("\n".join((*pairs, "", self.further)).encode()).hexdigest()

    @property
    def is_source(self) -> bool:
        """Whether every tensor keeps its type, so that nothing is quantised."""
        return bool(self.tensors) and not any(tensor.changes for tensor in self.tensors)

    @property
    def data_bytes(self) -> int | None:
        sizes = [tensor.n_bytes for tensor in self.tensors]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of tensor data per weight of the model, llama-quantize's BPW."""
        return 8 * self.data_bytes / self.n_elements if self.data_bytes is not None and self.tensors else None

    @property
    def fallback_share(self) -> float:
        """The share of the model's weights in tensors with a fallback type."""
        fallen = {fallback.tensor for fallback in self.fallbacks}
        return sum(tensor.n_elements for tensor in self.tensors if tensor.name in fallen) / max(1, self.n_elements)


def make_recipe(
    level: Level,
    header: GgufHeader,
    tensors: Sequence[TensorInfo],
    dry_run: DryRun,
    weights: UsableImatrix | None,
    options: QuantizeOptions,
) -> Recipe:
    """Combine llama.cpp's dry run with the model's shapes and the imatrix's entries.

    ``header`` is that of the first shard (its metadata is copied), ``tensors`` those of all shards. ``weights`` may be those of
    an imatrix that is still to be collected; None where there is none.
    """
    sources = {tensor.name: tensor for tensor in tensors}
    kept = _kept_layers(header, options)
    rows: list[RecipeTensor] = []
    failures: list[Failure] = []
    lacks = Lacks(weights, options) if weights is not None else None
    needs = dry_run.needs_imatrix
    for name, type_name in dry_run.types.items():
        original = _original_name(name, kept)
        source = sources.get(original)
        if source is None:
            continue  # reported below, with the tensor that was meant
        kind = type_name.upper()
        number = type_id(kind)
        n_bytes = tensor_bytes(source.shape, number) if number is not None else _reported_bytes(source.shape, kind, dry_run)
        rows.append(RecipeTensor(name, written_shape(source.shape), source.type_name, kind, n_bytes, original))
        if kind == source.type_name.upper():
            continue
        required = requires_imatrix(name, kind, level.ftype) or name in dry_run.required
        needs = needs or required
        if source.is_quantised and not options.allow_requantize:
            failures.append(_again(source, name, kind, tensors))
        if (bad := _shape_problem(name, source.shape, kind, number)) is not None:
            failures.append(bad)
        if (bad := conversion_problem(source)) is not None:
            failures.append(bad)
        if lacks is not None:
            lacks.check(original, source.shape, kind, required=required)
    shards, unfit = plan_shards([row.name for row in rows], [row.n_bytes for row in rows], options)
    headers = _header_bytes(rows, shards, header, weights, options)
    failures += _unplanned(sources, rows, len(dry_run.types), options)
    failures += layout_problems(header, sources, rows, headers[0], options)
    failures += unfit
    if lacks is not None:
        failures += lacks.failures
    elif needs:
        failures.append(NO_IMATRIX)
    return Recipe(
        level,
        tuple(rows),
        dry_run.fallbacks,
        tuple(lacks.weightless) if lacks is not None else (),
        tuple(failures),
        needs,
        _file_bytes(rows, headers),
        tuple(lacks.unseen) if lacks is not None else (),
        tuple(lacks.starved) if lacks is not None else (),
        dry_run.certain,
        fingerprint_of(options if shards else options.unsplit, "content"),
        shards,
    )


def _reported_bytes(shape: tuple[int, ...], kind: str, dry_run: DryRun) -> int | None:
    """Return the bytes of a tensor whose type only the engine's programs know; None if they did not report a row's size."""
    row = dry_run.row_bytes.get((kind, shape[0]))
    return row * prod(shape[1:]) if row is not None else None


def _again(source: TensorInfo, name: str, kind: str, tensors: Sequence[TensorInfo]) -> Failure:
    """Return the failure of a quantised tensor that would be quantised again."""
    native = [tensor for tensor in native_tensors(tensors) if tensor.type_name == source.type_name]
    if source.type_name in NATIVE_TYPES:
        why = f"{name} is {source.type_name}, as the model was published, and would become {kind}"
        return Failure(why, f"Keep such tensors with {keep_native(native)}, or accept the loss with --allow-requantize.")
    why = f"{name} is {source.type_name} already and would become {kind}"
    return Failure(why, "Start from the BF16, F16 or F32 model, or accept the loss with --allow-requantize.")


def _shape_problem(name: str, shape: tuple[int, ...], kind: str, number: int | None) -> Failure | None:
    """Return why rows do not fit a type. --output-tensor-type and --token-embedding-type skip llama.cpp's shape fallback, also
    in its dry run."""
    block = type_size(number) if number is not None else None
    if block is None or shape[0] % block[0] == 0:
        return None
    why = f"{name} has rows of {shape[0]}, which {kind} (blocks of {block[0]}) cannot hold"
    option = "--output-tensor-type" if name == OUTPUT else "--token-embedding-type"
    return Failure(why, f"Choose a type whose blocks divide the rows: {option} {'q8_0' if shape[0] % 32 == 0 else 'f16'}.")


def _kept_layers(header: GgufHeader, options: QuantizeOptions) -> list[int]:
    """Return the layers that --prune-layers keeps, by their old numbers; they are renumbered from 0."""
    if not options.prune_layers:
        return []
    gone = {int(part) for part in options.prune_layers.split(",") if part.strip()}
    count = header.integer(f"{header.text('general.architecture')}.block_count") or 0
    return [layer for layer in range(count) if layer not in gone]


def _original_name(name: str, kept: Sequence[int]) -> str:
    match = _BLOCK.match(name)
    if not kept or match is None:
        return name
    return f"blk.{kept[int(match[1])]}.{name[match.end() :]}"


def _unplanned(
    sources: Mapping[str, TensorInfo], rows: Sequence[RecipeTensor], n_planned: int, options: QuantizeOptions
) -> list[Failure]:
    """Return a failure unless the level holds every tensor of the model except those of pruned layers."""
    planned = {row.original for row in rows}
    missing = [name for name in sources if name not in planned and not (options.prune_layers and _BLOCK.match(name))]
    if not missing and n_planned == len(rows):
        return []
    name = missing[0] if missing else "one of its tensors"
    return [
        Failure(
            f"llama.cpp's dry run does not plan {name}", "Read the log of this level; rename the tensor if its name is odd."
        )
    ]


def _header_bytes(
    tensors: Sequence[RecipeTensor],
    shards: Sequence[int],
    header: GgufHeader,
    weights: UsableImatrix | None,
    options: QuantizeOptions,
) -> list[int]:
    """Return the size of each file's header as llama-quantize and llama-gguf-split write it, not padded."""
    kv = {key: size for key, size in header.kv_sizes.items() if key not in _SPLIT_KEYS}
    for key in ("general.quantization_version", "general.file_type"):
        kv[key] = _kv_bytes(key, 4)
    kv.update(_override_bytes(override) for override in options.override_kv)
    if weights is not None and weights.sizes:
        texts = {"quantize.imatrix.file": weights.file_name, "quantize.imatrix.dataset": weights.dataset}
        kv.update(
            {key: _kv_bytes(key, 8 + min(MAX_TEXT, len(text.encode()))) for key, text in texts.items() if text is not None}
        )
        kv["quantize.imatrix.entries_count"] = _kv_bytes("quantize.imatrix.entries_count", 4)
        if weights.chunks > 0:
            kv["quantize.imatrix.chunks_count"] = _kv_bytes("quantize.imatrix.chunks_count", 4)
    split = {key: _kv_bytes(key, n_bytes) for key, n_bytes in _SPLIT_KEYS.items()}
    files = cut(tensors, shards) if shards else [tensors]
    infos = [sum(24 + len(tensor.name.encode()) + 8 * len(tensor.shape) for tensor in each) for each in files]
    first = {**kv, **split} if shards else kv
    return [24 + sum((split if number else first).values()) + size for number, size in enumerate(infos)]


def _file_bytes(tensors: Sequence[RecipeTensor], headers: Sequence[int]) -> int | None:
    """Return the exact size of the output: the header of each file, then every tensor, each padded. With ``--keep-split`` it is
    that of one file."""
    total = sum(padded(header_bytes, ALIGNMENT) for header_bytes in headers)
    for tensor in tensors:
        if tensor.n_bytes is None:
            return None
        total += padded(tensor.n_bytes, ALIGNMENT)
    return total


def _override_bytes(override: str) -> tuple[str, int]:
    """Return the key of a ``KEY=TYPE:VALUE`` and the size of its entry; numbers take 4 bytes, whatever type the source has."""
    key, _, typed = override.partition("=")
    kind, _, value = typed.partition(":")
    size = {"str": 8 + min(MAX_TEXT, len(value.encode())), "bool": 1}.get(kind, 4)
    return key, _kv_bytes(key, size)


def _kv_bytes(key: str, value: int) -> int:
    return 8 + len(key.encode()) + 4 + value


def ignored_tensor_types(level: Level, options: QuantizeOptions) -> bool:
    """Whether the user's ``--tensor-type`` has no effect at this level (llama-quantize drops it silently)."""
    return level.ftype.upper() in PLAIN_FTYPES and bool(options.tensor_types or options.tensor_type_file)


def buffer_bytes(tensors: Sequence[TensorInfo], max_buffer_size: int | None) -> int:
    """Return the memory that llama-quantize needs in addition to the mapped source: the widened rows and the result of the
    largest tensor, at most ``max_buffer_size`` MiB (its default is 8192), plus 256 MiB for the program and the tables of the IQ
    types."""
    largest = max((tensor.n_elements for tensor in tensors), default=0)
    bound = (max_buffer_size or 8192) << 20
    return min(8 * largest, bound) + (256 << 20)


ALIGNMENT = 32
"""GGUF_DEFAULT_ALIGNMENT: llama-quantize pads to it, and copies ``general.alignment`` whatever that says."""

_ALIGNMENT_KEY = "general.alignment"

_NOT_NUMBERS = frozenset(("F64", "I8", "I16", "I32", "I64"))
"""Types that llama-quantize does not turn into another ("cannot dequantize/convert tensor type")."""


def written_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as ggml writes it: without dimensions of 1 at its end."""
    n_dims = len(shape)
    while n_dims > 1 and shape[n_dims - 1] == 1:
        n_dims -= 1
    return tuple(shape[:n_dims])


def conversion_problem(source: TensorInfo) -> Failure | None:
    """Return why a tensor must keep its type; None if it can be converted."""
    shape = written_shape(source.shape)
    if len(shape) > 3:
        why = f"{source.name} has {len(shape)} dimensions, and llama-quantize converts at most 3"
    elif source.type_name in _NOT_NUMBERS:
        why = f"{source.name} is {source.type_name}, which llama-quantize converts to no other type"
    else:
        return None
    return Failure(why, f"Keep it as it is: --tensor-type ^{source.name}$={source.type_name.lower()}")


def layout_problems(
    header: GgufHeader,
    sources: Mapping[str, TensorInfo],
    rows: Sequence[RecipeTensor],
    header_bytes: int,
    options: QuantizeOptions,
) -> list[Failure]:
    """Return what would make the file as a whole unusable. ``header_bytes``: of the output, before it is padded."""
    found: list[Failure] = []
    alignment = _alignment(header, options)
    sizes = [row.n_bytes for row in rows if row.n_bytes is not None]
    if any(padded(size, alignment) != padded(size, ALIGNMENT) for size in (header_bytes, *sizes)):
        why = f"llama-quantize pads to {ALIGNMENT} bytes and copies {_ALIGNMENT_KEY} = {alignment}, so nothing can read it"
        found.append(Failure(why, f"Correct it in the output: --override-kv {_ALIGNMENT_KEY}=int:{ALIGNMENT}"))
    empty = next((source.name for source in sources.values() if not source.n_elements), None)
    if empty is not None:
        why = f"{empty} has no elements, and llama-quantize writes such a tensor wrongly"
        found.append(Failure(why, "Convert the original model again without that tensor."))
    return found


def _alignment(header: GgufHeader, options: QuantizeOptions) -> int:
    """The alignment that the output will claim."""
    for override in options.override_kv:
        key, _, typed = override.partition("=")
        kind, _, value = typed.partition(":")
        if key == _ALIGNMENT_KEY and kind == "int" and (number := whole_number(value)):
            return number
    return header.alignment
