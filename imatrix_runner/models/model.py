"""Parses what a user gives as a model, and opens and checks a GGUF model.

A source is an existing path (file or Hugging Face directory) or a hub id ``org/name[@revision][:file.gguf]``. Whatever the
source, the main job works on a :class:`Model`: one GGUF, perhaps in shards, which is refused here if quantising it makes no
sense.
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
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, read_header
from imatrix_runner.models.gguf_names import SHARD, shard_names
from imatrix_runner.models.misnamed import meant
from imatrix_runner.models.model_folders import diagnose
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
"""Far above any model; llama.cpp itself accepts 512 (LLAMA_MAX_LAYERS)."""
_ONE_PERCENT, _NEARLY_ALL = 0.01, 0.995


@dataclass(frozen=True)
class LocalFile:
    """A file that should be a GGUF; :func:`open_gguf` checks it."""

    path: Path


@dataclass(frozen=True)
class LocalDirectory:
    """A Hugging Face checkpoint: a directory with a ``config.json``."""

    path: Path


@dataclass(frozen=True)
class HubId:
    """A repository of a hub, optionally with a revision (branch, tag or commit) and one GGUF file in it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


Source = LocalFile | LocalDirectory | HubId


@dataclass(frozen=True)
class Provenance:
    """Where a model came from. ``location``: as given by the user; ``commit``: 40 hex digits, as reported by the hub.

    ``dequantised``: the quantised form in which a checkpoint was published (``fp8``), if the converter dequantised it.
    """

    kind: Literal["file", "directory", "hub"]
    location: str
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    dequantised: str = ""


@dataclass(frozen=True)
class Model:
    """A checked GGUF model. ``files``: the shards in order, of which llama.cpp is given the first; ``header``: of the first.

    ``tensors``: those of all shards, in file order; ``n_params``: number of their elements; ``n_bytes``: size of all files.
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
        """The file that llama.cpp is given: the first shard."""
        return self.files[0]

    @property
    def is_split(self) -> bool:
        """Whether the model consists of several files."""
        return len(self.files) > 1

    @property
    def is_quantised(self) -> bool:
        """Whether any weight of two or more dimensions is in a block format, or the checkpoint was published quantised."""
        return bool(self.source.dequantised) or any(tensor.is_quantised for tensor in _weights(self.tensors))

    @property
    def is_native(self) -> bool:
        """Whether all quantised weights have a type in which models are published (gpt-oss has its experts in MXFP4)."""
        quantised = [tensor for tensor in _weights(self.tensors) if tensor.is_quantised]
        return bool(quantised) and len(native_tensors(quantised)) == len(quantised)

    @property
    def quantised_part(self) -> str:
        """The share of the weights in a block format, for people: ``3 % of its weights are Q8_0 (blk.0.ffn_down.weight)``."""
        weights = _weights(self.tensors)
        found = [tensor for tensor in weights if tensor.is_quantised]
        share = sum(tensor.n_elements for tensor in found) / max(1, sum(tensor.n_elements for tensor in weights))
        types = " and ".join(sorted({tensor.type_name for tensor in found}))
        if share > _NEARLY_ALL:
            return f"its weights are {types}"
        where = found[0].name if len(found) == 1 else f"{len(found)} of {len(weights)} tensors"
        return f"{'less than 1' if share < _ONE_PERCENT else f'{100 * share:.0f}'} % of its weights are {types} ({where})"

    @property
    def main_type(self) -> str:
        """The type of most weights: usually ``BF16`` for a source."""
        share: Counter[str] = Counter()
        for tensor in _weights(self.tensors) or self.tensors:
            share[tensor.type_name] += tensor.n_elements
        return share.most_common(1)[0][0]

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's metadata has a chat template."""
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
    """Parse a path or a hub id; an existing path has precedence. Raises :class:`UsageError` or :class:`InvalidDataError`."""
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
    """The name of a model's workspace folder: one safe, visible path component of at most 120 characters.

    It comes from a file's stem (without shard number and ``-F16``, ``-BF16`` or ``-F32``), from :func:`directory_name`, or from
    the last part of a hub id.
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
    """The name of a checkpoint's directory; for a snapshot in a hub's cache, whose name is a commit, that of the repository."""
    whole = path.absolute() if path.name not in ("", "..") else path.resolve()
    cached = CACHED.fullmatch(whole.parent.parent.name) if whole.parent.name == "snapshots" else None
    return cached["name"] if cached is not None else whole.name


def open_gguf(path: Path, *, allow_requantize: bool, name: str | None = None, source: Provenance | None = None) -> Model:
    """Check a GGUF with all its shards, whichever is named, and return the model.

    Raises :class:`InvalidDataError` if it is damaged, incomplete, not a model, or (unless allowed) already quantised.
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
    # Tensors in a published 4-bit type may be kept; the plan checks whether a level would quantise them again.
    if model.is_quantised and not allow_requantize and not model.is_native:
        raise _already_quantised(path, model)
    return model


