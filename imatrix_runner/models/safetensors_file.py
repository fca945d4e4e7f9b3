"""Checks the safetensors headers of a Hugging Face checkpoint, before a conversion that may take an hour.

Format: a u64 length, that many bytes of JSON (name -> dtype, shape, byte range), then the data, without gaps
(https://huggingface.co/docs/safetensors, section "Format").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from imatrix_runner.bounded import damaged, opened
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models.sniff import HEAD_BYTES, LFS_POINTER, foreign_format
from imatrix_runner.untrusted import UnreadableError, from_json, from_lenient_json

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # the library's own limit
_MAX_JSON = 32 << 20  # the index of a model of a trillion parameters has 20 MB
_MAX_TENSORS = 1 << 18  # such a model has 100,000
_MAX_DIMS = 16
_NUMBERED = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PART = re.compile(r"model[^/]*\.safetensors")
_AGAIN = "Download the missing or damaged file again."


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint; ``shape`` in PyTorch's order, rows first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class SafetensorsWeights:
    """All tensors of a checkpoint, and the files that contain them."""

    files: tuple[Path, ...]
    tensors: tuple[Weight, ...]

    @property
    def main_dtype(self) -> str:
        """The dtype of most elements of matrices, in safetensors' spelling (``BF16``); empty if there are no matrices."""
        share: Counter[str] = Counter()
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                share[tensor.dtype] += tensor.n_elements
        return share.most_common(1)[0][0] if share else ""


