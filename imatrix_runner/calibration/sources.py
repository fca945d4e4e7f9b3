"""What a user may name as a source of a calibration text. Pure, but for looking whether a path exists."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.models.hub import parse_dataset

Kind = Literal["path", "stdin", "part", "set", "hub"]

ALL_PARTS = "shipped"
"""The whole shipped text, part by part."""


@dataclass(frozen=True)
class Wanted:
    """A source as named: ``SOURCE[=WEIGHT]``. ``weight`` None: none was given."""

    text: str
    kind: Kind
    weight: float | None = None

    @property
    def path(self) -> Path:
        return Path(self.text).expanduser()


def parse_source(argument: str, parts: Collection[str], sets: Collection[str]) -> Wanted:
    """Tell what ``argument`` names: a path that exists wins, then ``-``, a shipped part, a public set, a hub's data set.

    ``parts`` and ``sets`` are the names there are. Raises :class:`UsageError` or :class:`InvalidDataError`.
    """
    text, weight = _split(argument)
    return Wanted(text, _kind(text, parts, sets), weight)


def _split(argument: str) -> tuple[str, float | None]:
    if Path(argument).expanduser().exists():
        return argument, None  # a name may hold an equals sign
    text, equals, number = argument.rpartition("=")
    if not equals or not text:
        return argument, None
    try:
        weight = float(number)
    except ValueError:
        return argument, None
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(
            f"{argument} has no usable weight", f"{number} is not a number above 0", "For example: medical.jsonl=3 shipped=1"
        )
    return text, weight


def _kind(text: str, parts: Collection[str], sets: Collection[str]) -> Kind:
    if text == "-":
        return "stdin"
    if text and Path(text).expanduser().exists():
        return "path"
    if text == ALL_PARTS or text in parts:
        return "part"
    if text.partition(":")[0] in sets:
        return "set"
    if parse_dataset(text) is not None:
        return "hub"
    near = get_close_matches(text, [*parts, *sets, ALL_PARTS, *_siblings(text)], n=1, cutoff=0.6)
    raise InvalidDataError(
        f"There is no source {text!r}",
        "it is no file or folder, no shipped part, no known set and no data set of a hub"
        + (f"; is {near[0]} meant?" if near else ""),
        "Give a path, - for stdin, org/name[:config[:split]], or a name that is listed by: imatrix-runner calibration list",
    )


def _siblings(text: str) -> list[str]:
    """Paths beside the one that was named."""
    folder = Path(text).expanduser().parent
    if not folder.is_dir():
        return []
    return [str(Path(text).parent / entry.name) if "/" in text else entry.name for entry in folder.iterdir()]
