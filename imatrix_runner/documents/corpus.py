"""Opens a calibration text and checks it before anything is computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.documents.manifest import Manifest, find_manifest
from imatrix_runner.documents.raw_text import SINGLE_MESSAGES, WITH_MESSAGES, build_command, not_text, records_in
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.files import atomic_writer

_MAX_BYTES = 1 << 30

# Beginnings of the control tokens of most chat templates; the tokenizer decides whether they are tokens.
_MARKS = (b"<|", "<｜".encode(), b"<start_of_turn>", b"[INST]", b"<bos>", b"</s>")

FEW_CHUNKS = 100
"""Below this number of chunks an imatrix is noisy; published ones use 125 to 300."""


@dataclass(frozen=True)
class Corpus:
    """A text file: its path, its name in the imatrix's ``datasets``, its size and content hash.

    ``manifest``: what ``calibration build`` wrote next to it; ``edited``: the text has changed since. ``marked``: it seems to
    contain control tokens of a chat template. ``records``: what it contains instead of running text (``JSON lines``), else
    empty; ``crlf``: it has Windows line ends.
    """

    path: Path
    name: str
    n_bytes: int
    sha256: str
    manifest: Manifest | None = None
    edited: bool = False
    marked: bool = False
    records: str = ""
    crlf: bool = False

    @property
    def built(self) -> Manifest | None:
        """The manifest if it still describes the text, else None."""
        return None if self.edited else self.manifest


def open_corpus(path: Path, *, role: str = "calibration text", option: str = "-f") -> Corpus:
    """Check that ``path`` is a text that a model can process.

    ``role`` and ``option`` name the file's purpose and its option in messages. Raises :class:`InvalidDataError`.
    """
    try:
        if path.is_dir():
            why = "it is a folder"
            raise _bad(path, role, why, f"Give a text file with {option}, or build one from it: {build_command(path)}")
        if path.stat().st_size > _MAX_BYTES:
            why = f"it is larger than {_MAX_BYTES >> 30} GiB"
            raise _bad(path, role, why, "A few hundred kilobytes are enough: give a part of it.")
        data = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, f"reading the {role}", path) from error
    if not data.strip():
        raise _bad(path, role, "it is empty", f"Omit {option} to use the text that is shipped with imatrix-runner.")
    if (other := not_text(path, data, option)) is not None:
        raise _bad(path, role, other.why, other.todo)
    digest = hashlib.sha256(data).hexdigest()
    manifest = find_manifest(path)
    edited = manifest is not None and manifest.sha256 != digest
    marked = any(mark in data for mark in _MARKS)
    return Corpus(path, path.name, len(data), digest, manifest, edited, marked, records_in(path, data), b"\r\n" in data)


def raw_warnings(corpus: Corpus, model: Path, *, has_template: bool) -> list[str]:
    """Warnings about records or line ends that a model would read as plain text, each with the command that helps.

    ``has_template``: the model has a chat template, which rendering dialogues needs.
    """
    if corpus.manifest is not None:
        return []
    command = build_command(corpus.path, model)
    if corpus.records:
        how = "calibration build extracts their text"
        if corpus.records in WITH_MESSAGES:
            how = "calibration build renders them with the model's chat template"
            if not has_template:
                how = "the model has no chat template, but calibration build can take the texts (or --chat-template-file FILE)"
                command += " --field content" if corpus.records == SINGLE_MESSAGES else " --chat-template-file FILE"
        return [f"{corpus.name} contains {corpus.records}, and the model would see their syntax; {how}: {command}"]
    if corpus.crlf:
        return [
            f"{corpus.name} has Windows line ends (CRLF), which become tokens that models rarely see. To remove them: {command}"
        ]
    return []


def stage(corpus: Corpus, target: Path) -> None:
    """Copy the text to where a long job reads it, so that an edit meanwhile cannot mix two texts in one imatrix."""
    data = corpus.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != corpus.sha256:
        raise InvalidDataError(
            f"{corpus.path} cannot be used", "it changed while the job was starting", "Run the same command again."
        )
    with atomic_writer(target) as handle:
        handle.write(data)


def _bad(path: Path, role: str, why: str, todo: str) -> InvalidDataError:
    return InvalidDataError(f"{path} cannot be used as {role}", why, todo)
