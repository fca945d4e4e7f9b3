"""Recipes: what one level becomes on one model, told by llama.cpp's own dry run, priced and judged before any work."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from imatrix_runner.engines.base import DryRun, Fallback, QuantizeOptions
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, padded, tensor_bytes, type_id, type_size
from imatrix_runner.models.native_types import NATIVE_TYPES, keep_native, native_tensors
from imatrix_runner.quantize.layout import ALIGNMENT, conversion_problem, layout_problems, written_shape
from imatrix_runner.quantize.levels import PLAIN_FTYPES, Level
from imatrix_runner.quantize.weights import NO_IMATRIX, OUTPUT, Failure, Lacks, Weights, requires_imatrix

MAX_TEXT = 127  # llama_model_kv_override.val_str

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class RecipeTensor:
    """One tensor of the output. ``shape`` in ggml order; ``n_bytes`` is None for a type only the tools know; ``original``: its
    name in the model, another one where ``--prune-layers`` renumbers."""

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
    ``unseen``: those whose entry counted no token, so that all their columns weigh alike; ``starved``: those whose type
    cannot do without the weights the imatrix lacks (each is a failure too). ``certain``: see
    :class:`~imatrix_runner.engines.base.DryRun`.
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

    @property
    def n_elements(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def fingerprint(self) -> str:
        """Stands for the type of every tensor: two levels of one model with the same hold the same tensors, whatever their
        names. Empty for a level that cannot be made."""
        if not self.tensors:
            return ""
        pairs = sorted(f"{tensor.name} {tensor.original} {tensor.type}" for tensor in self.tensors)
        return hashlib.sha256("\n".join(pairs).encode()).hexdigest()

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
        """The part of the model's weights that lies in tensors with a fallback type."""
        fallen = {fallback.tensor for fallback in self.fallbacks}
        return sum(tensor.n_elements for tensor in self.tensors if tensor.name in fallen) / max(1, self.n_elements)


def make_recipe(
    level: Level,
    header: GgufHeader,
    tensors: Sequence[TensorInfo],
    dry_run: DryRun,
    weights: Weights | None,
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
            continue  # told below, by the tensor that was meant
        kind = type_name.upper()
        number = type_id(kind)
        n_bytes = tensor_bytes(source.shape, number) if number is not None else _told_bytes(source.shape, kind, dry_run)
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
            lacks.judge(original, source.shape, kind, required=required)
    header_bytes = _header_bytes(rows, header, weights, options)
    failures += _unplanned(sources, rows, len(dry_run.types), options)
    failures += layout_problems(header, sources, rows, header_bytes, options)
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
        _file_bytes(rows, header_bytes),
        tuple(lacks.unseen) if lacks is not None else (),
        tuple(lacks.starved) if lacks is not None else (),
        dry_run.certain,
    )


def _told_bytes(shape: tuple[int, ...], kind: str, dry_run: DryRun) -> int | None:
    """Bytes of a tensor whose type only the engine's programs know, if they said what a row takes."""
    row = dry_run.row_bytes.get((kind, shape[0]))
    return row * prod(shape[1:]) if row is not None else None


def _again(source: TensorInfo, name: str, kind: str, tensors: Sequence[TensorInfo]) -> Failure:
    """Why a quantised tensor would not be quantised again."""
    native = [tensor for tensor in native_tensors(tensors) if tensor.type_name == source.type_name]
    if source.type_name in NATIVE_TYPES:
        why = f"{name} is {source.type_name}, as the model was published, and would become {kind}"
        return Failure(why, f"Keep such tensors with {keep_native(native)}, or accept the loss with --allow-requantize.")
    why = f"{name} is {source.type_name} already and would become {kind}"
    return Failure(why, "Start from the BF16, F16 or F32 model, or accept the loss with --allow-requantize.")


def _shape_problem(name: str, shape: tuple[int, ...], kind: str, number: int | None) -> Failure | None:
    """--output-tensor-type and --token-embedding-type skip llama.cpp's shape fallback, and its dry run does not notice."""
    block = type_size(number) if number is not None else None
    if block is None or shape[0] % block[0] == 0:
        return None
    why = f"{name} has rows of {shape[0]}, which {kind} (blocks of {block[0]}) cannot hold"
    option = "--output-tensor-type" if name == OUTPUT else "--token-embedding-type"
    return Failure(why, f"Choose a type whose blocks divide the rows: {option} {'q8_0' if shape[0] % 32 == 0 else 'f16'}.")


def _kept_layers(header: GgufHeader, options: QuantizeOptions) -> list[int]:
    """With --prune-layers the layers that stay, by their old numbers; they are renumbered from 0."""
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
    sources: Mapping[str, TensorInfo], rows: Sequence[RecipeTensor], n_told: int, options: QuantizeOptions
) -> list[Failure]:
    """A level must hold every tensor of the model, but for those of pruned layers."""
    planned = {row.original for row in rows}
    missing = [name for name in sources if name not in planned and not (options.prune_layers and _BLOCK.match(name))]
    if not missing and n_told == len(rows):
        return []
    name = missing[0] if missing else "one of its tensors"
    return [
        Failure(
            f"llama.cpp's dry run does not plan {name}", "Read the log of this level; rename the tensor if its name is odd."
        )
    ]


def _header_bytes(
    tensors: Sequence[RecipeTensor], header: GgufHeader, weights: Weights | None, options: QuantizeOptions
) -> int:
    """The header of a single-file output as llama-quantize writes it, not padded."""
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
    infos = sum(24 + len(tensor.name.encode()) + 8 * len(tensor.shape) for tensor in tensors)
    return 24 + sum(kv.values()) + infos


def _file_bytes(tensors: Sequence[RecipeTensor], header_bytes: int) -> int | None:
    """The exact size of a single-file output: its header, then every tensor, each padded."""
    total = padded(header_bytes, ALIGNMENT)
    for tensor in tensors:
        if tensor.n_bytes is None:
            return None
        total += padded(tensor.n_bytes, ALIGNMENT)
    return total


def _override_bytes(override: str) -> tuple[str, int]:
    """The key of a ``KEY=TYPE:VALUE`` and the size of its entry; numbers take 4 bytes whatever the source has there."""
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
    """Memory one llama-quantize needs beside the mapped source: the widened rows and the result of the largest tensor, at
    most ``max_buffer_size`` MiB (its default is 8192), plus 256 MiB for the program and the tables of the IQ types."""
    largest = max((tensor.n_elements for tensor in tensors), default=0)
    bound = (max_buffer_size or 8192) << 20
    return min(8 * largest, bound) + (256 << 20)
