"""The command line as typed, for commands and messages that show it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

PROGRAM = "imatrix-runner"


@dataclass(frozen=True)
class Invocation:
    """``arguments``: as typed; ``extra``: those after ``--``, for llama.cpp."""

    arguments: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def command(self) -> str:
        """The line to type to run the same command again."""
        return shlex.join((PROGRAM, *self.arguments))
