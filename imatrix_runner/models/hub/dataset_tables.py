"""Chooses the files of a data set's repository that make up one config and split. Pure.

The hub converts most data sets to Parquet on a separate branch, as ``config/split/0000.parquet``, whatever their own layout
(https://huggingface.co/docs/dataset-viewer/parquet). Elsewhere config and split follow from names, by the conventions of the
``datasets`` library: ``data/train-00000-of-00002.parquet``, ``config/test.jsonl``, ``train.csv``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from imatrix_runner.errors import DownloadError, InvalidDataError
from imatrix_runner.files import human_bytes
from imatrix_runner.models.hub.choose_files import RepoFile

DEFAULT = "default"

READABLE = (".parquet", ".jsonl", ".json", ".csv", ".txt")
"""Formats that are read, the best first: of a table in several formats the first is taken."""

_DATASET = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?"
    r"(?::(?P<config>[^:\\]{0,200})(?::(?P<split>[^:\\/]{1,100}))?)?",
    re.ASCII,
)
_LOOKS_LIKE_FILE = (*READABLE, ".md", ".tsv", ".gz", ".zst", ".gguf", ".utf8", ".raw", ".py")
_CONVERTED = re.compile(r"(?P<config>[^/]+)/(?P<partial>partial-)?(?P<split>[^/]+)/\d{4,6}\.parquet")
# Names that the datasets library writes, below data/ or a config's folder; its names of splits have no hyphen.
_NAMED_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]{6,40})?", re.ASCII)
_SHARD = re.compile(r"(?:^|[-_.])(?:part[-_.]?)?\d{5,6}(?:-of-\d{5,6})?(?:-[0-9a-f]{6,40})?$|^\d+$", re.ASCII)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_NO_DATA = re.compile(
    r"readme|licen[cs]e|notice|changelog|requirements|dataset_infos?\.json|config\.json|package(-lock)?\.json|state\.json|\..*",
    re.IGNORECASE,
)
_MOST_LISTED = 12


@dataclass(frozen=True)
class DatasetId:
    """``org/name[@revision][:config[:split]]``; an empty config, as in ``org/name::test``, means the only one."""

    repo: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        split = f":{self.split}" if self.split else ""
        config = f":{self.config or ''}" if self.config or split else ""
        return self.repo + (f"@{self.revision}" if self.revision else "") + config + split


@dataclass(frozen=True)
class DatasetTable:
    """One split of a config, and its files in order. ``partial``: the hub converted only its beginning."""

    config: str
    split: str
    files: tuple[RepoFile, ...]
    partial: bool = False

    @property
    def n_bytes(self) -> int:
        """Total size in bytes of the files whose size is known."""
        return sum(file.size or 0 for file in self.files)


def parse_dataset(text: str) -> DatasetId | None:
    """The data set's id in ``text``; None if it is not one. ``data/talks.jsonl`` counts as a mistyped path."""
    match = _DATASET.fullmatch(text)
    if match is None or not text.isprintable():
        return None
    parts = f"{match['revision'] or ''}/{match['config'] or ''}".split("/")
    if ".." in parts or (match["config"] is None and match["repo"].lower().endswith(_LOOKS_LIKE_FILE)):
        return None
    return DatasetId(match["repo"], match["revision"], match["config"] or None, match["split"])


def converted_tables(files: Iterable[RepoFile]) -> tuple[DatasetTable, ...]:
    """The tables of the hub's Parquet conversion."""
    found: dict[tuple[str, str], list[RepoFile]] = {}
    partial = set()
    for file in files:
        if match := _CONVERTED.fullmatch(file.name):
            key = (match["config"], match["split"])
            found.setdefault(key, []).append(file)
            if match["partial"]:
                partial.add(key)
    return tuple(DatasetTable(*key, _in_order(held), key in partial) for key, held in sorted(found.items()))


