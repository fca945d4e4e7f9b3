"""The catalogue of public sets, and the conversion of Parquet to text."""

from __future__ import annotations

import io
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from imatrix_runner.calibration.public.catalogue import (
    SETS,
    HubSource,
    SetText,
    WantedSet,
    WebSource,
    choose_text,
    find_set,
    listed_texts,
    set_names,
)
from imatrix_runner.calibration.public.download_set import parquet_to_text
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, UsageError
from imatrix_runner.models.hub import parse_dataset
from imatrix_runner.signals import Stop


def test_every_set_can_be_typed_told_and_kept() -> None:
    assert len(set(set_names())) == len(SETS)
    for each in SETS:
        assert each.name == each.name.lower()
        assert " " not in each.name
        assert each.licence
        assert each.good_for[-1].isalnum() or each.good_for.endswith(")")
        assert urlsplit(each.origin).scheme == "https"
        if isinstance(each.source, WebSource):
            assert urlsplit(each.source.base).scheme == "https"
            assert not each.open
        else:
            assert parse_dataset(each.source.repo) is not None
        files = [text.file for text in each.texts]
        assert len(set(files)) == len(files)
        for text in each.texts:
            assert choose_text(find_set(each.named(text.name)), each.texts) == text
            assert "/" not in text.file
            assert not text.file.startswith(".")


def test_a_set_is_found_by_its_name_and_one_of_its_texts() -> None:
    assert find_set("bartowski-v3").text == ""
    wanted = find_set("eaddario:combined_en_small")
    assert (wanted.set.name, wanted.text, str(wanted)) == ("eaddario", "combined_en_small", "eaddario:combined_en_small")
    assert str(find_set("bartowski-v3:calibration_datav3")) == "bartowski-v3"
    for spelling in ("c4", "c4.utf8"):
        wanted = find_set(f"exllamav3:{spelling}")
        assert choose_text(wanted, wanted.set.texts).file == "c4.utf8"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bartowski-v2", "did you mean bartowski-v"),
        ("Bartowski", "did you mean bartowski-v"),
        ("xyz", "the sets are bartowski-v3, "),
        ("", "the sets are "),
    ],
)
def test_an_unknown_set_is_told_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_set(name)
    assert caught.value.why.startswith(hint)
    assert caught.value.todo == "List them with: imatrix-runner calibration list"


@pytest.mark.parametrize("text", ["", "../c4", "a/b", ".hidden", "c4\x1b[2J", "x" * 200])
def test_a_text_s_name_leads_nowhere_else(text: str) -> None:
    with pytest.raises(UsageError, match="has no text"):
        find_set(f"eaddario:{text}")


def test_several_texts_must_be_chosen_from() -> None:
    wanted = find_set("wikitext-2")
    with pytest.raises(UsageError) as caught:
        choose_text(wanted, wanted.set.texts)
    assert (caught.value.what, caught.value.why) == ("wikitext-2 has several texts", "train, validation, test")
    assert caught.value.todo == "Name one of them, for example: wikitext-2:train"
    with pytest.raises(UsageError) as caught:
        choose_text(WantedSet(wanted.set, "trian"), wanted.set.texts)
    assert caught.value.todo == "Name one that it has, for example: wikitext-2:train"


def test_an_open_set_has_what_its_repository_lists() -> None:
    chosen = find_set("froggeric").set
    assert isinstance(chosen.source, HubSource)
    names = [
        "README.md",
        "README.txt",
        ".gitattributes",
        "technical.txt",
        "wiki.train.raw",
        "c4.utf8",
        "c4.txt",
        "sub/x.txt",
        "a b.txt",
    ]
    found = listed_texts(chosen, [(name, 5) for name in names])
    assert [(text.name, text.file) for text in found] == [
        ("technical", "technical.txt"),
        ("wiki.train.raw", "wiki.train.raw"),
        ("c4.utf8", "c4.utf8"),
        ("c4", "c4.txt"),
    ]
    tables = listed_texts(find_set("eaddario").set, [("tools_micro.parquet", 7), ("notes.txt", 7)])
    assert tables == (SetText("tools_micro", "tools_micro.parquet", "tools_micro.txt"),)
    with pytest.raises(UsageError, match="froggeric has several texts"):
        choose_text(WantedSet(chosen), found[:1])


# Parquet


def table(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def text_of(path: Path, rows: str = "documents", limit: int = 1 << 20) -> tuple[str, int]:
    out = io.BytesIO()
    count = parquet_to_text(path, out, rows=rows, limit=limit, check=lambda: None)  # type: ignore[arg-type]
    return out.getvalue().decode(), count


def test_documents_are_separated_by_one_blank_line(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", n=[1, 2, 3, 4], content=["  One.\nTwo.\n\n", None, " \n", "Drei ü.\r\nVier."])
    assert text_of(path) == ("One.\nTwo.\n\nDrei ü.\r\nVier.\n", 2)
    assert text_of(path) == text_of(path)


def test_lines_are_written_as_wikitext_s_own_files_have_them(tmp_path: Path) -> None:
    path = table(
        tmp_path / "wiki.parquet", text=["", " = Robert Boulter = \n", "", " Robert Boulter is an actor . \n", "no end"]
    )
    assert text_of(path, "lines") == (" \n = Robert Boulter = \n \n Robert Boulter is an actor . \nno end\n", 5)


def test_the_column_is_text_or_content_or_the_only_one_of_texts(tmp_path: Path) -> None:
    assert text_of(table(tmp_path / "a.parquet", title=["t"], text=["x"]))[0] == "x\n"
    assert text_of(table(tmp_path / "b.parquet", prompt=["x"], n=[1]))[0] == "x\n"
    for path in (table(tmp_path / "c.parquet", a=["x"], b=["y"]), table(tmp_path / "d.parquet", text=[1])):
        with pytest.raises(InvalidDataError, match="cannot be converted to text"):
            text_of(path)


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_what_is_no_parquet_is_told(tmp_path: Path, damage: str) -> None:
    path = table(tmp_path / "a.parquet", text=["something"] * 1000)
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "other": b"<!DOCTYPE html>", "empty": b""}[damage])
    with pytest.raises(InvalidDataError) as caught:
        text_of(path)
    assert caught.value.what == "a.parquet cannot be converted to text"
    assert "cannot be read as Parquet" in caught.value.why


def test_a_small_file_cannot_become_a_large_text(tmp_path: Path) -> None:
    # A dictionary names the long string once; announced and real lengths differ by four orders of magnitude.
    path = table(tmp_path / "bomb.parquet", text=["x" * 10_000] * 10_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(InvalidDataError, match="is too large"):
        text_of(path)
    plain = tmp_path / "plain.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 10_000] * 1000}), plain, use_dictionary=False, compression="zstd")
    with pytest.raises(InvalidDataError, match="is too large"):
        text_of(plain)
    with pytest.raises(InvalidDataError, match="is empty"):
        text_of(table(tmp_path / "none.parquet", text=["", None]))


def test_a_stop_is_heard_between_rows(tmp_path: Path) -> None:
    stop = Stop()
    stop.request()
    path = table(tmp_path / "a.parquet", text=["x"])
    with pytest.raises(InterruptedRunError):
        parquet_to_text(path, io.BytesIO(), rows="documents", limit=100, check=stop.check)
