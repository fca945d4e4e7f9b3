"""GGUF files that were not made here: what they hold, by their headers alone, and whether they were made from a source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imatrix_runner.errors import InvalidDataError, RunnerError, UsageError, from_os_error
from imatrix_runner.models.ggml_types import is_plain
from imatrix_runner.models.gguf_file import GgufHeader, LongArray, TensorInfo, long_array, read_header
from imatrix_runner.models.hub import Hub, PublishedGguf, fetch_gguf, find_ggufs, parse_named, read_headers
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.signals import Stop

_TOKENS = "tokenizer.ggml.tokens"
_IMATRIX = "quantize.imatrix."
_OF_POSITIONS = ("rope_freqs", "rope_factors")
"""Beginnings of the names of tensors that converters compute: versions differ in whether they write them."""

_BLOCK = 1 << 22
_SHOWN = 3


@dataclass(frozen=True)
class OtherFile:
    """A GGUF to compare, as its header describes it. ``name``: its own, for tables and files; ``place``: the path or hub file;
    ``content``: a text that changes with its content (empty: to be hashed).

    ``types``: number of weights of two or more dimensions by type, the most frequent first; ``imatrix``: the metadata about the
    matrix it was made with (file, dataset, entries_count, chunks_count), by the end of the key; ``quantized_by``: as its
    metadata states. ``paths``: its files, empty where they are to be fetched from ``published``.
    """

    name: str
    place: str
    n_bytes: int
    n_params: int
    types: Mapping[str, int]
    imatrix: Mapping[str, str]
    quantized_by: str
    content: str
    paths: tuple[Path, ...] = ()
    published: PublishedGguf | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / max(1, self.n_params)


@dataclass(frozen=True)
class FileDescription:
    """The headers of a GGUF's shards: the metadata of the first, and the tensors of all."""

    headers: tuple[GgufHeader, ...]

    @property
    def first(self) -> GgufHeader:
        return self.headers[0]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for header in self.headers for tensor in header.tensors}


def look_at(given: str, model: Model, hub: Hub, folder: Path) -> dict[str, OtherFile | RunnerError]:
    """What a path, or ``org/name[@revision][:file or label]``, stands for: each file by its place, or why it is not compared.

    Of files on a hub only the headers are fetched, into ``folder``. Every file was checked by :func:`check_of_source`.
    """
    path = Path(given).expanduser()
    named = parse_named(given) if not path.exists() else None
    try:
        if named is None:
            return {given: _local(path, given, model)}
        places = find_ggufs(hub, named)
    except RunnerError as error:
        return {given: error}
    found: dict[str, OtherFile | RunnerError] = {}
    for place, each in places.items():
        try:
            found[place] = _remote(each, model, hub, folder) if isinstance(each, PublishedGguf) else each
        except RunnerError as error:
            found[place] = error
    return found


def _local(path: Path, given: str, model: Model) -> OtherFile:
    if not path.exists():
        raise InvalidDataError(
            f"No file {given!r} found", "it is neither a file nor org/name[:file.gguf] of a hub", "Check the spelling."
        )
    opened = open_gguf(path, allow_requantize=True, name=path.stem)
    described = FileDescription(tuple(read_header(file) for file in opened.files))
    check_of_source(described, str(path), model)
    return replace(_described(described, path.stem, str(path)), paths=opened.files)


def _remote(published: PublishedGguf, model: Model, hub: Hub, folder: Path) -> OtherFile:
    described = FileDescription(read_headers(hub, published, folder))
    check_of_source(described, published.place, model)
    owner, stem = published.listing.repo.partition("/")[0], published.files[0].name.rpartition("/")[2].removesuffix(".gguf")
    found = _described(described, f"{stem} of {owner}", published.place)
    return replace(found, content=published.content, published=published)


def _described(described: FileDescription, name: str, place: str) -> OtherFile:
    header, tensors = described.first, described.tensors.values()
    types: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            types[tensor.type_name] += tensor.n_elements
    keys = [key for key in header.metadata if key.startswith(_IMATRIX)]
    imatrix = {key.removeprefix(_IMATRIX): header.text(key) or str(header.integer(key)) for key in keys}
    return OtherFile(
        name=re.sub(r"[^\w.+ -]", "_", name)[:120],
        place=place,
        n_bytes=sum(each.file_size for each in described.headers),
        n_params=sum(tensor.n_elements for tensor in tensors),
        types=dict(types.most_common()),
        imatrix=imatrix,
        quantized_by=header.text("general.quantized_by") or "",
        content="",
    )


def check_of_source(described: FileDescription, place: str, model: Model) -> None:
    """Raise :class:`InvalidDataError` for a header that cannot be that of a file made from ``model``: another architecture,
    vocabulary, other tensors or shapes."""
    if why := _unlike(described, model):
        raise InvalidDataError(
            f"{place} was not made from {model.name}",
            why,
            "Leave it out, or compare it with the model that it was made from.",
        )