def check_safetensors(directory: Path) -> SafetensorsWeights:
    """Read only the headers of all ``model*.safetensors`` of a checkpoint.

    Raises :class:`InvalidDataError` if there are none, if the index names a missing file or tensor, and for a file that is
    truncated, too long, or not safetensors.
    """
    index = directory / INDEX
    expected: dict[str, str] = {}
    if index.is_file():
        expected = _weight_map(index)
        names = sorted(set(expected.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise InvalidDataError(
                f"{len(missing)} of the {len(names)} weight files of {directory} are missing",
                f"{INDEX} names {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}",
                _AGAIN,
            )
    else:
        names = sorted(path.name for path in directory.iterdir() if _PART.fullmatch(path.name))
        _refuse_gaps(directory, names)
    if not names:
        raise _no_weights(directory)
    found: dict[str, tuple[str, Weight]] = {}
    for name in names:
        weights = read_directory(directory / name)
        if len(found) + len(weights) > _MAX_TENSORS:
            raise damaged(directory, "announces more tensors than any model has", f"more than {_MAX_TENSORS}, up to {name}")
        for weight in weights:
            if weight.name in found:
                why = f"it is in {found[weight.name][0]} and in {name}"
                raise damaged(directory, f"has the tensor {weight.name} twice", why)
            found[weight.name] = (name, weight)
    absent = [name for name in expected if name not in found]
    if absent:
        raise InvalidDataError(
            f"{len(absent)} tensors of {directory} are missing",
            f"{INDEX} lists {absent[0]} in {expected[absent[0]]}",
            _AGAIN,
        )
    return SafetensorsWeights(tuple(directory / name for name in names), tuple(weight for _, weight in found.values()))


def _refuse_gaps(directory: Path, names: list[str]) -> None:
    """Raise :class:`InvalidDataError` if numbered shards are missing. Without an index the converter would not notice."""
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    counts = {int(match["count"]) for match in numbered}
    if len(counts) != 1:
        return
    missing = sorted(set(range(1, counts.pop() + 1)) - {int(match["number"]) for match in numbered})
    if missing:
        shown = ", ".join(f"{number:05d}" for number in missing[:3]) + (" …" if len(missing) > 3 else "")
        raise InvalidDataError(
            f"{len(missing)} of the {numbered[0]['count'].lstrip('0')} weight files of {directory} are missing",
            f"there is no number {shown}, and no {INDEX} either",
            _AGAIN,
        )


def read_directory(path: Path) -> tuple[Weight, ...]:
    """The tensors of one safetensors file, checked against its size. Raises :class:`InvalidDataError`."""
    with opened(path) as reader:
        head = reader.head(HEAD_BYTES)
        if len(head) < 9 or head[8:9] != b"{":
            foreign = foreign_format(head, reader.size, path)
            todo = foreign.todo if head.startswith(LFS_POINTER) else _AGAIN
            raise InvalidDataError(f"{path} is not a safetensors file", f"it is {foreign.seems}", todo)
        length = int(reader.number("Q"))
        if length > _MAX_HEADER:
            raise damaged(path, f"announces a header of {length} bytes", f"at most {_MAX_HEADER} are allowed")
        try:
            entries = from_json(reader.take(length), dict[str, msgspec.Raw])
            entries.pop("__metadata__", None)
            if len(entries) > _MAX_TENSORS:
                raise damaged(path, f"announces {len(entries)} tensors", f"no model has more than {_MAX_TENSORS}")
            weights = tuple(_weights(path, {name: from_json(bytes(raw), _Entry) for name, raw in entries.items()}))
        except UnreadableError as error:
            raise damaged(path, "has a header that cannot be read", str(error)) from error
        expected = reader.position + sum(weight.n_bytes for weight in weights)
        if expected != reader.size:
            what = "is truncated" if expected > reader.size else "is too long"
            raise InvalidDataError(f"{path} {what}", f"it has {reader.size} bytes and should have {expected}", _AGAIN)
    return weights


def read_model_json(path: Path) -> dict[str, Any]:
    """A JSON object that came with a model, such as config.json. Raises :class:`InvalidDataError`.

    As lenient as Python's JSON writer: configurations of state-space models contain a bare ``Infinity``, which is not JSON.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise damaged(path, "is too large", f"more than {_MAX_JSON} bytes of JSON")
        document = from_lenient_json(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error
    except UnreadableError as error:
        raise damaged(path, "cannot be read", str(error)) from error
    if not isinstance(document, dict):
        raise damaged(path, "cannot be read", "it is not a JSON object")
    return document


def _weights(path: Path, entries: dict[str, _Entry]) -> Iterator[Weight]:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        if start != position or end < start or any(size < 0 for size in entry.shape) or len(entry.shape) > _MAX_DIMS:
            raise damaged(
                path, f"has an impossible tensor {name[:80]!r}", f"bytes {start} to {end}, expected to start at {position}"
            )
        bits = _bits(entry.dtype)
        if bits is not None and prod(entry.shape) * bits != (end - start) * 8:
            why = f"{end - start} bytes do not match shape {entry.shape} of {entry.dtype}"
            raise damaged(path, f"has an impossible tensor {name[:80]!r}", why)
        position = end
        yield Weight(name, entry.dtype, tuple(entry.shape), end - start)


def _bits(dtype: str) -> int | None:
    """Bits per element, from the first number in the dtype's name (``BF16``, ``F8_E4M3``, ``I64``); None if it has none."""
    match = re.fullmatch(r"(?:BF|F|I|U|C)(\d{1,4})(?:_\w+)?", dtype)
    return 8 if dtype == "BOOL" else int(match[1]) if match else None


def _weight_map(index: Path) -> dict[str, str]:
    document = read_model_json(index)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and _PART.fullmatch(name) for name in weight_map.values()
    ):
        raise damaged(
            index, "is not an index of weight files", "weight_map must map tensors to model*.safetensors in this directory"
        )
    return weight_map


def _no_weights(directory: Path) -> InvalidDataError:
    try:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    except OSError as error:
        raise from_os_error(error, "looking for weights", directory) from error
    if pickles:
        return InvalidDataError(
            f"{directory} has only PyTorch pickles",
            f"reading a pickle such as {pickles[0]} can execute code hidden in it",
            "Get the model's safetensors, or convert the pickles yourself if you trust them.",
        )
    return InvalidDataError(
        f"{directory} has no weights",
        "it has no model*.safetensors next to its config.json",
        "Download the weight files too.",
    )
