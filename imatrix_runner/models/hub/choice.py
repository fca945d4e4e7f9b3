"""Which files of a repository make the model. Pure: a listing goes in, a choice or an explained refusal comes out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from imatrix_runner.errors import DownloadError, InvalidDataError, RunnerError
from imatrix_runner.models.folder_survey import Folder
from imatrix_runner.models.folders import diagnose
from imatrix_runner.models.gguf_names import first_shards, full_precision, is_gguf_model, is_quantised_name, siblings
from imatrix_runner.models.sources import HubId

_WEIGHTS = re.compile(r"model[^/]*\.safetensors")
CONFIG = "config.json"
# README.md: the converter takes licence and authorship into the GGUF from it.
_COMPANIONS = re.compile(r"README\.md|[^/]+\.(?:json|jinja|tiktoken|model|txt)")


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository; ``size`` in bytes and ``sha256`` of its content, None when the hub did not say."""

    name: str
    size: int | None
    sha256: str | None = None


@dataclass(frozen=True)
class Choice:
    """``files`` to download: the shards of one GGUF in order, or what the converter reads from a checkpoint, config.json
    first."""

    kind: Literal["gguf", "checkpoint"]
    files: tuple[RepoFile, ...]


def choose(hub_id: HubId, files: Sequence[RepoFile], *, trust_remote_code: bool, base_model: str | None = None) -> Choice:
    """The GGUF that was named; else one in BF16, F16 or F32; else the safetensors with all that belongs to them.

    ``base_model`` (from the model card) only serves advice. Raises :class:`DownloadError` when a named file is missing and
    :class:`InvalidDataError` when the repository holds nothing that can be quantised, or several models.
    """
    names = {file.name: file for file in files}
    if hub_id.file is not None:
        return Choice("gguf", _whole_set(hub_id, hub_id.file, names))
    found = full_precision(names)
    if len(found) == 1:
        return Choice("gguf", _whole_set(hub_id, found[0], names))
    if found:
        raise InvalidDataError(
            f"{hub_id} holds several models",
            f"in the same precision: {', '.join(found[:4])}{' …' if len(found) > 4 else ''}",
            f"Name one of them: imatrix-runner run '{HubId(hub_id.repo, hub_id.revision, found[0])}'",
        )
    if CONFIG in names and any(map(_WEIGHTS.fullmatch, names)):
        wanted = _checkpoint(files, trust_remote_code)
        return Choice("checkpoint", tuple(sorted(wanted, key=lambda file: file.name != CONFIG)))
    unmarked = first_shards(name for name in names if is_gguf_model(name) and not is_quantised_name(name))
    if len(unmarked) == 1:
        return Choice("gguf", _whole_set(hub_id, unmarked[0], names))
    raise _nothing(hub_id, names, base_model)


def _whole_set(hub_id: HubId, name: str, names: dict[str, RepoFile]) -> tuple[RepoFile, ...]:
    if name not in names:
        ggufs = [other for other in names if other.lower().endswith(".gguf")]
        near = get_close_matches(name, ggufs, n=3, cutoff=0.4) or sorted(ggufs)[:3]
        raise DownloadError(
            f"{hub_id.repo} has no file {name}",
            f"the nearest names are {', '.join(near)}" if near else "there is no GGUF in that repository at all",
            f"Name one that exists: imatrix-runner run '{HubId(hub_id.repo, hub_id.revision, near[0] if near else None)}'",
        )
    wanted = siblings(name)
    missing = [shard for shard in wanted if shard not in names]
    if missing:
        raise InvalidDataError(
            f"{name} in {hub_id.repo} is incomplete",
            f"{len(missing)} of its {len(wanted)} shards are not in the repository, the first is {missing[0]}",
            "Choose another file or revision, or tell the repository's owner.",
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
            f"{hub_id} holds no model in full precision",
            "its GGUF files are quantised already" + (f", such as {quants[0]}" if quants else ", adapters or projectors"),
            base or "Give the repository the model was first published in, with safetensors or a BF16 GGUF.",
        )
    if "adapter_config.json" in names:
        return InvalidDataError(
            f"{hub_id} is an adapter (LoRA), not a model",
            "it only changes the weights of another model",
            base or "Merge it into its base model, then give the merged directory.",
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return InvalidDataError(
            f"{hub_id} holds PyTorch pickles only",
            "reading a pickle can execute code hidden in it, so imatrix-runner does not download them",
            "Look for a revision or repository with safetensors (the hub's converter makes them), or convert it yourself.",
        )
    listed = Folder(str(hub_id), tuple(sorted(names)), base=base_model or "", local=False)
    if names and (wrong := diagnose(listed)) is not None:
        return wrong
    return InvalidDataError(
        f"{hub_id} holds no model",
        "there is neither a GGUF nor a config.json with model*.safetensors in it",
        base or "Check the id; a data set or a Space is not a model.",
    )
