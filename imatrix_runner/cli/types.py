"""Types of option values: names of levels, sizes, paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from imatrix_runner.files import parse_bytes
from imatrix_runner.mixes.targets import split_names

# For shell completion only; the levels that can be made are those that the located tools offer.
_USUAL_LEVELS = (
    *("Q8_0", "Q6_K_L", "Q6_K", "Q5_K_L", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_L", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_XL", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K_L", "Q2_K"),
    *("Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "MXFP4_MOE"),
    *("F16", "BF16", "F32", "COPY"),
)


_DURATION = re.compile(r"(?P<number>\d{1,9}(?:\.\d{1,3})?) ?(?P<unit>s|sec|m|min|h|d)", re.ASCII)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST = 366 * 86400.0
_WEIGHTS = re.compile(r"(?P<number>\d{1,15}(?:\.\d{1,6})?) ?(?P<unit>[KMBT]?)", re.ASCII)
_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

_SHARE = re.compile(r"(?P<number>\d{1,3}(?:\.\d{1,9})?) ?(?P<percent>%?)", re.ASCII)
_LARGEST_SHARE = 0.5

_LIKE = "MIX@like:"
_MIXES = (_LIKE, "MIX@kld:", "MIX@ram:", "MIX@vram:", "MIX@")
"""Beginnings of the names of mixes; a size or a number of bits follows the last."""


class LevelNames(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of level names."""

    name = "A,B,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return split_names(str(value))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        head, comma, last = incomplete.rpartition(",")
        like = tuple(_LIKE + level for level in _USUAL_LEVELS) if last.upper().startswith(_LIKE.upper()) else ()
        possible = (*_other_memory(head), *_USUAL_LEVELS, *_MIXES, *like)
        names = [name for name in possible if name.upper().startswith(last.upper())]
        return [CompletionItem(head + comma + name) for name in names if name != last]


def _other_memory(head: str) -> tuple[str, ...]:
    """The size that may follow ``MIX@ram:64GiB,`` or ``MIX@vram:24GiB,`` at the end of a list; empty after anything else."""
    target = (split_names(head) or ("",))[-1].lower()
    return {"mix@ram:": ("vram:",), "mix@vram:": ("ram:",)}.get(target[: target.find(":") + 1] if "," not in target else "", ())


def complete_level(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The names of stock levels that begin so, for shells."""
    return [name for name in _USUAL_LEVELS if name.startswith(incomplete.upper())]


class Names(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of names."""

    name = "A,B,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(name for part in str(value).split(",") if (name := part.strip()))


def complete_cluster(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """What a shell can know of the addresses of clusters."""
    return [name for name in ("auto", "local:", "ray://") if name.startswith(incomplete)]


def complete_place(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """What a shell can know of the places that ``--watch`` takes."""
    return [name for name in ("trending",) if name.startswith(incomplete)]


class Size(click.ParamType[int]):
    """A number of bytes with a unit (:func:`~imatrix_runner.files.parse_bytes`)."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Duration(click.ParamType[float]):
    """A length of time with a unit (``90s``, ``30min``, ``12h``, ``2d``), in seconds. ``least``: the shortest that is
    accepted."""

    name = "TIME"

    def __init__(self, least: float = 0.0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value).strip().lower())
        if match is None:
            self.fail(f"{str(value)[:40]!r} is not a length of time, such as 90s, 30min, 12h or 2d.", param, ctx)
        seconds = float(match["number"]) * _UNITS[match["unit"][:1]]
        if not self.least <= seconds <= _LONGEST:
            self.fail(f"{value!r} is not between {self.least:g} seconds and a year.", param, ctx)
        return seconds


class WeightCount(click.ParamType[int]):
    """A number of a model's weights, such as ``500M``, ``8B`` or ``1T``."""

    name = "WEIGHTS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _WEIGHTS.fullmatch(str(value).strip().upper())
        count = int(float(match["number"]) * _THOUSANDS[match["unit"]]) if match is not None else 0
        if not count:
            self.fail(f"{str(value)[:40]!r} is not a number of weights, such as 500M, 8B or 1T.", param, ctx)
        return count


class Share(click.ParamType[float]):
    """A share below a half: ``2%`` or ``0.02``."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _SHARE.fullmatch(str(value).strip())
        share = float(match["number"]) / (100 if match["percent"] else 1) if match is not None else 0.0
        if not 0 < share < _LARGEST_SHARE:
            self.fail(f"{str(value)[:40]!r} is not a share such as 2% or 0.02, below {_LARGEST_SHARE:g}.", param, ctx)
        return share


SIZE = Size()
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
TEXT = click.Path(path_type=Path)  # a folder is refused later, with the command that makes a text of it
