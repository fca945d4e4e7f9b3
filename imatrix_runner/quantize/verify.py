"""Verify that a written file is what was planned, before it gets its name: llama-quantize can fail silently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import GgufHeader, padded, read_header, type_id
from imatrix_runner.quantize.recipe import Recipe, written_shape
from imatrix_runner.quantize.usable_imatrix import UsableImatrix


def verify_output(files: Sequence[Path], recipe: Recipe, weights: UsableImatrix | None) -> int:
    """Check magic, tensor names, types and exact byte sizes, and the metadata llama-quantize adds.

    ``files`` are one output, its shards in order. Returns their total size. Raises :class:`InvalidDataError`.
    """
    headers = [read_header(path) for path in files]
    written = {tensor.name: tensor for header in headers for tensor in header.tensors}
    planned = {tensor.name: tensor for tensor in recipe.tensors}
    if written.keys() != planned.keys():
        odd = sorted(written.keys() ^ planned.keys())
        raise _bad(recipe, f"it has {len(written)} tensors instead of {len(planned)}; the first that differs is {odd[0]}")
    for name, plan in planned.items():
        tensor = written[name]
        if written_shape(tensor.shape) != plan.shape:
            raise _bad(recipe, f"{name} has the shape {tensor.shape} instead of {plan.shape}")
        if not recipe.certain or plan.n_bytes is None:
            continue
        if tensor.n_bytes is None and type_id(plan.type) is None:
            continue  # a type that only the engine that made it knows: see _check_size
        if tensor.type_name.upper() != plan.type or tensor.n_bytes != plan.n_bytes:
            raise _bad(
                recipe, f"{name} is {tensor.type_name} of {tensor.n_bytes} bytes, planned: {plan.type} of {plan.n_bytes}"
            )
    for header in headers:
        _check_size(header, recipe)
    _check_shards(headers, recipe)
    _check_metadata(headers[0], recipe, weights)
    return sum(header.file_size for header in headers)


def _check_shards(headers: Sequence[GgufHeader], recipe: Recipe) -> None:
    """Check what each shard says of itself, and that it holds the tensors that were planned."""
    total = sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        told = tuple(header.integer(f"split.{key}") for key in ("no", "count", "tensors.count"))
        if len(headers) > 1 and told != (number, len(headers), total):
            raise _bad(recipe, f"shard {number + 1} of {len(headers)} says that it is number {told[0]} of {told[1]}")
    counts = tuple(len(header.tensors) for header in headers)
    if recipe.shards and counts != recipe.shards:
        raise _bad(recipe, f"its shards hold {counts} tensors instead of {recipe.shards}")


def _check_size(header: GgufHeader, recipe: Recipe) -> None:
    """Check that the file ends with its last tensor, also where only the plan has the sizes of types."""
    planned = {tensor.name: tensor.n_bytes for tensor in recipe.tensors}
    end = header.data_offset
    for tensor in header.tensors:
        n_bytes = tensor.n_bytes if tensor.n_bytes is not None or not recipe.certain else planned[tensor.name]
        if n_bytes is None:
            return
        if tensor.offset != end - header.data_offset:
            raise _bad(recipe, f"{tensor.name} begins at byte {tensor.offset} of the data, expected {end - header.data_offset}")
        end += padded(n_bytes, header.alignment)
    if header.file_size != end:
        raise _bad(recipe, f"the file has {header.file_size} bytes instead of {end}")


def _check_metadata(header: GgufHeader, recipe: Recipe, weights: UsableImatrix | None) -> None:
    if header.integer("general.quantization_version") is None or header.integer("general.file_type") is None:
        raise _bad(recipe, "its metadata does not say how it was quantised")
    entries = header.integer("quantize.imatrix.entries_count")
    wanted = len(weights.sizes) if weights is not None and weights.sizes else None
    if entries != wanted:
        raise _bad(recipe, f"it was made with {entries or 'no'} imatrix entries instead of {wanted or 'none'}")


def _bad(recipe: Recipe, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"The {recipe.level.name} file is not what was planned",
        why,
        "Run the same command again; if it happens again, check the disk and the log of this level.",
    )
