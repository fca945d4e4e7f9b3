"""The paths of a workspace's files in a repository, checked by the rules for names before anything is uploaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from imatrix_runner.events import Sink, info
from imatrix_runner.models.hub.label_rules import FILE_TYPES, hub_label, is_model_for_llama_cpp, without_shard
from imatrix_runner.publish.file_names import PublishedFile, checked_names
from imatrix_runner.publish.local_files import ReadyLevel
from imatrix_runner.quantize.level_facts import ftype_of


def level_paths(levels: Sequence[ReadyLevel], model: str, template: str, sink: Sink) -> Mapping[str, tuple[str, ...]]:
    """The paths in the repository of each level's files, by the level's name. ``model``: for the template.

    Raises :class:`UsageError` and :class:`InvalidDataError` for names against a rule of the hub or of programs.
    """
    named = checked_names([_to_publish(level, model) for level in levels], template)
    for each in named:
        for remark in each.remarks:
            sink(info(remark))
    return {each.file.level: each.paths for each in named}


def planned_paths(levels: Sequence[tuple[str, str, int]], model: str, template: str) -> Mapping[str, tuple[str, ...]]:
    """The same for levels that are still to be made, given with the ftype that each is based on and the number of its files.
    Raises as above."""
    files = [
        PublishedFile(f"{model}-{name}.gguf", name, model, _number(ftype), shards if shards > 1 else 0)
        for name, ftype, shards in levels
    ]
    return {each.file.level: each.paths for each in checked_names(files, template)}


def same_labels(paths: Iterable[str], there: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each path of a level (of a split one, its first shard's) with each other model ``there`` that has the same label."""
    mine = {label.text: path for path in paths if (label := hub_label(path)) is not None}
    for name in there:
        label = hub_label(name) if is_model_for_llama_cpp(name) else None
        path = mine.get(label.text) if label is not None else None
        if path is not None and without_shard(name) != without_shard(path):
            yield path, name


def _to_publish(level: ReadyLevel, model: str) -> PublishedFile:
    shards = len(level.files)
    return PublishedFile(level.files[0][0], level.name, model, _file_type(level), shards if shards > 1 else 0)


def _file_type(level: ReadyLevel) -> int | None:
    """``general.file_type`` of a level, also of one whose files are gone."""
    if level.is_here:
        return level.file_type
    return _number(ftype_of(level.record))


def _number(ftype: str) -> int | None:
    return next((number for number, label in FILE_TYPES.items() if label == ftype.upper()), None)
