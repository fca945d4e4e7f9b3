"""A model's skeleton: its metadata and tensor names, with a few rows of zeros for each weight.

llama-quantize chooses types by names, row lengths and metadata, never by the number of rows. A skeleton therefore gets the same
types as the model, in a moment: the plan where llama-quantize has no ``--dry-run``, and the exact sizes of types that only it
knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from imatrix_runner.engines.binaries.handover import ones, write_legacy
from imatrix_runner.engines.files.imatrix_file import read_imatrix
from imatrix_runner.engines.files.imatrix_weights import entries_by_c_name
from imatrix_runner.engines.jobs import QuantizeJob
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models.gguf_file import TensorInfo, read_header, type_size
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.models.gguf_skeleton import copied_entries, write_zeros
from imatrix_runner.models.gguf_writer import NewTensor

_ROWS = 32
"""Minimum number of rows: the size of one then follows from their bytes, although a tensor is padded by up to 31 bytes. The
remainder of the number of rows divided by 32 is kept, because some types interleave 4, 8 or 16 rows."""

_DROPPED = ("split.", "general.alignment")


@dataclass(frozen=True)
class Skeleton:
    """The files of one skeleton. ``job`` is the original job with skeleton, stand-in imatrix and output as its files."""

    job: QuantizeJob

    def row_bytes(self, types: Mapping[str, str]) -> dict[tuple[str, int], int]:
        """Bytes of a row by type (upper case) and row length, for the types whose size is not known here.

        ``types``: tensor -> type, as llama-quantize reported it.
        """
        header = read_header(self.job.out)
        ends = [*(tensor.offset for tensor in header.tensors[1:]), header.file_size - header.data_offset]
        found: dict[tuple[str, int], int] = {}
        for tensor, end in zip(header.tensors, ends, strict=True):
            rows = prod(tensor.shape[1:])
            if type_size(tensor.type) is None and rows >= _ROWS and tensor.name in types:
                found[types[tensor.name].upper(), tensor.shape[0]] = (end - tensor.offset) // rows
        return found


def make_skeleton(job: QuantizeJob, folder: Path, *, complete: bool = False) -> Skeleton:
    """Write the skeleton of a job's model (and a stand-in for its imatrix) to ``folder``. ``complete``: the stand-in has an
    entry for every weight, even if the imatrix does not."""
    header, tensors = read_header(job.source), _tensors(job.source)
    model, matrix = folder / "skeleton.gguf", folder / "imatrix.dat"
    _require_known(job.source, tensors)
    try:
        write_zeros(
            model,
            copied_entries(header, without=_DROPPED),
            [NewTensor(tensor.name, _few_rows(tensor.shape), tensor.type) for tensor in tensors],
        )
    except OSError as error:
        raise from_os_error(error, "planning with a skeleton of the model", model) from error
    if job.imatrix is not None:
        entries = _every_weight(tensors) if complete else _stand_in(job.imatrix, tensors)
        write_legacy(matrix, {name: ones(count) for name, count in entries.items()}, b"", 1)
    return Skeleton(
        replace(
            job,
            source=model,
            out=folder / "planned.gguf",
            imatrix=matrix if job.imatrix is not None else None,
            options=replace(job.options, keep_split=False),
        )
    )


def _few_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with the same row length, but fewer rows and at most two experts."""
    if len(shape) < 2:
        return shape
    rows = shape[1] if shape[1] < 2 * _ROWS else _ROWS + shape[1] % _ROWS
    return (shape[0], rows, *(min(count, 2) for count in shape[2:]))


def is_yet_to_be_made(job: QuantizeJob) -> bool:
    """Whether the job's imatrix is only a placeholder: its entries have the model's names, but none has the size it needs."""
    return job.imatrix is not None and not _fitting(job.imatrix, _tensors(job.source))


def _stand_in(imatrix: Path, tensors: Sequence[TensorInfo]) -> dict[bytes, int]:
    """Values that each entry needs for the skeleton: the entries that fit, or all entries of a placeholder."""
    needed = {tensor.name.encode(): _weights(_few_rows(tensor.shape)) for tensor in tensors}
    names = _fitting(imatrix, tensors) or [name for name in _entries(imatrix) if name in needed]
    return {name: needed[name] for name in names}


def _every_weight(tensors: Sequence[TensorInfo]) -> dict[bytes, int]:
    return {tensor.name.encode(): _weights(_few_rows(tensor.shape)) for tensor in tensors if len(tensor.shape) > 1}


def _fitting(imatrix: Path, tensors: Sequence[TensorInfo]) -> list[bytes]:
    """The entries of an imatrix that have as many values as the model's tensor of that name needs."""
    needed = {tensor.name.encode(): _weights(tensor.shape) for tensor in tensors}
    return [name for name, size in _entries(imatrix).items() if needed.get(name) == size]


def _entries(imatrix: Path) -> dict[bytes, int]:
    """How many values each entry of an imatrix has."""
    return {name: entry.n_values for name, entry in entries_by_c_name(read_imatrix(imatrix)).items()}


def _weights(shape: tuple[int, ...]) -> int:
    """How many values llama-quantize wants for a tensor: one for each column, of each expert."""
    return shape[0] * (*shape, 1, 1)[2]


def _tensors(source: Path) -> list[TensorInfo]:
    """The tensors of all shards."""
    return [tensor for name in shard_names(source) for tensor in read_header(source.parent / name).tensors]


def _require_known(source: Path, tensors: Sequence[TensorInfo]) -> None:
    unknown = next((tensor for tensor in tensors if tensor.n_bytes is None), None)
    if unknown is not None:
        raise InvalidDataError(
            f"{source.name} cannot be planned with these programs",
            f"the size of {unknown.name} ({unknown.type_name}) is unknown, and their llama-quantize has no --dry-run",
            "Start from the BF16 or F16 model.",
        )
