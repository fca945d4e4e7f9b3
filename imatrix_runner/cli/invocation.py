"""The command line as typed, for commands and messages that show it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PROGRAM = "imatrix-runner"

_ADDRESSED = "--notify"


@dataclass(frozen=True)
class Invocation:
    """``arguments``: as typed; ``extra``: those after ``--``, for llama.cpp."""

    arguments: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def command(self) -> str:
        """The line to type to run the same command again. It is recorded and shown, so addresses that hold secrets are cut."""
        return shlex.join((PROGRAM, *_without_secrets(self.arguments)))


def _without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with only the scheme of every address of ``--notify``."""
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if before == _ADDRESSED:
            yield _scheme(argument)
        elif equals and option == _ADDRESSED:
            yield f"{option}={_scheme(value)}"
        else:
            yield argument
        before = argument


def _scheme(url: str) -> str:
    return f"{url.partition('://')[0]}://…" if "://" in url else "…"
