"""The file beside a built calibration text that says what it was built from, and how it wants to be read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import encode_json, read_json, sha256
from imatrix_runner.untrusted import UnreadableError, as_type

SUFFIX = ".manifest.json"
_SCHEMA = "imatrix-runner/calibration-manifest"
_VERSION = 1


class SourceFacts(msgspec.Struct, frozen=True):
    """One source: what it is, and what became of its documents.

    ``share`` is its part of the text (tokens, or bytes without a tokenizer) where weights asked for ``weight``. Of ``records``
    read, ``documents`` are in the text; the others were ``bad`` (skipped), ``short``, ``duplicates``, ``near_duplicates`` of
    documents before them, ``long`` (conversations beyond the budget, which are never cut) or simply not needed.
    """

    name: str
    kind: str
    sha256: str
    licence: str
    weight: float
    share: float
    records: int
    documents: int
    bytes: int
    tokens: int | None
    bad: int = 0
    short: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    long: int = 0
    cut: int = 0
    revision: str = ""


class TemplateFacts(msgspec.Struct, frozen=True):
    """The chat template that conversations were rendered with, and the date it was told."""

    sha256: str
    origin: str
    date: str


class DocumentPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where a document lies in the text, in bytes, and its source's number."""

    offset: int
    n_bytes: int
    source: int


class Manifest(msgspec.Struct, frozen=True):
    """A built text. ``parse_special``: it was rendered with a chat template, so its control tokens are meant as such.

    ``tokens`` and ``chunks`` (of ``n_ctx`` tokens) are those of the whole text as llama-imatrix sees it with the tokenizer of
    ``model``; None where it was built without one. There is no date: the same inputs give the same manifest.
    ``held_out_sha256``: the content of the text of held-out documents, which lies next to this one (:func:`held_out_path`).
    """

    text: str
    bytes: int
    sha256: str
    parse_special: bool
    seed: int
    shuffled: bool
    aligned: bool
    n_ctx: int
    tokens: int | None
    chunks: int | None
    model: str
    template: TemplateFacts | None
    sources: tuple[SourceFacts, ...]
    documents: tuple[DocumentPlace, ...]
    schema: str = _SCHEMA
    version: int = _VERSION
    held_out_sha256: str = ""

    @property
    def fingerprint(self) -> str:
        """Stands for the text and all that is said of it; the text's file name is not part of it."""
        named = msgspec.to_builtins(msgspec.structs.replace(self, text=""))
        if not self.held_out_sha256:  # manifests of before there was one keep their fingerprints
            del named["held_out_sha256"]
        return f"sha256:{hashlib.sha256(encode_json(named)).hexdigest()}"


def manifest_path(text: Path) -> Path:
    """``medical.txt`` -> ``medical.txt.manifest.json``."""
    return text.with_name(text.name + SUFFIX)


def held_out_path(text: Path) -> Path:
    """``medical.txt`` -> ``medical.held-out.txt``."""
    return text.with_name(f"{text.stem}.held-out{text.suffix}")


def find_manifest(text: Path) -> Manifest | None:
    """What was written beside a text when it was built; None if there is nothing, or something of another program's.

    Raises :class:`InvalidDataError` for one that cannot be read. Whether it still describes the text is for :func:`describes`.
    """
    path = manifest_path(text)
    if not path.is_file():
        return None
    found = read_json(path, dict[str, Any])
    if found.get("schema") != _SCHEMA:
        return None
    if found.get("version") != _VERSION:
        raise _unusable(path, f"it is of version {str(found.get('version'))[:20]}, and {_VERSION} is known here")
    try:
        return as_type(found, Manifest)
    except UnreadableError as error:
        raise _unusable(path, str(error)) from error


def _unusable(path: Path, why: str) -> InvalidDataError:
    todo = "Build the text again, or move the manifest away to use the text alone."
    return InvalidDataError(f"{path} cannot be used", why, todo)


def describes(manifest: Manifest, text: Path) -> bool:
    """Whether the text is still the one that was built."""
    return text.stat().st_size == manifest.bytes and sha256(text) == manifest.sha256
