"""A calibration text is checked before anything is spent on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from imatrix_runner.calibration import corpus as module
from imatrix_runner.calibration.corpus import Corpus, open_corpus, stage
from imatrix_runner.errors import InvalidDataError

TEXT = "Zwölf Boxkämpfer, 十二 → 🥊\n".encode()


def write(folder: Path, data: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(data)
    return path


def test_a_text_is_known_by_name_size_and_content(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT)
    assert open_corpus(path) == Corpus(path, "text.txt", len(TEXT), hashlib.sha256(TEXT).hexdigest())


@pytest.mark.parametrize(
    ("data", "why", "todo"),
    [
        (b"", "it is empty", "-f"),
        (b" \n\t\r\n", "it is empty", "-f"),
        (b"GGUF\0\0\0\3", "NUL bytes", "UTF-8"),
        ("Straße".encode("latin-1"), "byte 4 is not valid UTF-8", "iconv -f latin1 -t utf-8 text.txt"),
        (TEXT[:3], "byte 2 is not valid UTF-8", "iconv"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, why: str, todo: str) -> None:
    with pytest.raises(InvalidDataError, match=r"text\.txt cannot be used as calibration text") as caught:
        open_corpus(write(tmp_path, data))
    assert why in caught.value.why
    assert todo in caught.value.todo


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="it is a folder"):
        open_corpus(tmp_path)


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match=r"none\.txt: No such file"):
        open_corpus(tmp_path / "none.txt")


def test_a_text_beyond_all_reason_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", len(TEXT) - 1)
    with pytest.raises(InvalidDataError, match="larger than"):
        open_corpus(write(tmp_path, TEXT))


def test_staging_copies_every_byte(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path, TEXT))
    stage(corpus, tmp_path / "parts" / "copy.txt")
    assert (tmp_path / "parts" / "copy.txt").read_bytes() == TEXT


def test_a_text_that_changed_meanwhile_is_not_staged(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path, TEXT))
    write(tmp_path, TEXT + b"more")
    with pytest.raises(InvalidDataError, match="changed while the job was starting"):
        stage(corpus, tmp_path / "copy.txt")
    assert not (tmp_path / "copy.txt").exists()
