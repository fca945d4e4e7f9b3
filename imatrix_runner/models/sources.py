"""What a user may call a model, and the model that a GGUF file is.

A source is a path that exists (file or Hugging Face directory) or a hub id ``org/name[@revision][:file.gguf]``. Whatever the
source, the main job works on a :class:`Model`: one GGUF, perhaps in shards, checked and refused here if it cannot be
quantised sensibly.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.errors import InvalidDataError, UsageError, from_os_error
from imatrix_runner.models.folder_signs import CACHED
from imatrix_runner.models.folder_survey import survey
from imatrix_runner.models.folders import diagnose
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, read_header
from imatrix_runner.models.gguf_names import SHARD, shard_names
from imatrix_runner.models.misnamed import meant
from imatrix_runner.models.native_types import keep_native, native_tensors
from imatrix_runner.models.sniff import UNFINISHED

_PRECISION = re.compile(r"[-._](?:bf16|f16|f32)$", re.IGNORECASE)
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?(?::(?P<file>[^:\\]{1,400}))?",
    re.ASCII,
)
_WEIGHT_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_MAX_NAME = 120
_DEVICE_NAMES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", re.IGNORECASE)


_MOST_LAYERS = 4096
"""Far above every model; llama.cpp itself takes 512 (LLAMA_MAX_LAYERS)."""


@dataclass(frozen=True)
class LocalFile:
    """A file, hopefully a GGUF; :func:`open_gguf` looks inside."""

    path: Path


@dataclass(frozen=True)
class LocalDirectory:
    """A Hugging Face checkpoint: it holds a ``config.json``."""

    path: Path


@dataclass(frozen=True)
class HubId:
    """A repository of a hub, perhaps pinned to a revision (branch, tag or commit), perhaps narrowed to one GGUF in it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


Source = LocalFile | LocalDirectory | HubId


@dataclass(frozen=True)
class Provenance:
    """Where a model came from. ``location`` is what the user named; ``commit`` the 40 hex digits a hub answered with.

    ``dequantised``: the quantised form in which a checkpoint was published (``fp8``), where the converter dequantised it.
    """

    kind: Literal["file", "directory", "hub"]
    location: str
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    dequantised: str = ""


@dataclass(frozen=True)
class Model:
    """A checked GGUF model. ``files``: the shards in order, the first is what llama.cpp is given; ``header`` is the first's.

    ``tensors`` are those of all shards, in file order; ``n_params`` their elements, ``n_bytes`` the size of all files.
    """

    name: str
    files: tuple[Path, ...]
    header: GgufHeader
    tensors: tuple[TensorInfo, ...]
    n_params: int
    n_bytes: int
    architecture: str
    source: Provenance

    @property
    def path(self) -> Path:
        """The file llama.cpp is given."""
        return self.files[0]

    @property
    def is_split(self) -> bool:
        """Whether the model lies in several files."""
        return len(self.files) > 1

    @property
    def is_quantised(self) -> bool:
        """Whether any weight of two or more dimensions is in a block format, or was published in a quantised one."""
        return bool(self.source.dequantised) or any(tensor.is_quantised for tensor in _weights(self.tensors))

    @property
    def is_native(self) -> bool:
        """Whether all that is quantised is in a form that models are published in: gpt-oss has its experts in MXFP4."""
        quantised = [tensor for tensor in _weights(self.tensors) if tensor.is_quantised]
        return bool(quantised) and len(native_tensors(quantised)) == len(quantised)

    @property
    def main_type(self) -> str:
        """The type that most weights have: ``BF16`` for a usual source."""
        share: Counter[str] = Counter()
        for tensor in _weights(self.tensors) or self.tensors:
            share[tensor.type_name] += tensor.n_elements
        return share.most_common(1)[0][0]

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""
        return bool(self.header.text("tokenizer.chat_template"))

    @property
    def n_layers(self) -> int | None:
        """Number of blocks, from ``<architecture>.block_count``."""
        return self.header.integer(f"{self.architecture}.block_count")

    @property
    def n_experts(self) -> int:
        """Experts per mixture layer; 0 for a dense model."""
        return self.header.integer(f"{self.architecture}.expert_count") or 0


def parse_source(text: str) -> Source:
    """Tell a path from a hub id: a path that exists wins. Raises :class:`UsageError` or :class:`InvalidDataError`."""
    path = Path(text).expanduser()
    try:
        if text and path.is_dir():
            return _directory(path)
        if text and path.exists():
            return _file(path)
    except OSError as error:
        raise from_os_error(error, "looking for the model", text) from error
    match = _HUB_ID.fullmatch(text)
    if match is None or (text.lower().endswith(_WEIGHT_FILES) and not match["file"]):
        raise _no_model(text)
    return _hub_id(text, match["repo"], match["revision"], match["file"])


