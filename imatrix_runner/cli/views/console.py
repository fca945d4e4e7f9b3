"""The two consoles: data on stdout, everything else on stderr. Lines are wrapped for a terminal, and left whole for a pipe."""

from __future__ import annotations

from rich.console import Console

_PIPE_WIDTH = 400


def stdout_console() -> Console:
    return _console(stderr=False)


def stderr_console(*, quiet: bool = False) -> Console:
    return _console(stderr=True, quiet=quiet)


def _console(*, stderr: bool, quiet: bool = False) -> Console:
    # Names, patterns and paths may hold brackets and colons, so nothing is parsed as markup.
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, quiet=quiet)
    if not console.is_terminal:
        console.soft_wrap = True
        console.width = _PIPE_WIDTH
    return console
