"""Lists a repository's files: from the hub, or from its cache when offline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from imatrix_runner.errors import from_os_error
from imatrix_runner.models.hub.advice import Asked, no_hub
from imatrix_runner.models.hub.choose_files import RepoFile
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import as_type

LISTING_SECONDS = 30.0
_MAX_LICENCE = 80
_MOST_PARAMETERS = 1 << 50

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""A size in bytes as announced by a hub."""


class Sibling(msgspec.Struct, frozen=True):
    """A file in a hub's answer."""

    rfilename: str
    size: Bytes | None = None
    sha256: str | None = None


class _Answer(msgspec.Struct, frozen=True):
    """The fields used of a hub's answer about a repository."""

    sha: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}$")]
    siblings: list[Sibling]
    tags: list[str]


@dataclass(frozen=True)
class Listing:
    """A repository at one commit. ``date``: of its last change, ISO 8601; ``quantised_from``: base repositories by its tags.

    ``licence``: as stated on its card, such as ``mit`` or ``cc-by-sa-3.0, gfdl``. ``architecture``: the class in a model's
    config.json, or that of its GGUF (empty: not announced); ``n_params``: number of its weights, None if the hub does not say.
    """

    repo: str
    repo_type: str
    commit: str
    date: str | None
    files: tuple[RepoFile, ...]
    base_model: str | None = None
    quantised_from: tuple[str, ...] = ()
    licence: str | None = None
    architecture: str = ""
    n_params: int | None = None
    gated: bool = False


def list_repository(asked: Asked) -> Listing:
    """Request the listing once; :func:`~imatrix_runner.models.hub.transfer.patiently` adds retries and errors with advice."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    ask = api.dataset_info if asked.repo_type == "dataset" else api.model_info
    try:
        info = ask(asked.hub_id.repo, revision=asked.hub_id.revision, files_metadata=True, timeout=LISTING_SECONDS)
        base, licence = (info.card_data.get(key) if info.card_data else None for key in ("base_model", "license"))
        siblings = [
            {"rfilename": entry.rfilename, "size": entry.size, "sha256": announced_sha256(entry.lfs)}
            for entry in info.siblings or ()
        ]
        answer = as_type({"sha": info.sha, "tags": info.tags or [], "siblings": siblings}, _Answer)
        date = iso_date(info.last_modified)
        announced = _announced(info)
    except HFValidationError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise no_hub(asked) from error  # not JSON, or values of other types than a hub's
    if len({entry.rfilename for entry in answer.siblings}) < len(answer.siblings):
        raise no_hub(asked)
    return Listing(
        asked.hub_id.repo,
        asked.repo_type,
        answer.sha,
        date,
        tuple(RepoFile(each.rfilename, each.size, each.sha256) for each in answer.siblings if is_plain_name(each.rfilename)),
        _base_model(base),
        quantised_from(answer.tags),
        _licence(licence),
        *announced,
    )


def _announced(info: Any) -> tuple[str, int | None, bool]:
    """What a hub announces of a model besides its files: architecture, number of weights, whether it is gated. Values of other
    types than a hub's count as not announced."""
    config, gguf = getattr(info, "config", None), getattr(info, "gguf", None)
    named = config.get("architectures") if isinstance(config, dict) else None
    first = named[0] if isinstance(named, list) and named else gguf.get("architecture") if isinstance(gguf, dict) else None
    total = gguf.get("total") if isinstance(gguf, dict) else getattr(getattr(info, "safetensors", None), "total", None)
    known = isinstance(total, int) and not isinstance(total, bool) and 0 < total < _MOST_PARAMETERS
    architecture = printable(first)[:_MAX_LICENCE] if isinstance(first, str) else ""
    return architecture, total if known else None, getattr(info, "gated", None) not in (None, False)


def _base_model(declared: object) -> str | None:
    """The first id of a card's ``base_model``, which is an id or a list of them; None if it is not a hub id."""
    base = declared[0] if isinstance(declared, list) and declared else declared
    return base if isinstance(base, str) and is_repository(base) else None


def announced_sha256(lfs: object) -> str | None:
    """The SHA-256, in hex, that a hub announces for a large file; None for small files and for an invalid digest."""
    digest = lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)
    return digest.lower() if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def _licence(declared: object) -> str | None:
    """The names in a card's ``license``, which is a name or a list of them; None if there are none."""
    names = declared if isinstance(declared, list) else [declared]
    named = [printable(name.strip())[:_MAX_LICENCE] for name in names if isinstance(name, str) and name.strip()]
    return ", ".join(named[:8]) or None


def plain_files(entries: Iterable[tuple[str, int | None]]) -> tuple[RepoFile, ...]:
    """The files listed by a hub, without those whose names are not safe relative paths."""
    return tuple(RepoFile(name, size) for name, size in entries if is_plain_name(name))


def quantised_from(tags: Iterable[str]) -> tuple[str, ...]:
    """The repositories named by tags ``base_model:quantized:ORG/NAME``."""
    mark = "base_model:quantized:"
    return tuple(tag.removeprefix(mark) for tag in tags if isinstance(tag, str) and tag.startswith(mark))


def iso_date(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="seconds") if moment is not None else None


def is_commit(text: str | None) -> bool:
    return _COMMIT.fullmatch(text or "") is not None


def is_repository(text: str) -> bool:
    return _REPOSITORY.fullmatch(text) is not None


def is_plain_name(name: str) -> bool:
    """Whether a name is a safe relative path on every system."""
    # A colon after a letter means a drive on Windows, and a path elsewhere.
    parts = name.split("/")
    return not {"\\", ":"} & set(name) and name.isprintable() and all(part not in ("", ".", "..") for part in parts)


def repository_folder(asked: Asked, cache: Path) -> Path:
    """The folder of a repository in the cache."""
    return cache / f"{asked.repo_type}s--{asked.hub_id.repo.replace('/', '--')}"


def list_cached(asked: Asked, cache: Path) -> Listing | None:
    """The files of a repository's revision that are in the cache; None if there are none."""
    folder = repository_folder(asked, cache)
    revision = asked.hub_id.revision or "main"
    note = folder / "refs" / revision
    commit = note.read_bytes()[:100].decode("ascii", "replace").strip() if note.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not is_commit(commit) or not snapshot.is_dir():
        return None
    found = (path for path in sorted(snapshot.rglob("*")) if path.is_file())
    files = plain_files((path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in found)
    return Listing(asked.hub_id.repo, asked.repo_type, commit, None, files)


def remember_revision(asked: Asked, commit: str, cache: Path) -> None:
    """Record the commit of a branch or tag (in ``refs/``, as in the cache's documented layout) for later offline use.

    The library does so only for requests by branch; this program requests commits.
    """
    revision = asked.hub_id.revision or "main"
    if revision == commit:
        return
    note = repository_folder(asked, cache) / "refs" / revision
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit, encoding="ascii")
    except OSError as error:
        raise from_os_error(error, "recording the downloaded revision", note) from error
