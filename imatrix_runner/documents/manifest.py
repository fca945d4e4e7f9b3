"""The manifest, the file next to a built calibration text that records its sources and how to tokenise it."""

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
    """One source, and counts of its documents by outcome.

    ``weight``: as requested; ``share``: its actual fraction of the text (in tokens, or bytes without a tokenizer). Of
    ``records`` read, ``documents`` are in the text, ``cut`` of them without their end. The others were ``bad``
    (skipped), ``short``, ``duplicates`` or ``near_duplicates`` of earlier documents, ``long`` (conversations beyond the budget,
    which are never cut), or not needed.
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
    """The chat template that conversations were rendered with, and the date that it saw."""

    sha256: str
    origin: str
    date: str


class SelfFacts(msgspec.Struct, frozen=True):
    """How the answers of a model in a text came about. ``model``: its content hash; ``prompts``: that of the file of prompts;
    ``answers``: how many are in the text, of them ``sampled`` at ``temperature`` and ``top_p`` with the manifest's seed, the
    others greedy; ``empty``: prompts without an answer; ``n_predict``: most tokens of an answer."""

    model: str
    prompts: str
    engine: str
    answers: int
    sampled: int
    empty: int
    seed: int
    temperature: float
    top_p: float
    n_predict: int


class DocumentPlace(msgspec.Struct, frozen=True, array_like=True):
    """Place of a document in the text, in bytes, and the index of its source."""

    offset: int
    n_bytes: int
    source: int


class Manifest(msgspec.Struct, frozen=True):
    """A built text. ``parse_special``: its control tokens are to be parsed, because it was rendered with a chat template or its
    documents are aligned to chunks.

    ``tokens`` and ``chunks`` (of ``n_ctx`` tokens) count the whole text as llama-imatrix sees it with the tokenizer of
    ``model``; None if it was built without one. There is no date: the same inputs give the same manifest. ``held_out_sha256``:
    of the text of held-out documents next to this one (:func:`held_out_path`); empty if there is none. ``self_made``: of the
    answers of a model in it.
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
    self_made: SelfFacts | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest, and so of the text's content. The text's file name is not part of it."""
        named = msgspec.to_builtins(msgspec.structs.replace(self, text=""))
        if not self.held_out_sha256:  # so that manifests older than this field keep their fingerprints
            del named["held_out_sha256"]
        if self.self_made is None:
            del named["self_made"]
        return f"sha256:{hashlib.sha256(encode_json(named)).hexdigest()}"


def manifest_path(text: Path) -> Path:
    """``medical.txt`` -> ``medical.txt.manifest.json``."""
    return text.with_name(text.name + SUFFIX)


def held_out_path(text: Path) -> Path:
    """``medical.txt`` -> ``medical.held-out.txt``."""
    return text.with_name(f"{text.stem}.held-out{text.suffix}")


def find_manifest(text: Path) -> Manifest | None:
    """The manifest next to a text; None if there is none, or only a file of another program.

    Raises :class:`InvalidDataError` for an unreadable one. :func:`describes` checks whether it still describes the text.
    """
    path = manifest_path(text)
    if not path.is_file():
        return None
    found = read_json(path, dict[str, Any])
    if found.get("schema") != _SCHEMA:
        return None
    if found.get("version") != _VERSION:
        raise _unusable(path, f"it has version {str(found.get('version'))[:20]}, and this program knows version {_VERSION}")
    try:
        return as_type(found, Manifest)
    except UnreadableError as error:
        raise _unusable(path, str(error)) from error


def _unusable(path: Path, why: str) -> InvalidDataError:
    todo = "Build the text again, or move the manifest away to use the text alone."
    return InvalidDataError(f"{path} cannot be used", why, todo)


def describes(manifest: Manifest, text: Path) -> bool:
    """Whether the text still has the size and SHA-256 in the manifest."""
    return text.stat().st_size == manifest.bytes and sha256(text) == manifest.sha256
