"""Types of option values: names of levels, sizes, paths."""

from __future__ import annotations

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


class Size(click.ParamType[int]):
    """A number of bytes with a unit (:func:`~imatrix_runner.files.parse_bytes`)."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
TEXT = click.Path(path_type=Path)  # a folder is refused later, with the command that makes a text of it
