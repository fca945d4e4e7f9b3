"""Attestations: an in-toto Statement that a file derives from its source, as ``ggufpacker`` writes and checks them.

The statement is not signed. It says: this recipe, with this source and this matrix, gives a file of this SHA-256. Anybody can
check that by making the file again; a statement that was edited does not survive it. The predicate knows llama-quantize's type
and the types of two tensors; other recipes cannot be said in it. Format: ggufpacker's docs/derivation-attestation.md (0.4).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from imatrix_runner import __version__
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import atomic_writer, read_json

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://github.com/theadamdanielsson/ggufpacker/attestation/gguf-derivation/v0"
EVIDENCE = "https://github.com/ggml-org/llama.cpp/pull/25353"
ENDING = ".derivation.json"

_HEX = re.compile(r"[0-9a-f]{64}")
_TYPE = re.compile(r"[A-Za-z0-9_]{1,32}")
_MOST_BYTES = 1 << 20


class AttestedFile(msgspec.Struct, frozen=True):
    """A file of a statement: its bare name and ``digest["sha256"]``."""

    name: str
    digest: dict[str, str]

    @property
    def sha256(self) -> str:
        return self.digest.get("sha256", "")


class AttestedRecipe(msgspec.Struct, frozen=True, rename="camel"):
    """llama-quantize's type, those of two tensors where they were given, and the matrix."""

    quant_type: str
    use_imatrix: bool = False
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    imatrix: AttestedFile | None = None


class Rederived(msgspec.Struct, frozen=True, rename="camel"):
    """``deterministic``: the attester says that its build gives the same bytes on other machines."""

    deterministic: bool = False
    re_derived_digest: dict[str, str] | None = None


class _Predicate(msgspec.Struct, frozen=True, rename="camel"):
    base_model: AttestedFile
    recipe: AttestedRecipe
    builder: dict[str, Any]
    reproducibility: Rederived
    attested_by: str = ""
    produced_at: str = ""


class Statement(msgspec.Struct, frozen=True):
    """A statement as it is read. Fields that are not named here are left unread."""

    type: str = msgspec.field(name="_type")
    subject: tuple[AttestedFile, ...]
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: _Predicate

    @property
    def file(self) -> AttestedFile:
        return self.subject[0]

    @property
    def source(self) -> AttestedFile:
        return self.predicate.base_model

    @property
    def recipe(self) -> AttestedRecipe:
        return self.predicate.recipe


@dataclass(frozen=True)
class HashedFile:
    """A file by its bare name, content and size."""

    name: str
    sha256: str
    n_bytes: int

    def content(self) -> dict[str, Any]:
        return {"name": self.name, "digest": {"sha256": self.sha256}, "sizeBytes": self.n_bytes}


@dataclass(frozen=True)
class SayableRecipe:
    """A recipe that the predicate can express; empty types: llama-quantize's own choice."""

    ftype: str
    token_embedding_type: str = ""
    output_tensor_type: str = ""


@dataclass(frozen=True)
class BuildIdentity:
    """What computed: the engine's words, and the SHA-256 over its libraries. ``contract``: the compiler's ``-ffp-contract``,
    where it is known; only with ``off`` other machines are sure to compute the same."""

    words: str
    digest: str
    contract: str = ""


