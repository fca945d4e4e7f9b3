"""What options take besides words, numbers and paths: names of levels, sizes."""

from __future__ import annotations

import re
from typing import Any

import click

# For completion in the shell only; what counts is what the located tools offer.
_USUAL_LEVELS = (
    *("Q8_0", "Q6_K_L", "Q6_K", "Q5_K_L", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_L", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_XL", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K_L", "Q2_K"),
    *("Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "MXFP4_MOE"),
    *("F16", "BF16", "F32", "COPY"),
)


_LEAST_BARE = 1 << 20  # no memory, disk or model is smaller


class LevelNames(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of level names."""

    name = "A,B,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in str(value).split(",") if part.strip())

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        head, comma, last = incomplete.rpartition(",")
        return [CompletionItem(head + comma + name) for name in _USUAL_LEVELS if name.startswith(last.upper())]


class Size(click.ParamType[int]):
    """Bytes, as people write them: ``4GiB``, ``500MB``, ``1.5g``; with or without the i a K is 1024, as ``df -h`` has it.

    Without a unit only whole numbers of a mebibyte and more are bytes: ``--vram 8`` means 8 GiB to those who type it.
    """

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(?:([kmgt])(?:i?b)?|(b))?\s*", str(value), re.IGNORECASE)
        n_bytes = int(float(match[1]) * 1024 ** " kmgt".index((match[2] or " ").lower())) if match else 0
        if match is None or n_bytes < 1:
            self.fail(f"{value!r} is no size; it is written like 4GiB or 500MiB", param, ctx)
        if match[2] is None and match[3] is None and n_bytes < _LEAST_BARE:
            self.fail(f"{value!r} has no unit and would be bytes; if GiB are meant, write {match[1]}GiB", param, ctx)
        return n_bytes


SIZE = Size()
