"""Merging and converting imatrices: exact sums, and remarks on what a format cannot hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from pathlib import Path

import numpy as np

from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.imatrix.formats import Format, MatrixFile
from imatrix_runner.imatrix.matrix import Matrix, add, in_tokens

DEFAULT_CHUNK_SIZE = 512
"""llama-imatrix's default context, assumed where a legacy file does not state its chunk size."""

_MOST_WEIGHT = 1000
_BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Made:
    """A matrix made from others, and remarks for its user."""

    matrix: Matrix
    remarks: tuple[str, ...]


def merge(files: Sequence[MatrixFile], weights: Sequence[int] | None = None) -> Made:
    """Sum matrices of one model, in the order given; ``weights`` count a file's text several times.

    Legacy files are taken to have the chunk size that the others state. Raises :class:`InvalidDataError` for different models.
    """
    _refuse_different_models(files)
    remarks: list[str] = []
    sizes = {file.path: file.matrix.chunk_size for file in files}
    stated = [size for size in sizes.values() if size]
    chunk_size = stated[0] if stated else DEFAULT_CHUNK_SIZE
    if legacy := [path.name for path, size in sizes.items() if not size]:
        how = "as in the others" if stated else "assumed, llama-imatrix's default"
        remarks.append(f"{', '.join(legacy)} (legacy) counted in chunks of {chunk_size} tokens, {how}")
    if len(set(stated)) > 1:
        remarks.append(f"the chunk sizes differ ({', '.join(map(str, stated))}); the result says {chunk_size}")
    counted = Counter(name for file in files for name in file.matrix.datasets if name)
    twice = [name for name, count in counted.items() if count > 1]
    if twice:
        remarks.append(f"the same dataset counts more than once: {', '.join(twice)}")
    names = {name for file in files for name in file.matrix.entries}
    for file in files:
        if lacking := len(names) - len(file.matrix.entries):
            remarks.append(f"{file.path.name} lacks {lacking} of the {len(names)} entries; there the others count alone")
    # Sums do not depend on how the text was cut; one size for all keeps the chunk count honest.
    parts = [replace(in_tokens(file.matrix, chunk_size), chunk_size=chunk_size) for file in files]
    total = add(parts, weights)
    _refuse_overflow(parts, weights)
    chunks = max(int(total.counts(name).max()) for name in total.entries) // chunk_size
    return Made(replace(total, chunk_count=chunks), tuple(remarks))


def _refuse_overflow(parts: Sequence[Matrix], weights: Sequence[int] | None) -> None:
    most = [max(int(np.abs(part.counts(name)).max()) for name in part.entries) for part in parts]
    if sum(count * weight for count, weight in zip(most, weights or [1] * len(most), strict=True)) >= 1 << 63:
        raise InvalidDataError(
            "These imatrices cannot be merged", "their counts add up to more than 64 bits hold", "Leave out the damaged one."
        )


_LONGEST_WEIGHT = 40


def parse_weights(text: str, count: int) -> list[int]:
    """``2,1`` or ``0.7,0.3`` as whole numbers in the same proportion. Raises :class:`UsageError`."""
    try:
        parts = [Fraction(part.strip()[:_LONGEST_WEIGHT]) for part in text.split(",") if "e" not in part.lower()]
    except (ValueError, ZeroDivisionError) as error:
        why = "each is a whole number, a decimal or a fraction"
        raise UsageError(f"--weight {text} is not a list of numbers", why, "For example: --weight 2,1") from error
    if len(parts) != count or any(part <= 0 for part in parts):
        raise UsageError(
            f"--weight {text} does not fit {count} files", "each file needs one weight above zero", "For example: --weight 2,1"
        )
    common = lcm(*(part.denominator for part in parts))
    whole = [int(part * common) for part in parts]
    if max(whole) > _MOST_WEIGHT:
        raise UsageError(
            f"--weight {text} is too fine",
            f"sums stay exact only with whole numbers, here up to {max(whole)}",
            "Use simple proportions, for example 0.7,0.3 or 2,1.",
        )
    return whole


def _refuse_different_models(files: Sequence[MatrixFile]) -> None:
    first = files[0]
    for other in files[1:]:
        common = set(first.matrix.entries) & set(other.matrix.entries)
        blocks = [{match[1] for name in file.matrix.entries if (match := _BLOCK.match(name))} for file in (first, other)]
        if not common:
            raise _different(first.path, other.path, "they have no tensor in common")
        if blocks[0] != blocks[1] and not (blocks[0] < blocks[1] or blocks[1] < blocks[0]):
            raise _different(first.path, other.path, "their layers differ")
        for name in sorted(common):
            values = [file.matrix.values_per_entry(name) for file in (first, other)]
            if values[0] != values[1]:
                raise _different(first.path, other.path, f"{name} has {values[0]} values in one and {values[1]} in the other")


def _different(one: Path, other: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{one.name} and {other.name} are not of the same model", why, "Merge only matrices made from the same model."
    )


def convert(file: MatrixFile, to: Format, chunk_size: int | None) -> Made:
    """The matrix as the other format will hold it, with what was assumed and what is lost."""
    remarks: list[str] = []
    matrix = file.matrix
    if not matrix.chunk_size:
        if to == "gguf" and chunk_size is None:
            remarks.append(f"the file does not state its chunk size: {DEFAULT_CHUNK_SIZE} assumed (--chunk-size says another)")
        matrix = in_tokens(matrix, chunk_size or DEFAULT_CHUNK_SIZE)
        if to == "gguf" and any(".ffn_" in name and "_exps" in name for name in matrix.entries):
            remarks.append("legacy files hold one count for all experts; so will this one")
    elif chunk_size is not None and chunk_size != matrix.chunk_size:
        remarks.append(f"the file states its chunk size, {matrix.chunk_size}; --chunk-size {chunk_size} is not used")
    if to == "dat":
        remarks += _lost_in_legacy(matrix)
    return Made(matrix, tuple(remarks))


def _lost_in_legacy(matrix: Matrix) -> list[str]:
    lost: list[str] = []
    counts = {name: matrix.counts(name) for name in matrix.entries}
    several = [name for name, values in counts.items() if len(values) > 1]
    if several:
        lost.append(f"counts per expert of {len(several)} tensors are lost: a legacy file holds one")
    unseen = {name: int((counts[name] == 0).sum()) for name in several if counts[name].any() and not counts[name].all()}
    if unseen:
        lost.append(
            f"{sum(unseen.values())} experts without data in {len(unseen)} tensors become 1, an equal weight for all columns"
        )
    empty = [name for name, values in counts.items() if not values.any()]
    if empty:
        lost.append(f"{len(empty)} entries without any data are left out, the first is {empty[0]}")
    if len(matrix.datasets) > 1:
        lost.append(f"of {len(matrix.datasets)} dataset names only the last is kept")
    return lost
