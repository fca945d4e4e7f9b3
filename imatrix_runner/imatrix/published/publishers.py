"""Who publishes imatrices, where, and under which names. Pure: listings go in, ranked candidates and refusals come out.

A name proves nothing: the extension does not determine the format, and "imatrix" in a name often means quantised weights made
with one. So names and sizes only decide which files to fetch; the content decides the rest (see ``imatrix.formats``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.errors import UsageError
from imatrix_runner.files import human_bytes
from imatrix_runner.imatrix.formats import Format
from imatrix_runner.models.model import HubId
from imatrix_runner.models.origin import Origin, repository_in, same_name

RepoType = Literal["model", "dataset"]

MOST_BYTES = 2 << 30
"""No imatrix is larger: dense models have 1 to 15 MB, the largest mixtures 1.1 GB."""

_LEAST_BYTES = 32
_EXTENSIONS = (".imatrix", ".dat", ".gguf_file", ".gguf")
_QUANT = re.compile(r"(?<![a-z0-9])(?:i?q\d|tq\d|mxfp4|nvfp4)\w*", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.|$)")
_DECORATION = re.compile(r"(?<![a-z0-9])(?:imatrix|bf16|f16|f32|hf|dat|gguf|gguf_file)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Publisher:
    """``repos``: the names of their repositories for a model, with ``{org}`` and ``{name}`` of the model's hub id.

    A ``shared`` repository holds the matrices of many models, told apart by the files' names.
    """

    name: str
    repos: tuple[str, ...]
    repo_type: RepoType = "model"
    shared: bool = False


PUBLISHERS = (
    # 2024: without the organisation; since 2025 mostly with it, in 2026 sometimes without again.
    Publisher("bartowski", ("bartowski/{org}_{name}-GGUF", "bartowski/{name}-GGUF")),
    Publisher("mradermacher", ("mradermacher/{name}-i1-GGUF",)),
    Publisher("unsloth", ("unsloth/{name}-GGUF",)),
    Publisher("ubergarm", ("ubergarm/{name}-GGUF",)),
    Publisher("legraphista", ("legraphista/{name}-IMat-GGUF",)),
    Publisher("AesSedai", ("AesSedai/{name}-GGUF",)),
    Publisher("ikawrakow", ("ikawrakow/imatrix-from-wiki-train",), "dataset", shared=True),
)


@dataclass(frozen=True)
class PublishedPlace:
    """A repository where a publisher would put a model's imatrix."""

    repo: str
    repo_type: RepoType = "model"
    shared: bool = False


@dataclass(frozen=True)
class MatrixCandidate:
    """A file that may be the model's imatrix.

    ``size`` in bytes, None when the hub does not say; ``date`` of the repository's last change, ISO 8601. ``format`` follows
    from the name; once the file was fetched (``checked``), from its content, and then ``chunks`` is known.
    """

    repo: str
    repo_type: RepoType
    commit: str
    file: str
    size: int | None
    date: str | None
    format: Format
    checked: bool = False
    chunks: int | None = None

    @property
    def publisher(self) -> str:
        return self.repo.partition("/")[0]

    def __str__(self) -> str:
        return f"{self.repo}:{self.file}"


@dataclass(frozen=True)
class Refused:
    """A file with "imatrix" in its name that is not an imatrix, or not this model's, and why (a phrase)."""

    repo: str
    file: str
    why: str

    def __str__(self) -> str:
        return f"{self.repo}:{self.file} ({self.why})"


def places(origin: Origin) -> tuple[PublishedPlace, ...]:
    """Where each known publisher would put the imatrix of a model, and the model's own repository."""
    known = [
        PublishedPlace(repo.format(org=origin.organisation, name=origin.name), publisher.repo_type, publisher.shared)
        for publisher in PUBLISHERS
        for repo in publisher.repos
    ]
    return (*known, PublishedPlace(origin.repo))


def parse_wanted(text: str) -> HubId:
    """``REPO[:FILE]`` of ``--from``. Raises :class:`UsageError`."""
    repo, _, file = text.partition(":")
    if repository_in(repo) != repo:
        raise UsageError(
            f"{text!r} is not a repository of a hub",
            "the form is ORG/NAME or ORG/NAME:FILE",
            f"For example: --from bartowski/MODEL-GGUF, or a publisher: {', '.join(known.name for known in PUBLISHERS)}",
        )
    return HubId(repo, file=file or None)


def format_by_name(file: str) -> Format:
    """Return the format that a file's extension suggests, which may be wrong."""
    return "gguf" if file.lower().endswith((".gguf", ".gguf_file")) else "dat"


def is_named_imatrix(file: str) -> bool:
    """Whether a file's own name (not its folder's) says imatrix, and it can be one."""
    base = file.rpartition("/")[2].lower()
    return "imatrix" in base and base.endswith(_EXTENSIONS)


def refusal(file: str, size: int | None, model: str) -> str | None:
    """Why a file that is named imatrix is not worth fetching for a model of this name; None if it is."""
    base = file.rpartition("/")[2]
    if size is not None and size > MOST_BYTES:
        return f"quantised weights: {human_bytes(size)}, and no imatrix is larger than {human_bytes(MOST_BYTES)}"
    if size is not None and size < _LEAST_BYTES:
        return f"empty: {size} bytes"
    if _SHARD.search(base):
        return "quantised weights: a part of a split file"
    # Weights are only ever stored as GGUF; a .dat may carry the type of the model that it was measured with.
    if format_by_name(base) == "gguf" and (token := _QUANT.search(_without(base, model))) is not None:
        return f"quantised weights: {token[0].upper()} in the name"
    return None


def names_model(file: str, model: str) -> bool:
    """Whether a file in a shared repository is named after the model: ``llama-v2-7b.imatrix`` after ``Llama-2-7b-hf``."""
    base = _DECORATION.sub("", file.rpartition("/")[2])
    return same_name(_unversioned(base), _unversioned(_DECORATION.sub("", model)))


def _unversioned(name: str) -> str:
    return re.sub(r"(?<![a-z0-9])v(?=\d)", "", name, flags=re.IGNORECASE)


def _without(base: str, model: str) -> str:
    """A file's name without the model's own, which may hold a quant token (``gpt-oss-20b-MXFP4``)."""
    at = base.lower().find(model.lower())
    return base if at < 0 else base[:at] + base[at + len(model) :]


def made_from_another(repo: str, base: str | None, quantised_from: Sequence[str], origin: Origin) -> str | None:
    """Why a repository belongs to another model of the same name, by what its tags or its card call its base."""
    named = list(quantised_from) or ([base] if base else [])
    if not named or origin.repo.lower() in (name.lower() for name in (*named, repo)):
        return None
    return f"made from {named[0]}, another model"


def rank(candidates: Iterable[MatrixCandidate]) -> tuple[MatrixCandidate, ...]:
    """Best first: bartowski's, then GGUF before legacy, more chunks where they are known, newer, and by name."""

    def order(candidate: MatrixCandidate) -> tuple[bool, bool, int]:
        return candidate.publisher != "bartowski", candidate.format != "gguf", -(candidate.chunks or 0)

    by_name = sorted(set(candidates), key=str)
    newest_first = sorted(by_name, key=lambda candidate: candidate.date or "", reverse=True)
    return tuple(sorted(newest_first, key=order))