def _refuse_endless_layers(model: Model) -> None:
    """Raise :class:`InvalidDataError` for an impossible block count: loops over layers, here and in llama.cpp, would not
    end."""
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
        f"{model.quantised_part}, and quantising again adds another error",
        "Use its BF16, F16 or F32 GGUF or the original directory; if no other exists, pass --allow-requantize." + keep,
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
            "without unsafe characters nothing of its name is left",
            "Rename the file or directory, for example to model.gguf.",
        )
    if _DEVICE_NAMES.match(safe):
        safe = f"_{safe}"  # Windows reserves these names for devices
    if len(safe) > _MAX_NAME:
        safe = f"{safe[: _MAX_NAME - 9]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return safe


def _file(path: Path) -> LocalFile:
    if path.name.lower().endswith(UNFINISHED):
        raise InvalidDataError(
            f"{path} is an unfinished download",
            f"its name ends in {path.suffix}, which is removed when a download is complete",
            "Let the download finish; if it has finished, rename the file.",
        )
    return LocalFile(path)


def _directory(path: Path) -> LocalDirectory:
    if (path / "config.json").is_file():
        return LocalDirectory(path)
    raise diagnose(survey(path)) or InvalidDataError(
        f"{path} is not a Hugging Face model directory",
        "it has no config.json",
        "Give the directory with config.json and the *.safetensors, or a .gguf file.",
    )


def _no_model(text: str) -> InvalidDataError:
    found = meant(text)
    return InvalidDataError(f"No model {text!r} found", found.why, found.todo)


def _hub_id(text: str, repo: str, revision: str | None, file: str | None) -> HubId:
    parts = file.split("/") if file is not None else []
    unsafe_file = any(part in ("", ".", "..") for part in parts) or not (file or "").isprintable()
    if ".." in repo or "--" in repo or ".." in (revision or "") or unsafe_file:
        raise UsageError(
            f"{text!r} is not a hub id",
            "it contains '..', '--' or characters that no hub allows",
            "Write it as org/name@revision:file.gguf.",
        )
    if file is not None and not file.lower().endswith(".gguf"):
        if "." not in file and "/" not in file and revision is None:
            found = meant(text)
            raise UsageError(f"No model {text!r} found", found.why, found.todo)
        raise UsageError(
            f"{text!r} names a file that is not a GGUF",
            "a colon must be followed by a .gguf file",
            f"Write {repo}:file.gguf, or just {repo} to convert the repository's safetensors.",
        )
    return HubId(repo, revision, file)


def _shards(path: Path) -> list[GgufHeader]:
    """The headers of all shards of the set that ``path`` belongs to, in order. Raises :class:`InvalidDataError`."""
    header = read_header(path)
    announced = header.integer("split.count") or 0
    names = shard_names(path)
    if len(names) == 1 and announced <= 1:
        return [header]
    if len(names) != announced:
        raise InvalidDataError(
            f"{path} does not have the name of its shard",
            f"its metadata states {announced or 'no'} shards, its name {len(names)}",
            "Restore its published name (…-00001-of-0000N.gguf), or merge the set with llama-gguf-split --merge.",
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
            raise _mixed(header.path, f"its metadata states shard {header.integer('split.no')} (from 0), its name {index}")
        twice = seen.intersection(tensor.name for tensor in header.tensors)
        if twice:
            raise _mixed(header.path, f"the tensor {min(twice)} is also in an earlier shard")
        seen.update(tensor.name for tensor in header.tensors)
    total = headers[0].integer("split.tensors.count")
    if total is not None and total != len(seen):
        raise _mixed(headers[0].path, f"the set should have {total} tensors and has {len(seen)}")


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
            "it contains activation sums, not weights",
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
            "an imatrix is collected for the language model; projectors stay in F16 or BF16",
            "Give the language model's own GGUF, which is next to it in most repositories.",
        )
    if not architecture:
        raise InvalidDataError(
            f"{path} does not state its architecture",
            "the metadata key general.architecture is missing",
            "Give the model's first file, or convert the original model again.",
        )
    if not tensors:
        raise InvalidDataError(
            f"{path} has only a vocabulary",
            "it has no tensors",
            "Give the GGUF with the weights; files named ggml-vocab-* are for testing tokenizers.",
        )
