"""A level copied from the finished files of another that holds the same tensors, byte for byte what llama-quantize would write.

llama-quantize writes the number of the level as ``general.file_type``; nothing else in its output depends on the level but the
types of the tensors (``llama_model_quantize_impl`` in src/llama-quant.cpp). So only that number has to be changed in the copy.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models.gguf_file import GgufHeader, read_header
from imatrix_runner.models.gguf_writer import integer_entry
from imatrix_runner.quantize.recipe import Recipe
from imatrix_runner.quantize.usable_imatrix import UsableImatrix
from imatrix_runner.quantize.verify import verify_output

FILE_TYPE = "general.file_type"

_NUMBER_BYTES = 4
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Original:
    """A finished level: its files in order, the SHA-256 that each had when it was verified, and the tensors that were quantised
    without weights."""

    name: str
    files: tuple[Path, ...]
    hashes: tuple[str, ...]
    without_weights: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def can_be_copied(original: Original, recipe: Recipe, weights: UsableImatrix | None) -> bool:
    """Whether the files hold what ``recipe`` plans, and store their file type where it can be changed."""
    try:
        verify_output(original.files, recipe, weights)
        return recipe.certain and _file_type_at(read_header(original.files[0])) is not None
    except InvalidDataError:
        return False


def copy_level(original: Original, outs: Sequence[Path], file_type: int, on_bytes: Callable[[int], None]) -> bool:
    """Copy the files to ``outs``, as the level with the number ``file_type``; return False if they are not what was verified.

    ``on_bytes`` is called with the size of every block, and may raise to stop.
    """
    at = _file_type_at(read_header(original.files[0]))
    digests = [_copy(source, out, on_bytes) for source, out in zip(original.files, outs, strict=True)]
    if at is None or tuple(digests) != original.hashes:
        return False
    try:
        with outs[0].open("r+b") as file:
            file.seek(at)
            file.write(struct.pack("<I", file_type))
    except OSError as error:
        raise from_os_error(error, f"copying {original.name}", outs[0]) from error
    return True


def _copy(source: Path, out: Path, on_bytes: Callable[[int], None]) -> str:
    """Copy a file and return the SHA-256 of what was read."""
    digest = hashlib.sha256()
    try:
        with source.open("rb", buffering=0) as reader, out.open("wb") as writer:
            while block := reader.read(_BLOCK):
                digest.update(block)
                writer.write(block)
                on_bytes(len(block))
    except OSError as error:
        raise from_os_error(error, f"copying {source.name}", out) from error
    return digest.hexdigest()


def _file_type_at(header: GgufHeader) -> int | None:
    """Return the offset of the file type, a whole number of four bytes; None if there is no such number."""
    if header.integer(FILE_TYPE) is None:
        return None
    begin, size = header.entry_place(FILE_TYPE)
    return begin + size - _NUMBER_BYTES if size == len(integer_entry(FILE_TYPE, 0)) else None