def named_tables(files: Iterable[RepoFile]) -> tuple[DatasetTable, ...]:
    """The tables of any other repository, by the names of its files."""
    found: dict[tuple[str, str], dict[str, list[RepoFile]]] = {}
    for file in files:
        base = file.name.rpartition("/")[2]
        suffix = next((suffix for suffix in READABLE if base.lower().endswith(suffix)), None)
        if suffix is not None and not _NO_DATA.match(base):
            found.setdefault(_place(file.name, len(suffix)), {}).setdefault(suffix, []).append(file)
    return tuple(
        DatasetTable(*key, _in_order(next(held[suffix] for suffix in READABLE if suffix in held)))
        for key, held in sorted(found.items())
    )


def choose_table(wanted: DatasetId, tables: Sequence[DatasetTable]) -> DatasetTable:
    """The wanted table; by default the only config, and the split ``train`` or the only one.

    Raises :class:`DownloadError` if it does not exist, :class:`InvalidDataError` if the choice is ambiguous.
    """
    config = wanted.config or _only(wanted, "config", sorted({table.config for table in tables}), tables)
    of_config = [table for table in tables if table.config == config]
    if not of_config:
        raise _missing(wanted, "config", config, tables)
    splits = sorted(table.split for table in of_config)
    split = wanted.split or ("train" if "train" in splits else _only(wanted, "split", splits, of_config))
    for table in of_config:
        if table.split == split:
            return table
    raise _missing(wanted, "split", split, of_config)


def _place(name: str, suffix: int) -> tuple[str, str]:
    """Config and split of a file, from its folders and the words of its name; by default ``default`` and ``train``."""
    *folders, base = name[: len(name) - suffix].split("/")
    split = next((_SPLITS[folder.lower()] for folder in folders if folder.lower() in _SPLITS), None)
    configs = [folder for folder in folders if folder.lower() not in _SPLITS and folder.lower() != "data"]
    if folders and split is None and (match := _NAMED_SHARD.fullmatch(base)):
        return "/".join(configs) or DEFAULT, match["split"]
    words = [word for word in re.split(r"([-_.]+)", _SHARD.sub("", base)) if word]
    split = split or next((_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS), "train")
    rest = "".join(word for word in words if word.lower() not in _SPLITS).strip("-_.")
    if rest.lower() not in ("", "data", "dataset", "part", "shard"):
        configs.append(rest)
    return "/".join(configs) or DEFAULT, split


def _in_order(files: Iterable[RepoFile]) -> tuple[RepoFile, ...]:
    return tuple(sorted(files, key=lambda file: file.name))


def _only(wanted: DatasetId, kind: str, names: Sequence[str], tables: Sequence[DatasetTable]) -> str:
    if len(names) == 1:
        return names[0]
    first = tables[0]
    example = DatasetId(wanted.repo, wanted.revision, first.config, wanted.split or (first.split if kind == "split" else None))
    raise InvalidDataError(
        f"{wanted} has several {kind}s",
        _listing(tables),
        f"Name one of them, for example: '{example}'",
    )


def _missing(wanted: DatasetId, kind: str, name: str, tables: Sequence[DatasetTable]) -> DownloadError:
    near = get_close_matches(name, sorted({getattr(table, kind) for table in tables}), n=1)
    table = next((table for table in tables if near and getattr(table, kind) == near[0]), tables[0])
    example = DatasetId(wanted.repo, wanted.revision, table.config, table.split)
    return DownloadError(
        f"{wanted.repo} has no {kind} {name!r}", f"it has {_listing(tables)}", f"Name one that it has, for example: '{example}'"
    )


def _listing(tables: Sequence[DatasetTable]) -> str:
    """Configs and splits for people: ``en (test 1.2 MiB, train 3.4 MiB), fr (…)``."""
    configs: dict[str, list[str]] = {}
    for table in tables:
        size = f" {human_bytes(table.n_bytes)}" if table.n_bytes else ""
        configs.setdefault(table.config, []).append(table.split + size)
    shown = [f"{config} ({', '.join(splits[:6])}{', …' if len(splits) > 6 else ''})" for config, splits in configs.items()]
    more = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