def _unlike(described: FileDescription, model: Model) -> str:
    """Why a file cannot be of a source; empty if it can."""
    architecture = described.first.text("general.architecture") or "unknown"
    if architecture != model.architecture:
        return f"its architecture is {architecture}, the model's {model.architecture}"
    mine, theirs = {tensor.name: tensor for tensor in model.tensors}, described.tensors
    missing = [name for name in mine if name not in theirs and not name.startswith(_OF_POSITIONS)]
    further = [name for name in theirs if name not in mine and not name.startswith(_OF_POSITIONS)]
    if missing or further:
        parts = [f"it lacks {_some(missing)}"] if missing else []
        return " and ".join([*parts, *([f"it has {_some(further)}, which the model has not"] if further else [])])
    for name, tensor in theirs.items():
        if name in mine and mine[name].shape != tensor.shape:
            return f"its tensor {name} has the shape {list(tensor.shape)}, the model's {list(mine[name].shape)}"
    ours, other = _vocabulary(model.header), _vocabulary(described.first)
    if ours is not None and other is not None and ours != other:
        if len(ours) != len(other):
            return f"its vocabulary has {len(other)} tokens, the model's {len(ours)}"
        place = next(place for place, pair in enumerate(zip(ours, other, strict=True)) if pair[0] != pair[1])
        return (
            f"its vocabulary is another one: token {place} is {str(other[place])[:40]!r}, the model's {str(ours[place])[:40]!r}"
        )
    return "" if other is not None or ours is None else "it has no vocabulary"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _vocabulary(header: GgufHeader) -> tuple[Any, ...] | None:
    tokens = header.metadata.get(_TOKENS)
    return long_array(header.path, _TOKENS) if isinstance(tokens, LongArray) else tokens


def check_plain_tensors(paths: Sequence[Path], place: str, model: Model, stop: Stop) -> int:
    """Compare the tensors that neither file has quantised, bit for bit, and return how many there are.

    Raises :class:`InvalidDataError` if one differs: the file was made from other weights.
    """
    mine, theirs = dict(_places(model.files)), dict(_places(paths))
    compared = 0
    for name, (file, begin, tensor) in theirs.items():
        own = mine.get(name)
        if own is None or own[2].type != tensor.type or not is_plain(tensor.type_name):
            continue
        stop.check()
        compared += 1
        if not _same_bytes((own[0], own[1]), (file, begin), tensor.n_bytes or 0):
            raise InvalidDataError(
                f"{place} was not made from {model.name}",
                f"its tensor {name} ({tensor.type_name}) holds other numbers; such tensors are copied",
                "Leave it out, or compare it with the model that it was made from.",
            )
    return compared


def _places(paths: Sequence[Path]) -> Iterator[tuple[str, tuple[Path, int, TensorInfo]]]:
    for path in paths:
        header = read_header(path)
        for tensor in header.tensors:
            yield tensor.name, (path, header.data_offset + tensor.offset, tensor)


def _same_bytes(one: tuple[Path, int], other: tuple[Path, int], n_bytes: int) -> bool:
    try:
        with one[0].open("rb") as first, other[0].open("rb") as second:
            first.seek(one[1])
            second.seek(other[1])
            while n_bytes > 0:
                count = min(_BLOCK, n_bytes)
                if first.read(count) != second.read(count):
                    return False
                n_bytes -= count
    except OSError as error:
        raise from_os_error(error, "comparing tensors", other[0]) from error
    return True


def described_at(given: str, hub: Hub, folder: Path) -> tuple[FileDescription, str]:
    """The headers of one file, by path or hub name, and its place. Raises :class:`RunnerError`."""
    path = Path(given).expanduser()
    named = parse_named(given) if not path.exists() else None
    if named is None:
        if not path.exists():
            raise InvalidDataError(
                f"No file {given!r} found", "it is neither a file nor org/name:file.gguf of a hub", "Check the spelling."
            )
        opened = open_gguf(path, allow_requantize=True, name=path.stem)
        return FileDescription(tuple(read_header(file) for file in opened.files)), str(path)
    found = find_ggufs(hub, named)
    if len(found) != 1:
        raise UsageError(
            f"{given} is not one file", f"the repository has {len(found)} levels", f"Name one: {next(iter(found))}"
        )
    (published,) = found.values()
    if not isinstance(published, PublishedGguf):
        raise published
    return FileDescription(read_headers(hub, published, folder)), published.place


def fetched(other: OtherFile, hub: Hub) -> OtherFile:
    """The file with its paths, fetched into the hub's cache where they are not there yet."""
    if other.paths or other.published is None:
        return other
    return replace(other, paths=fetch_gguf(hub, other.published))
