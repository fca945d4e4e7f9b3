"""The step of a plan that obtains the imatrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ImatrixAction = Literal["none", "use", "fetch", "generate", "up-to-date"]


@dataclass(frozen=True)
class ImatrixStep:
    """``generate`` makes ``path``; ``fetch`` (only in a dry run) downloads it;
    ``use`` and ``up-to-date`` read it; ``none`` quantises without. ``reason`` is for people;
    ``n_bytes`` is about what making it writes, its ranges and snapshots too."""

    action: ImatrixAction
    path: Path | None
    reason: str
    n_chunks: int | None = None
    n_tokens: int | None = None
    n_bytes: int = 0

    @property
    def present(self) -> bool:
        """Whether levels are made with an imatrix."""
        return self.action != "none"
