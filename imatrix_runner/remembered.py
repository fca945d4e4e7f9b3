"""Facts that took time to find out, kept in the cache directory: a small file for each combination of what they depend on.

Two environments or builds that are used in turn so keep theirs; the oldest files go. Each fact is a struct that repeats its
whole ``key``, a hexadecimal digest of everything it depends on.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from imatrix_runner.errors import RunnerError
from imatrix_runner.files import read_json, write_json

_MOST = 32
_MOST_BYTES = 1 << 20


class Fact(Protocol):
    @property
    def key(self) -> str: ...


F = TypeVar("F", bound=Fact)


def fact_file(folder: Path, key: str) -> Path:
    return folder / f"{key[:16]}.json"


def recall(folder: Path, key: str, kind: type[F]) -> F | None:
    """Return the fact that was kept under ``key``; anything odd counts as nothing."""
    with suppress(RunnerError):
        fact = read_json(fact_file(folder, key), kind, limit=_MOST_BYTES)
        if fact.key == key:
            return fact
    return None


def remember(folder: Path, fact: Fact) -> None:
    """Keep a fact. A cache that cannot be written to costs finding it out again."""
    with suppress(RunnerError):
        write_json(fact_file(folder, fact.key), fact)
    with suppress(OSError):
        by_age = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[:-_MOST]:
            path.unlink(missing_ok=True)