def make_statement(
    file: HashedFile, source: HashedFile, recipe: SayableRecipe, imatrix: HashedFile | None, build: BuildIdentity
) -> bytes:
    """The statement that ``file`` was derived just now. The caller has proven it."""
    words = ["llama-quantize", *(("--imatrix", imatrix.name) if imatrix is not None else ())]
    said: dict[str, Any] = {
        "quantType": recipe.ftype,
        "outputFormat": "gguf",
        "useImatrix": imatrix is not None,
    }
    for key, option, kind in (
        ("tokenEmbeddingType", "--token-embedding-type", recipe.token_embedding_type),
        ("outputTensorType", "--output-tensor-type", recipe.output_tensor_type),
    ):
        if kind:
            words += [option, kind]
            said[key] = kind
    said["command"] = " ".join([*words, "<baseModel>", "<output>", recipe.ftype])
    if imatrix is not None:
        said["imatrix"] = imatrix.content()
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": file.name, "digest": {"sha256": file.sha256}}],
        "predicateType": PREDICATE,
        "predicate": {
            "baseModel": source.content(),
            "recipe": said,
            "builder": {
                "tool": "imatrix-runner",
                "buildIdentity": {
                    "binarySha256": build.digest,
                    "versionBanner": build.words,
                    **({"fpContract": build.contract} if build.contract else {}),
                },
            },
            "reproducibility": {
                "deterministic": build.contract == "off",
                "determinismEvidence": EVIDENCE,
                "reDerivedDigest": {"sha256": file.sha256},
            },
            "attestedBy": f"imatrix-runner {__version__}",
            "producedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    return msgspec.json.format(msgspec.json.encode(statement), indent=1) + b"\n"


def write_statement(path: Path, content: bytes) -> None:
    with atomic_writer(path) as file:
        file.write(content)


def read_statement(path: Path) -> Statement:
    """Read and check a statement. Names are bare, digests whole, types are words: nothing else reaches a path or a command.

    Raises :class:`InvalidDataError`.
    """
    found = read_json(path, Statement, limit=_MOST_BYTES)
    if found.type != STATEMENT or found.predicate_type != PREDICATE:
        raise _bad(
            path, f"it is a {found.predicate_type[:80]!r}, not a derivation of a GGUF", "Give one made by ggufpacker or audit."
        )
    if len(found.subject) != 1:
        raise _bad(path, f"it is about {len(found.subject)} files")
    recipe = found.recipe
    named = [found.file, found.source, *([recipe.imatrix] if recipe.imatrix is not None else [])]
    for each in named:
        if (
            not each.name
            or each.name in (".", "..")
            or re.search(r"[/\\\x00-\x1f]", each.name)
            or each.name != each.name.strip()
        ):
            raise _bad(path, f"{each.name[:60]!r} is not the bare name of a file")
        if not _HEX.fullmatch(each.sha256):
            raise _bad(path, f"{each.name} has no SHA-256")
    if recipe.use_imatrix != (recipe.imatrix is not None):
        raise _bad(path, "its recipe does not say with which imatrix")
    kinds = (recipe.quant_type, recipe.token_embedding_type, recipe.output_tensor_type)
    if odd := next((kind for kind in kinds if kind is not None and not _TYPE.fullmatch(kind)), None):
        raise _bad(path, f"{odd[:40]!r} is not the name of a type")
    again = found.predicate.reproducibility.re_derived_digest
    if again is not None and again.get("sha256") != found.file.sha256:
        raise _bad(path, "the digest of what was derived is not that of the file: the statement contradicts itself")
    return found


def require_files(path: Path, wanted: dict[str, tuple[AttestedFile, HashedFile | None]]) -> None:
    """Raise :class:`InvalidDataError` if a file is not the one that the statement ``path`` is about. ``wanted``: what each is,
    in words, the file of the statement, and the one that is here (None: it is missing)."""
    for what, (said, here) in wanted.items():
        if here is None:
            raise _bad(path, f"{what} {said.name} is not here", f"Give it; its SHA-256 is {said.sha256}.")
        if said.sha256 != here.sha256:
            why = f"{what} has the SHA-256 {here.sha256[:16]}…, the statement says {said.sha256[:16]}… ({said.name})"
            raise _bad(path, why, "The file or the statement was changed, or belongs to another: get both again.")


def refuted(path: Path, statement: Statement, got: str) -> InvalidDataError:
    why = f"made again, the file has the SHA-256 {got[:16]}…, the statement says {statement.file.sha256[:16]}…"
    return _bad(path, why, "The statement was edited, or its library computes otherwise than this one: see docs/audit.md.")


def _bad(
    path: Path, why: str, todo: str = "It was edited or damaged: get it again, or audit the file without it."
) -> InvalidDataError:
    return InvalidDataError(f"The attestation {path.name} is refused", why, todo)
