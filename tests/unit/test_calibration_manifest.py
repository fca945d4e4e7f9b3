"""The manifest next to a text is read back as written, told apart from other programs' files, and validated."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest

from imatrix_runner.documents.corpus import open_corpus
from imatrix_runner.documents.manifest import (
    DocumentPlace,
    Manifest,
    SourceFacts,
    TemplateFacts,
    describes,
    find_manifest,
    manifest_path,
)
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import sha256, write_json


def write_text(folder: Path, content: str = "Some words of a text.\n") -> tuple[Path, Manifest]:
    """A text and its manifest."""
    text = folder / "t.txt"
    text.write_text(content, encoding="utf-8")
    source = SourceFacts("a.jsonl", "file", "00", "not stated", 1.0, 1.0, 3, 1, 5, 2)
    manifest = Manifest(
        text=text.name,
        bytes=text.stat().st_size,
        sha256=sha256(text),
        parse_special=True,
        seed=1,
        shuffled=True,
        aligned=False,
        n_ctx=512,
        tokens=7,
        chunks=0,
        model="m.gguf",
        template=TemplateFacts("11", "of m.gguf", "2026-01-01"),
        sources=(source,),
        documents=(DocumentPlace(0, 5, 0),),
    )
    write_json(manifest_path(text), manifest)
    return text, manifest


def test_a_manifest_without_a_held_out_text_keeps_its_fingerprint(tmp_path: Path) -> None:
    """An imatrix names it: one made before held-out texts existed must still match its text."""
    _, built = write_text(tmp_path)
    fields = {name: getattr(built, name) for name in built.__struct_fields__ if name not in ("held_out_sha256", "self_made")}
    old = msgspec.defstruct("Manifest", [(name, object) for name in fields], frozen=True)(**{**fields, "text": ""})
    digest = hashlib.sha256(msgspec.json.encode(old, order="deterministic")).hexdigest()
    assert built.fingerprint == f"sha256:{digest}"
    assert msgspec.structs.replace(built, held_out_sha256="ab").fingerprint != built.fingerprint


def test_it_is_read_back_as_written(tmp_path: Path) -> None:
    text, manifest = write_text(tmp_path)
    found = find_manifest(text)
    assert found == manifest
    assert found.fingerprint == manifest.fingerprint
    assert describes(manifest, text)
    assert open_corpus(text).built == manifest


def test_the_fingerprint_follows_everything_but_the_file_s_name(tmp_path: Path) -> None:
    _, manifest = write_text(tmp_path)
    assert msgspec.structs.replace(manifest, text="other.txt").fingerprint == manifest.fingerprint
    for change in ({"seed": 2}, {"sha256": "1"}, {"documents": ()}, {"template": None}, {"parse_special": False}):
        assert msgspec.structs.replace(manifest, **change).fingerprint != manifest.fingerprint


def test_an_edited_text_is_no_longer_the_one_that_was_built(tmp_path: Path) -> None:
    text, manifest = write_text(tmp_path)
    text.write_text("Other words of a text.\n", encoding="utf-8")
    corpus = open_corpus(text)
    assert not describes(manifest, text)
    assert (corpus.edited, corpus.manifest, corpus.built) == (True, manifest, None)


def test_another_program_s_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    text, _ = write_text(tmp_path)
    for other in ({"name": "package"}, {"schema": "theirs", "version": 1}):
        manifest_path(text).write_text(json.dumps(other), encoding="utf-8")
        assert find_manifest(text) is None
        assert open_corpus(text).manifest is None


@pytest.mark.parametrize(
    "damage", [{"version": 2}, {"documents": "x"}, {"bytes": "many"}, {"sources": [{}]}, {"template": {"sha256": 3}}]
)
def test_a_damaged_one_is_refused(damage: dict[str, object], tmp_path: Path) -> None:
    text, _ = write_text(tmp_path)
    path = manifest_path(text)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | damage), encoding="utf-8")
    with pytest.raises(InvalidDataError, match="cannot be used"):
        find_manifest(text)
