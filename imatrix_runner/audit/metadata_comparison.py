"""Compares the metadata of a quantised file with that of its source: vocabulary, hyperparameters, chat template, file type."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.bounded import opened
from imatrix_runner.engines.roundings import ROUNDINGS, STOCK, Rounding
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.ggml_types import is_plain, type_id, type_size
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo
from imatrix_runner.models.model import Model
from imatrix_runner.safe_text import shown

MetadataKind = Literal["tokenizer", "hyperparameters", "chat template", "file type", "imatrix", "other"]

ROUNDING_KEY = "imatrix_runner.rounding"
_TOKENS = "tokenizer.ggml.tokens"
_TEMPLATE = "tokenizer.chat_template"
_OWN = (
    *("general.file_type", "general.quantization_version", "general.alignment"),
    *("split.no", "split.count", "split.tensors.count"),
)
"""Keys that quantising sets."""

_GUESSED = 1024
_BASES = {"IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "MXFP4_MOE": "MXFP4"}
_FAR = 1.6
"""Bits per weight between a file and the type that it names, beyond which the name is not plausible: the mixtures of llama.cpp
stay below, tiny models with large embeddings aside."""


@dataclass(frozen=True)
class MetadataFinding:
    """A difference. ``serious``: it changes what a program computes with the file."""

    kind: MetadataKind
    what: str
    serious: bool


@dataclass(frozen=True)
class DeclaredMaking:
    """What a file's metadata says of how it was made. ``imatrix``: the name of the matrix's file, empty without one;
    ``entries`` of it that were used; ``rounding``: of its numbers."""

    imatrix: str = ""
    dataset: str = ""
    entries: int | None = None
    chunks: int | None = None
    rounding: Rounding = STOCK

    @property
    def has_imatrix(self) -> bool:
        return bool(self.imatrix) or self.entries is not None


def declared_making(header: GgufHeader) -> DeclaredMaking:
    said = (header.text(ROUNDING_KEY) or STOCK).partition(",")[0]
    rounding = next((each for each in ROUNDINGS if each == said), STOCK)
    return DeclaredMaking(
        header.text("quantize.imatrix.file") or "",
        header.text("quantize.imatrix.dataset") or "",
        header.integer("quantize.imatrix.entries_count"),
        header.integer("quantize.imatrix.chunks_count"),
        rounding,
    )


def compare_metadata(file: Model, source: Model, names: Mapping[int, str]) -> tuple[MetadataFinding, ...]:
    """What differs. ``names``: of llama.cpp's file types, by number. A chat template is compared elsewhere, by rendering.

    Raises :class:`InvalidDataError` for another architecture or vocabulary: nothing else would say anything.
    """
    own, other = _entries(file.header), _entries(source.header)
    if file.architecture != source.architecture:
        raise not_of_this_source(
            file, source, f"its architecture is {file.architecture}, the source's is {source.architecture}"
        )
    if own.get(_TOKENS) != other.get(_TOKENS):
        raise not_of_this_source(file, source, f"its vocabulary ({_TOKENS}) is another one")
    changed = [key for key in dict.fromkeys((*other, *own)) if key not in _OWN and own.get(key) != other.get(key)]
    findings: list[MetadataFinding] = []
    tokenizer = [key for key in changed if key.startswith("tokenizer.") and not key.startswith(_TEMPLATE)]
    hyper = [key for key in changed if key.startswith(f"{file.architecture}.")]
    if tokenizer:
        findings.append(MetadataFinding("tokenizer", _differ(tokenizer, own, other), True))
    if hyper:
        findings.append(MetadataFinding("hyperparameters", _differ(hyper, own, other), True))
    made_here = ("quantize.", "imatrix_runner.")
    known = {*tokenizer, *hyper}
    rest = [key for key in changed if key not in known and not key.startswith((_TEMPLATE, *made_here))]
    if rest:
        findings.append(MetadataFinding("other", _differ(rest, own, other), False))
    findings += file_type_findings(file, names)
    return tuple(findings)


def template_differs(file: Model, source: Model) -> bool:
    """Whether any chat template is not the source's, byte for byte."""
    own, other = (
        {key: value for key, value in _entries(model.header).items() if key.startswith(_TEMPLATE)} for model in (file, source)
    )
    return own != other


def file_type_findings(file: Model, names: Mapping[int, str]) -> list[MetadataFinding]:
    """Whether ``general.file_type`` is plausible: the type that it names is near the file's bits per weight."""
    number = file.header.integer("general.file_type")
    if number is None:
        return [MetadataFinding("file type", "general.file_type is missing, which llama-quantize always writes", False)]
    name = names.get(number & ~_GUESSED)
    if name is None:
        return [MetadataFinding("file type", f"general.file_type is {number}, which llama.cpp does not know", False)]
    wanted, have = _bits(name.upper()), quantised_bits(file.tensors)
    if wanted is None or have is None or abs(wanted - have) <= _FAR or _holds(file.tensors, name.upper()):
        return []
    what = f"general.file_type says {name} ({wanted:.3g} bits per weight), and its matrices take {have:.3g}"
    return [MetadataFinding("file type", what, False)]


def not_of_this_source(file: Model, source: Model, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{shown(file.path.name)} was not made from {shown(source.path.name)}",
        why,
        "Name the model that it was made from with --source: the exact GGUF, converted from the same checkpoint.",
    )


def quantised_bits(tensors: Sequence[TensorInfo]) -> float | None:
    """Bits per weight of a file's matrices; None without any of a known size."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.n_bytes is not None]
    count = sum(tensor.n_elements for tensor in matrices)
    return 8 * sum(tensor.n_bytes or 0 for tensor in matrices) / count if count else None


def _base(name: str) -> str:
    """The ggml type that a file type is named after."""
    if name in _BASES:
        return _BASES[name]
    stem, _, last = name.rpartition("_")
    return stem if last in ("S", "M", "L", "XS") and type_id(name) is None else name


def _bits(name: str) -> float | None:
    number = type_id(_base(name))
    size = type_size(number) if number is not None else None
    return 8 * size[1] / size[0] if size is not None else None


def _holds(tensors: Sequence[TensorInfo], name: str) -> bool:
    """Whether the type that a file type is named after is the most frequent one among the quantised matrices."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1 and not is_plain(tensor.type_name):
            counts[tensor.type_name] = counts.get(tensor.type_name, 0) + 1
    return bool(counts) and max(counts, key=lambda kind: counts[kind]) == _base(name)


def _entries(header: GgufHeader) -> dict[str, bytes]:
    """A digest of each entry of the metadata as it is stored, by key."""
    found: dict[str, bytes] = {}
    with opened(header.path) as reader:
        for key, begin, size in header.entry_places():
            reader.skip(begin - reader.position)
            found[key] = hashlib.sha256(reader.take(size)).digest()
    return found


def _differ(keys: Collection[str], own: Mapping[str, bytes], other: Mapping[str, bytes]) -> str:
    some = [
        f"{shown(key)}{'' if key in own and key in other else ' is missing' if key in other else ' was added'}" for key in keys
    ]
    return ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "") + " differ from the source's"
