"""The paths of levels in a repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imatrix_runner.publish.local_files import ReadyLevel


def level_paths(levels: Sequence[ReadyLevel], model: str, template: str) -> Mapping[str, tuple[str, ...]]:
    """The paths in the repository of each level's files, by the level's name."""
    del model, template
    return {level.name: tuple(name for name, _, _ in level.files) for level in levels}
