"""Formats failures of levels as lines; a cause that several levels share is printed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from imatrix_runner.errors import RunnerError

if TYPE_CHECKING:
    from rich.console import Console


def failure_lines(failed: Mapping[str, RunnerError], became: str = "") -> list[str]:
    """``Q4_K_M, Q5_K_M: what; why. do`` for each cause, in the order of the first level of each, whose error is printed.
    ``became`` follows the names."""
    groups: dict[tuple[type[RunnerError], str], list[str]] = {}
    for name, error in failed.items():
        groups.setdefault((type(error), error.why), []).append(name)
    lines = []
    for names in groups.values():
        lines.append(f"{', '.join(names)}{became}: {failed[names[0]].sentence()}")
    return lines


def print_error(error: RunnerError, console: Console) -> None:
    """Print an error in its three lines, after other results."""
    from rich.text import Text

    console.print(Text.assemble(("Error:", "bold red"), f" {error.what}."), soft_wrap=True)
    console.print(Text(f"  Why: {error.why.rstrip('.')}."), soft_wrap=True)
    console.print(Text(f"  Do:  {error.todo}"), soft_wrap=True)