def model_name(source: str | Path) -> str:
    """The name of the workspace's folder for a model: a safe, single, visible path component of at most 120 characters.

    A file's stem without shard number and ``-F16`` / ``-BF16`` / ``-F32``; :func:`directory_name`; the last part of a hub id.
    """
    path = Path(source).expanduser()
    match = _HUB_ID.fullmatch(source) if isinstance(source, str) and not path.exists() else None
    if path.is_dir():
        return _safe_name(directory_name(path), str(source))
    if match and match["file"]:
        return _safe_name(_stem(match["file"].rpartition("/")[2]), str(source))
    if match and not str(source).lower().endswith(_WEIGHT_FILES):
        return _safe_name(match["repo"].rpartition("/")[2], str(source))
    return _safe_name(_stem(path.name), str(source))


def directory_name(path: Path) -> str:
    """What a checkpoint's directory is called: its own name, and for a snapshot in a hub's cache, whose name is a commit, that
    of the repository."""
    whole = path.absolute() if path.name not in ("", "..") else path.resolve()
    cached = CACHED.fullmatch(whole.parent.parent.name) if whole.parent.name == "snapshots" else None
    return cached["name"] if cached is not None else whole.name


def open_gguf(path: Path, *, allow_requantize: bool, name: str | None = None, source: Provenance | None = None) -> Model:
    """Check a GGUF, with all its shards whichever is named, and return the model it is.

    Raises :class:`InvalidDataError` for what is damaged, incomplete, no model, or (unless allowed) already quantised.
    """
    headers = _shards(path)
    first = headers[0]
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    _refuse_non_models(first, tensors)
    model = Model(
        name=name or model_name(first.path),
        files=tuple(header.path for header in headers),
        header=first,
        tensors=tensors,
        n_params=sum(tensor.n_elements for tensor in tensors),
        n_bytes=sum(header.file_size for header in headers),
        architecture=first.text("general.architecture") or "",
        source=source or Provenance("file", str(path)),
    )
    _refuse_endless_layers(model)
    # Tensors in a published 4-bit form may be kept; whether a level would quantise them again is for the plan to say.
    if model.is_quantised and not allow_requantize and not model.is_native:
        raise _already_quantised(path, model)
    return model


def _refuse_endless_layers(model: Model) -> None:
    """Raise for a block count that no model has: whatever goes over the layers would not end, in llama.cpp as here."""
    layers = model.n_layers or 0
    if layers > _MOST_LAYERS:
        raise InvalidDataError(
            f"{model.files[0]} announces {layers} blocks",
            f"no model has more than {_MOST_LAYERS}, so its metadata ({model.architecture}.block_count) is damaged or made up",
            "Download or convert the model again.",
        )


def _already_quantised(path: Path, model: Model) -> InvalidDataError:
    native = native_tensors(model.tensors)
    keep = f" Its {native[0].type_name} tensors are as published: keep them with {keep_native(native)}." if native else ""
    return InvalidDataError(
        f"{path} is already quantised",
        f"most of its weights are {model.main_type}, and quantising again adds one error to another",
        "Use its BF16, F16 or F32 GGUF or the original directory; if this is all there is, pass --allow-requantize." + keep,
    )


def _weights(tensors: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
    return tuple(tensor for tensor in tensors if len(tensor.shape) > 1)


def _stem(name: str) -> str:
    shard = SHARD.fullmatch(name)
    stem = shard["stem"] if shard else re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)
    return _PRECISION.sub("", stem) or stem


def _safe_name(name: str, source: str) -> str:
    safe = re.sub(r"[^\w.+ -]", "_", name).lstrip(" .-").rstrip(" .")
    if not safe:
        raise UsageError(
            f"No folder can be named after the model {source!r}",
            "nothing of its name is left once unsafe characters are taken away",
            "Rename the file or directory, for example to model.gguf.",
        )
    if _DEVICE_NAMES.match(safe):
        safe = f"_{safe}"  # Windows keeps these names for devices
    if len(safe) > _MAX_NAME:
        safe = f"{safe[: _MAX_NAME - 9]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return safe


def _file(path: Path) -> LocalFile:
    if path.name.lower().endswith(UNFINISHED):
        raise InvalidDataError(
            f"{path} is an unfinished download",
            f"its name ends in {path.suffix}, which a download takes away when it is complete",
            "Let the download finish; if it did, rename the file.",
        )
    return LocalFile(path)


