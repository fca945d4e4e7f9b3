"""Answers on disk: one appended record for each group of prompts (:mod:`~imatrix_runner.engines.files.appended_groups`)."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.engines.files.appended_groups import AppendedGroups, read_groups
from imatrix_runner.engines.measures import Completion

_FORM = "answers 1"


class CompletionsFile(AppendedGroups[Completion]):
    """``path`` open for appending. It keeps the complete groups of the same ``fingerprint``; anything else in it is dropped.

    ``groups`` and ``prompts``: how many of each it holds.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        super().__init__(path, _FORM, fingerprint, Completion, "writing answers")

    @property
    def prompts(self) -> int:
        return self.items


def read_completions(path: Path, fingerprint: str) -> list[Completion]:
    """The answers stored for ``fingerprint``, in the order of the prompts; empty if the file is missing or of another job."""
    return sorted(read_groups(path, _FORM, fingerprint, Completion), key=lambda completion: completion.prompt)
