"""What a data file holds before anyone asks what it means: rows, each with its place, and how large they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_ROW = 16 << 20
"""Bytes of the longest record that is read; a calibration text is a hundredth of it."""

MAX_VALUES = 1 << 20
"""Brackets and commas of a record of more than a mebibyte. Each may cost a hundred bytes of memory once it is parsed."""

TOO_LONG = f"it is longer than {MAX_ROW >> 20} MiB"
TOO_MANY = f"it is longer than 1 MiB and made of more than {MAX_VALUES} values"
SHORTEN = "Cut it into shorter records, or leave it out."


@dataclass(frozen=True)
class Row:
    """The fields of one record: JSON values, or the texts of a table's cells."""

    where: str
    fields: Mapping[str, Any]


def too_many(text: str | bytes, start: int = 0) -> bool:
    """Whether parsing ``text`` from ``start`` on could take many times the memory that it takes itself."""
    if len(text) - start <= 1 << 20:
        return False
    if isinstance(text, str):
        return sum(text.count(mark, start) for mark in "[{,") > MAX_VALUES
    return sum(text.count(mark, start) for mark in (b"[", b"{", b",")) > MAX_VALUES
