"""Finds the origin of a model: the hub id under which it was first published, according to the model's own metadata.

Publishers of quantised files and of imatrix files name that id as their base. An :class:`Origin` states where the id was read
and whether it is certain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatrix_runner.errors import UsageError
from imatrix_runner.untrusted import UnreadableError, from_lenient_json, split_url

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_OWN_ADDRESS = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
    "general.repo_url",
    "general.url",
)
_CARD_BASE = re.compile(
    r"""^base_model:[ \t]*(?:\r?\n[ \t]*-[ \t]*|\[[ \t]*)?["']?([\w.-]+/[\w.-]+)""", re.MULTILINE | re.ASCII
)
_SMALL = 1 << 20


@dataclass(frozen=True)
class Origin:
    """``repo``: ``ORG/NAME``; ``how``: where it was read; ``sure``: it is certainly the model itself.

    If not ``sure``, it may be the model from which this one was fine-tuned.
    """

    repo: str
    how: str
    sure: bool = True

    @property
    def organisation(self) -> str:
        return self.repo.partition("/")[0]

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]


def given_origin(text: str) -> Origin:
    """The origin that the user gave. Raises :class:`UsageError` for an invalid hub id."""
    repo = repository_in(text)
    if repo is None:
        raise UsageError(
            f"{text!r} is not a hub id", "a base model is given as ORG/NAME", "For example: --base-model Qwen/Qwen3-0.6B"
        )
    return Origin(repo, "given with --base-model")


def repository_in(text: object) -> str | None:
    """``ORG/NAME`` of a hub id or of a repository's web address; None if ``text`` is neither."""
    if not isinstance(text, str):
        return None
    path = split_url(text).path.strip("/") if "://" in text else text
    repo = path.removesuffix("/tree/main")
    return repo if _REPO.fullmatch(repo) and ".." not in repo and "--" not in repo else None


def origin_of_gguf(metadata: Mapping[str, Any]) -> Origin | None:
    """The origin according to a GGUF's ``general.*`` keys; None if they name none.

    The converter takes ``base_model`` from the model card. For a quantised or plain copy it is the model itself, for a
    fine-tune another model; the name decides which.
    """
    for key in _OWN_ADDRESS:
        repo = repository_in(metadata.get(key))
        if repo is not None and not re.search(r"gguf", repo, re.IGNORECASE):
            return Origin(repo, key)
    name = metadata.get("general.name")
    base = _base_model(metadata)
    if base is not None:
        return Origin(base[0], base[1], sure=same_name(name, base[0].partition("/")[2]))
    organisation = metadata.get("general.organization")
    spelled = _spelled(organisation, name)
    return Origin(spelled, "general.organization and general.name", sure=False) if spelled else None


def origin_of_directory(directory: Path) -> Origin | None:
    """The origin of a checkpoint according to its path (in the hub's cache), configuration or model card; None if unknown."""
    place = directory.absolute()
    if place.parent.name == "snapshots" and (parts := place.parent.parent.name.split("--"))[0] == "models" and len(parts) == 3:
        return Origin("/".join(parts[1:]), "the name of the folder in the hub's cache")
    found = (
        (_configured(place / "config.json"), "_name_or_path in config.json"),
        (card_base(place / "README.md"), "README.md"),
    )
    origins = [Origin(repo, how, sure=same_name(place.name, repo.partition("/")[2])) for repo, how in found if repo]
    return next((origin for origin in origins if origin.sure), origins[0] if origins else None)


def same_name(one: object, other: object) -> bool:
    """Whether two spellings (``Qwen3 0.6B``, ``Qwen3-0.6B``) mean the same name."""
    return isinstance(one, str) and isinstance(other, str) and _plain(one) == _plain(other) != ""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _base_model(metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """The hub id of the base model and the keys that state it; None if there are several, because then none is the model."""
    if metadata.get("general.base_model.count", 1) != 1:
        return None
    key = "general.base_model.0"
    for part in ("repo_url", "url"):
        if repo := repository_in(metadata.get(f"{key}.{part}")):
            return repo, f"{key}.{part}"
    spelled = _spelled(metadata.get(f"{key}.organization"), metadata.get(f"{key}.name"))
    return (spelled, f"{key}.organization and .name") if spelled else None


def _spelled(organisation: object, name: object) -> str | None:
    """A hub id from display names, with spaces replaced by hyphens."""
    if not isinstance(organisation, str) or not isinstance(name, str):
        return None
    return repository_in(f"{organisation.strip().replace(' ', '-')}/{name.strip().replace(' ', '-')}")


def _configured(path: Path) -> str | None:
    try:
        value = from_lenient_json(_start(path))
    except UnreadableError:
        return None
    return repository_in(value.get("_name_or_path")) if isinstance(value, dict) else None


def card_base(path: Path) -> str | None:
    """The ``base_model`` in the front matter of a model card; None if there is none."""
    front = re.match(r"---\s*\n(.*?)\n---", _start(path).decode("utf-8", "replace"), re.DOTALL)
    match = _CARD_BASE.search(front[1]) if front else None
    return repository_in(match[1]) if match else None


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(_SMALL)
    except OSError:
        return b""