def _directory(path: Path) -> LocalDirectory:
    if (path / "config.json").is_file():
        return LocalDirectory(path)
    raise diagnose(survey(path)) or InvalidDataError(
        f"{path} is not a Hugging Face model directory",
        "it has no config.json",
        "Name the directory that holds config.json and the *.safetensors, or a .gguf file.",
    )


def _no_model(text: str) -> InvalidDataError:
    found = meant(text)
    return InvalidDataError(f"There is no model {text!r}", found.why, found.todo)


def _hub_id(text: str, repo: str, revision: str | None, file: str | None) -> HubId:
    parts = file.split("/") if file is not None else []
    unsafe_file = any(part in ("", ".", "..") for part in parts) or not (file or "").isprintable()
    if ".." in repo or "--" in repo or ".." in (revision or "") or unsafe_file:
        raise UsageError(
            f"{text!r} is not a hub id",
            "it holds '..', '--' or characters that no hub allows",
            "Write it as org/name@revision:file.gguf.",
        )
    if file is not None and not file.lower().endswith(".gguf"):
        if "." not in file and "/" not in file and revision is None:
            found = meant(text)
            raise UsageError(f"There is no model {text!r}", found.why, found.todo)
        raise UsageError(
            f"{text!r} names a file that is not a GGUF",
            "after the colon only a .gguf can stand",
            f"Write {repo}:file.gguf, or just {repo} to convert the repository's safetensors.",
        )
    return HubId(repo, revision, file)


def _shards(path: Path) -> list[GgufHeader]:
    """The headers of all files of the set that ``path`` belongs to, in order."""
    header = read_header(path)
    announced = header.integer("split.count") or 0
    names = shard_names(path)
    if len(names) == 1 and announced <= 1:
        return [header]
    if len(names) != announced:
        raise InvalidDataError(
            f"{path} does not carry its shard's own name",
            f"its metadata says {announced or 'nothing'} about the number of shards, its name {len(names)}",
            "Give it back its published name (…-00001-of-0000N.gguf), or merge the set with llama-gguf-split --merge.",
        )
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise InvalidDataError(
            f"{len(missing)} of the {len(names)} shards of {path} are missing",
            f"not found in {path.parent}: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}",
            "Download the missing files into the same directory.",
        )
    headers = [header if name == path.name else read_header(path.parent / name) for name in names]
    _check_set(headers)
    return headers


def _check_set(headers: list[GgufHeader]) -> None:
    seen: set[str] = set()
    for index, header in enumerate(headers):
        if header.integer("split.no") != index or header.integer("split.count") != len(headers):
            raise _mixed(header.path, f"it says it is shard {header.integer('split.no')} (from 0), its name says {index}")
        twice = seen.intersection(tensor.name for tensor in header.tensors)
        if twice:
            raise _mixed(header.path, f"the tensor {min(twice)} is also in an earlier shard")
        seen.update(tensor.name for tensor in header.tensors)
    total = headers[0].integer("split.tensors.count")
    if total is not None and total != len(seen):
        raise _mixed(headers[0].path, f"the set should hold {total} tensors and holds {len(seen)}")


def _mixed(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{path} does not belong to the set of shards it is named after",
        why,
        "Download all shards again from one revision of one repository.",
    )


def _refuse_non_models(header: GgufHeader, tensors: tuple[TensorInfo, ...]) -> None:
    path, kind, architecture = header.path, header.text("general.type"), header.text("general.architecture")
    if kind == "imatrix" or any(key.startswith("imatrix.") for key in header.metadata):
        raise InvalidDataError(
            f"{path} is an importance matrix, not a model",
            "it holds activation sums, no weights",
            f"Give it with --imatrix {path}.",
        )
    if kind == "adapter" or "adapter.type" in header.metadata:
        raise InvalidDataError(
            f"{path} is an adapter (LoRA), not a model",
            "it only changes the weights of another model",
            "Merge it into its base model with llama-export-lora, then quantise the result.",
        )
    if architecture == "clip" or kind in ("mmproj", "clip-vision"):
        raise InvalidDataError(
            f"{path} is a multimodal projector (mmproj), not a language model",
            "an importance matrix is made for the language model; projectors stay in F16 or BF16",
            "Name the language model's own GGUF, which lies beside it in most repositories.",
        )
    if not architecture:
        raise InvalidDataError(
            f"{path} does not say which model it is",
            "the metadata key general.architecture is missing",
            "Name the model's first file, or convert the original model again.",
        )
    if not tensors:
        raise InvalidDataError(
            f"{path} holds a vocabulary only",
            "there is not a single tensor in it",
            "Name the GGUF with the weights; files called ggml-vocab-* are for testing tokenizers.",
        )
