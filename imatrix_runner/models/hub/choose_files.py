"""Chooses the files of a repository that make up the model, or explains why there are none. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from imatrix_runner.errors import DownloadError, InvalidDataError, RunnerError
from imatrix_runner.models.folder_survey import Folder
from imatrix_runner.models.gguf_names import first_shards, full_precision, is_gguf_model, is_quantised_name, siblings
from imatrix_runner.models.model import HubId
from imatrix_runner.models.model_folders import diagnose

_WEIGHTS = re.compile(r"model[^/]*\.safetensors")
CONFIG = "config.json"
# README.md: from it the converter takes licence and authorship into the GGUF.
_COMPANIONS = re.compile(r"README\.md|[^/]+\.(?:json|jinja|tiktoken|model|txt)")


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository; ``size`` in bytes and ``sha256`` of its content are None if the hub does not state them."""

    name: str
    size: int | None
    sha256: str | None = None


@dataclass(frozen=True)
class ChosenFiles:
    """``files`` to download: the shards of one GGUF in order, or the files of a checkpoint that the converter reads,
    config.json first."""

    kind: Literal["gguf", "checkpoint"]
    files: tuple[RepoFile, ...]


def choose(hub_id: HubId, files: Sequence[RepoFile], *, trust_remote_code: bool, base_model: str | None = None) -> ChosenFiles:
    """The GGUF that was named; else the one in BF16, F16 or F32; else the safetensors and their companion files; else the only
    GGUF whose name states no type.

    ``base_model`` (from the model card) is used in advice only. Raises :class:`DownloadError` if a named file is missing, and
    :class:`InvalidDataError` if the repository has nothing that can be quantised, or several models.
    """
    names = {file.name: file for file in files}
    if hub_id.file is not None:
        return ChosenFiles("gguf", _whole_set(hub_id, hub_id.file, names))
    found = full_precision(names)
    if len(found) == 1:
        return ChosenFiles("gguf", _whole_set(hub_id, found[0], names))
    if found:
        raise InvalidDataError(
            f"{hub_id} has several models",
            f"in the same precision: {', '.join(found[:4])}{' …' if len(found) > 4 else ''}",
            f"Name one of them: imatrix-runner run '{HubId(hub_id.repo, hub_id.revision, found[0])}'",
        )
    if CONFIG in names and any(map(_WEIGHTS.fullmatch, names)):
        wanted = _checkpoint(files, trust_remote_code)
        return ChosenFiles("checkpoint", tuple(sorted(wanted, key=lambda file: file.name != CONFIG)))
    unmarked = first_shards(name for name in names if is_gguf_model(name) and not is_quantised_name(name))
    if len(unmarked) == 1:
        return ChosenFiles("gguf", _whole_set(hub_id, unmarked[0], names))
    raise _nothing(hub_id, names, base_model)


def _whole_set(hub_id: HubId, name: str, names: dict[str, RepoFile]) -> tuple[RepoFile, ...]:
    if name not in names:
        ggufs = [other for other in names if other.lower().endswith(".gguf")]
        near = get_close_matches(name, ggufs, n=3, cutoff=0.4) or sorted(ggufs)[:3]
        raise DownloadError(
            f"{hub_id.repo} has no file {name}",
            f"the closest names are {', '.join(near)}" if near else "the repository has no GGUF",
            f"Name one that exists: imatrix-runner run '{HubId(hub_id.repo, hub_id.revision, near[0] if near else None)}'",
        )
    wanted = siblings(name)
    missing = [shard for shard in wanted if shard not in names]
    if missing:
        raise InvalidDataError(
            f"{name} in {hub_id.repo} is incomplete",
            f"{len(missing)} of its {len(wanted)} shards are not in the repository, the first is {missing[0]}",
            "Choose another file or revision, or report it to the repository's owner.",
        )
    return tuple(names[shard] for shard in wanted)


def _checkpoint(files: Sequence[RepoFile], trust_remote_code: bool) -> Iterable[RepoFile]:
    for file in files:
        code = trust_remote_code and file.name.endswith(".py") and "/" not in file.name
        if _WEIGHTS.fullmatch(file.name) or _COMPANIONS.fullmatch(file.name) or code:
            yield file


def _nothing(hub_id: HubId, names: dict[str, RepoFile], base_model: str | None) -> RunnerError:
    base = f"Use the model it was made from: imatrix-runner run {base_model}" if base_model else None
    if any(name.lower().endswith(".gguf") for name in names):
        quants = sorted(name for name in names if is_gguf_model(name))
        return InvalidDataError(
            f"{hub_id} has no model in full precision",
            "its GGUF files are already quantised" + (f", such as {quants[0]}" if quants else ", adapters or projectors"),
            base or "Give the repository in which the model was first published, with safetensors or a BF16 GGUF.",
        )
    if "adapter_config.json" in names:
        return InvalidDataError(
            f"{hub_id} is an adapter (LoRA), not a model",
            "it only changes the weights of another model",
            base or "Merge it into its base model, then give the merged directory.",
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return InvalidDataError(
            f"{hub_id} has only PyTorch pickles",
            "reading a pickle can execute code hidden in it, so imatrix-runner does not download them",
            "Look for a revision or repository with safetensors (the hub's converter makes them), or convert it yourself.",
        )
    listed = Folder(str(hub_id), tuple(sorted(names)), base=base_model or "", local=False)
    if names and (wrong := diagnose(listed)) is not None:
        return wrong
    return InvalidDataError(
        f"{hub_id} has no model",
        "it has neither a GGUF nor a config.json with model*.safetensors",
        base or "Check the id; a data set or a Space is not a model.",
    )
