"""A calibration text is checked before anything is computed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from imatrix_runner.documents import corpus as module
from imatrix_runner.documents.corpus import Corpus, open_corpus, raw_warnings, stage
from imatrix_runner.documents.raw_text import SINGLE_MESSAGES, WITH_MESSAGES
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
        (b"GGUF\0\0\0\3", "it is a GGUF", "as MODEL"),
        (b"\x7fELF\0\0\0\3", "NUL bytes", "UTF-8"),
        ("Straße".encode("latin-1"), "byte 4 is not valid UTF-8", "iconv -f latin1 -t utf-8 text.txt"),
        (TEXT[:3], "byte 2 is not valid UTF-8: it ends in the middle of a character", "iconv -c"),
        ("It’s – quoted".encode("cp1252"), "byte 2 is not valid UTF-8", "Windows-1252): iconv -f cp1252 -t utf-8 text.txt"),
        ("Zwölf".encode("utf-16"), "it is UTF-16", "iconv -f UTF-16 -t UTF-8"),
        (
            "Zwölf lines, of text\n".encode("utf-16-le"),
            "UTF-16, without a byte order mark",
            "iconv -f UTF-16LE -t UTF-8 text.txt",
        ),
        (
            "Zwölf lines, of text\n".encode("utf-16-be"),
            "UTF-16, without a byte order mark",
            "iconv -f UTF-16BE -t UTF-8 text.txt",
        ),
        ("Zwölf".encode("utf-32"), "it is UTF-32", "iconv -f UTF-32"),
        (b"%PDF-1.7\n", "it is a PDF", "pdftotext"),
        (b"PK\x03\x04" + bytes(30), "document that is one", "pandoc -t plain"),
        (b"\xd0\xcf\x11\xe0" + bytes(30), "old office document", "catdoc"),
        (b"{\\rtf1\\ansi Hello}", "RTF", "unrtf"),
        (b"\x1f\x8b\x08\0", "compressed with gzip", "gunzip --keep"),
        (b"PAR1" + bytes(30), "a Parquet table", "imatrix-runner calibration build"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, why: str, todo: str) -> None:
    with pytest.raises(InvalidDataError, match=r"text\.txt cannot be used as calibration text") as caught:
        open_corpus(write(tmp_path, data))
    assert why in caught.value.why
    assert todo in caught.value.todo


def test_a_folder_is_refused_with_the_command_that_makes_a_text_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "my notes"
    folder.mkdir()
    with pytest.raises(InvalidDataError, match="it is a folder") as caught:
        open_corpus(folder)
    assert f"imatrix-runner calibration build '{folder}' -o 'my notes.txt' --model MODEL" in caught.value.todo


@pytest.mark.parametrize(
    ("name", "data", "records"),
    [
        (
            "d.jsonl",
            '{"role": "user", "content": "Hi"}\n{"role": "assistant", "content": "Ho"}\n',
            SINGLE_MESSAGES,
        ),
        (
            "d.txt",
            '\ufeff\n{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": []}\n',
            WITH_MESSAGES[1],
        ),
        ("d.txt", '{"text": "a"}\r\n{"text": "b"}\r\n', "JSON lines"),
        ("d.json", '[\n  {"text": "a"}\n]', "JSON"),
        ("d.json", '{"text": "one line"}', "JSON"),
        ("d.html", "<!DOCTYPE html>\n<p>", "HTML"),
        ("d.csv", "text,label\na,b\n", "CSV"),
        ("d.tsv", "text\tlabel\n", "tab-separated values"),
        ("d.txt", "text,label\n", ""),
        ("d.txt", "{braces} are text\nand [brackets] too\n", ""),
        ("d.txt", "[INST] What? [/INST]", ""),
    ],
)
def test_records_of_a_data_set_are_noticed(name: str, data: str, records: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data.encode())
    corpus = open_corpus(path)
    assert corpus.records == records
    shown = raw_warnings(corpus, Path("/m/my model.gguf"), has_template=True)
    assert len(shown) == (1 if records or corpus.crlf else 0)
    if records:
        out = "d.txt" if name != "d.txt" else "d-built.txt"
        assert shown[0].endswith(f"calibration build {path} -o {out} --model '/m/my model.gguf'")


def test_without_a_chat_template_the_texts_are_offered(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for line, further in (
        ('{"id": "7", "role": "user", "content": "Hi"}', " --field content"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', " --chat-template-file FILE"),
        ('{"text": "Hi"}', " --model m.gguf"),
    ):
        path.write_text(f"{line}\n{line}\n")
        (shown,) = raw_warnings(open_corpus(path), Path("m.gguf"), has_template=False)
        assert shown.endswith(further)


def test_line_ends_of_windows_are_noticed(tmp_path: Path) -> None:
    (shown,) = raw_warnings(open_corpus(write(tmp_path, b"a\r\nb\r\n")), Path("m.gguf"), has_template=True)
    assert "CRLF" in shown


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
