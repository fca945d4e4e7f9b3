"""A cache of facts that take time to determine: a small file for each combination of what they depend on.

So environments or builds that are used alternately keep their facts; the oldest files are removed. Each fact is a struct that
repeats its whole ``key``, a hexadecimal digest of everything it depends on.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from imatrix_runner.errors import RunnerError
from imatrix_runner.files import read_json, write_json

_MOST = 32
_MOST_BYTES = 1 << 20


class RememberedFact(Protocol):
    @property
    def key(self) -> str: ...


F = TypeVar("F", bound=RememberedFact)


def fact_file(folder: Path, key: str) -> Path:
    return folder / f"{key[:16]}.json"


def recall(folder: Path, key: str, kind: type[F]) -> F | None:
    """Return the fact stored under ``key``; None if there is none or it cannot be read."""
    with suppress(RunnerError):
        fact = read_json(fact_file(folder, key), kind, limit=_MOST_BYTES)
        if fact.key == key:
            return fact
    return None


def remember(folder: Path, fact: RememberedFact) -> None:
    """Store a fact. If the cache is not writable, the fact is determined again next time."""
    with suppress(RunnerError):
        write_json(fact_file(folder, fact.key), fact)
    with suppress(OSError):
        by_age = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[:-_MOST]:
            path.unlink(missing_ok=True)
