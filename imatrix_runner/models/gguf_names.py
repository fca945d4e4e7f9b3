"""Parses names of GGUF files: shards of a set, precision, and which of several files is the model in full precision."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_PRECISIONS = ("BF16", "F16", "F32")
_PRECISION = re.compile(r"(?<![A-Za-z0-9])(B?F)P?(16|32)(?![A-Za-z0-9])", re.IGNORECASE)
_QUANTISED = re.compile(r"(?<![A-Za-z0-9])(?:I?Q\d|TQ\d|MXFP4|NVFP4)", re.IGNORECASE)
_NO_MODEL = re.compile(r"mmproj|imatrix|vocab|lora|adapter|projector", re.IGNORECASE)


def shard_names(path: Path) -> tuple[str, ...]:
    """The file names of the whole split set that ``path`` belongs to by its name; its own name alone if it is not a shard."""
    match = SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 1:
        return (path.name,)
    return tuple(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1))


def siblings(name: str) -> list[str]:
    """The names of the set that ``name`` belongs to, each with its folder (``BF16/m-00001-of-00002.gguf``)."""
    folder, slash, base = name.rpartition("/")
    return [folder + slash + shard for shard in shard_names(Path(base))]


def is_gguf_model(name: str) -> bool:
    """Whether a file is a model by its name: a GGUF not named a projector, imatrix, vocabulary or adapter."""
    return name.lower().endswith(".gguf") and not _NO_MODEL.search(name)


def first_shards(names: Iterable[str]) -> list[str]:
    """One name per GGUF: that of its first shard, or of its only file."""
    return sorted({siblings(name)[0] for name in names})


def is_quantised_name(name: str) -> bool:
    """Whether the name contains a quantised type (``Q4_K_M``)."""
    return _QUANTISED.search(name) is not None


def full_precision(names: Collection[str]) -> list[str]:
    """The complete GGUFs of the best precision among ``names``, by the name of their first (or only) file."""
    by_precision: dict[str, list[str]] = {precision: [] for precision in _PRECISIONS}
    for first in first_shards(name for name in names if is_gguf_model(name)):
        # The folder may carry the precision (BF16/model-00001-of-00002.gguf), but the file's own name decides.
        folder, _, base = first.rpartition("/")
        marks = _PRECISION.findall(base) or _PRECISION.findall(folder)
        if marks and not _QUANTISED.search(base) and all(name in names for name in siblings(first)):
            by_precision["".join(marks[-1]).upper()].append(first)
    return next((found for found in by_precision.values() if found), [])
