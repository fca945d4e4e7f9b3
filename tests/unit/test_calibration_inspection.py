"""Every figure about a text equals that of a simple count, whatever the block size."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from pathlib import Path

import pytest

from imatrix_runner.calibration.inspect import inspection as module
from imatrix_runner.calibration.inspect.inspection import TextFacts, inspect_text
from imatrix_runner.documents import blocks
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from support.tiny_models import sample_text


def inspected(folder: Path, text: str | bytes, **options: object) -> TextFacts:
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return inspect_text(path, **options)  # type: ignore[arg-type]


@pytest.fixture(params=[64, 1000, 1 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of bytes read at a time; the figures must not depend on it."""
    monkeypatch.setattr(blocks, "_BLOCK", request.param)
    return int(request.param)


MIXED = "Straße 12\r\nzwei\n\n十二 →\t🥊 \nlast line without an end"


def test_sizes_are_those_of_the_text(tmp_path: Path, block: int) -> None:
    text = (MIXED + "\n") * 40 + MIXED
    facts = inspected(tmp_path, text)
    data = text.encode()
    assert (facts.n_bytes, facts.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (facts.n_characters, facts.n_words) == (len(text), len(text.split()))
    assert facts.n_lines == text.count("\n") + 1
    assert facts.compression == pytest.approx(len(data) / len(zlib.compress(data, 9)), rel=0.05)
    assert (facts.encoding.crlf, facts.encoding.lf, facts.encoding.cr) == (41, text.count("\n") - 41, 0)


def test_facts_of_the_shipped_text_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    path = resource(CALIBRATION_TEXT)
    whole = inspect_text(path)
    monkeypatch.setattr(blocks, "_BLOCK", 5000)
    progress: list[int] = []
    assert inspect_text(path, on_bytes=progress.append) == whole
    assert len(progress) > 30
    assert progress == sorted(progress)
    assert progress[-1] == path.stat().st_size


def test_the_shipped_text_is_what_it_claims() -> None:
    facts = inspect_text(resource(CALIBRATION_TEXT))
    assert facts.domain_kind == "part"
    assert {"science-prose", "fiction", "code", "languages"} <= {domain.name for domain in facts.domains}
    assert sum(domain.share for domain in facts.domains) == pytest.approx(1)
    assert (facts.lines.repeated, facts.near.repeated) == (0, 0)
    assert facts.near.all_compared
    assert 2.0 <= facts.compression <= 2.6
    assert len([script for script in facts.scripts if script.letters >= 100]) >= 6
    assert len([language for language in facts.languages if len(language.code) == 2]) >= 12
    assert facts.similarities[0].cosine < 0.5 < facts.similarities[-1].cosine


def test_parts_are_labelled_and_what_stands_before_them_is_none(tmp_path: Path, block: int) -> None:
    text = "licence\n\n=== part: one ===\nA b c.\n\nD e f.\n=== part: two ===\n\nG h i.\n=== no label ===\n"
    facts = inspected(tmp_path, text)
    assert [(domain.name, domain.n_bytes) for domain in facts.domains] == [("one", 14), ("two", 24)]
    assert facts.domain_kind == "part"
    assert facts.n_passages == 4


def test_documents_say_which_source_a_passage_is_of(tmp_path: Path) -> None:
    text = "A a.\n\n=== part: x ===\n\nB b.\n\nC c."
    documents = [(28 - 5, 4, "second"), (0, 21, "first"), (29, 4, "second")]
    facts = inspected(tmp_path, text, documents=documents)
    assert facts.domain_kind == "source"
    assert facts.n_documents == facts.n_examples == 3
    assert [domain.name for domain in facts.domains] == ["first", "second"]


def test_documents_without_blank_lines_between_them_are_passages_of_their_own(tmp_path: Path) -> None:
    chats = [f"<|im_start|>user\nQuestion number {number}?<|im_end|>\n" for number in range(5)]
    offsets = [sum(map(len, chats[:number])) for number in range(5)]
    documents = [(offset, len(chat), "chats") for offset, chat in zip(offsets, chats, strict=True)]
    assert inspected(tmp_path, "".join(chats), documents=documents).n_passages == 5
    assert inspected(tmp_path, "".join(chats)).n_passages == 1


def test_a_fenced_block_is_one_passage(tmp_path: Path) -> None:
    facts = inspected(tmp_path, "Prose.\n\n```python\na = 1\n\nb = 2\n```\n\nMore prose with ```code``` in it.\n\nEnd.\n")
    assert facts.n_passages == facts.n_examples == 4


def test_a_fence_that_is_never_closed_does_not_swallow_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PASSAGE", 200)
    facts = inspected(tmp_path, "```\n" + "".join(f"paragraph {number}\n\n" for number in range(100)))
    assert facts.n_passages > 80


def test_repeated_lines_and_passages_are_counted(tmp_path: Path, block: int) -> None:
    first = "This line comes twice.\nThis one does not, it is alone."
    text = f"{first}\n\n}}\n\n}}\n\nThis line comes twice.\nAnd something else is below it.\n\n{first}\n"
    facts = inspected(tmp_path, text)
    assert (facts.lines.n, facts.lines.repeated) == (6, 3)
    assert facts.lines.examples == (("This line comes twice.", 3), ("This one does not, it is alone.", 2))
    assert facts.lines.share == pytest.approx((23 + 23 + 32) / len(text))
    assert (facts.passages.n, facts.passages.repeated) == (3, 1)


def test_marks_of_a_template_are_no_repetition(tmp_path: Path) -> None:
    turns = "".join(f"<|im_start|>user\nQuestion number {number}?<|im_end|>\n<|im_start|>assistant\n" for number in range(9))
    facts = inspected(tmp_path, turns + "<|im_start|>system\nYou are a helpful keeper.<|im_end|>\n" * 2)
    assert (facts.lines.n, facts.lines.repeated) == (11, 1)
    assert facts.lines.examples == (("You are a helpful keeper.<|im_end|>", 2),)


def test_nearly_equal_passages_are_found_and_shown(tmp_path: Path) -> None:
    prose = sample_text(900).replace("\n", " ")
    facts = inspected(tmp_path, f"{prose}\n\nSomething else entirely.\n\n{prose} The end.\n")
    assert (facts.near.n, facts.near.repeated, facts.near.all_compared) == (3, 1, True)
    assert facts.near.share == pytest.approx(0.5, abs=0.05)
    ((later, earlier),) = facts.near.examples
    assert later == earlier
    assert len(later) == 80
    assert facts.passages.repeated == 0


def test_of_many_passages_only_the_first_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_COMPARED", 10)
    text = "\n\n".join(f"Paragraph number {number} is here." for number in range(30))
    facts = inspected(tmp_path, text)
    assert (facts.near.n, facts.near.all_compared) == (10, False)


def test_of_a_long_text_an_even_sample_tells_the_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english = "The keeper writes down the wind and the height of the waves every single morning of the year."
    german = "Der Wärter schreibt jeden Morgen den Wind und die Höhe der Wellen in sein altes Buch hinein."
    monkeypatch.setattr(module, "_GUESSED_BYTES", 10_000)
    facts = inspected(tmp_path, "\n\n".join([english] * 600 + [german] * 600))
    assert facts.guessed == pytest.approx(10_000, rel=0.05)
    assert {language.code: round(language.share, 1) for language in facts.languages} == {"en": 0.5, "de": 0.5}


def test_damage_is_counted(tmp_path: Path, block: int) -> None:
    good = "Façade, naïve, Ångström, AMANHÃ, Âme. "
    bad = "dÃ©jÃ\xa0 vu, Itâ€™s 5Â\xa0km, cafÃ© "
    facts = inspected(tmp_path, f"\ufeff{good}\r{bad}\ufffd \x07\x1b[0m\x85\tend\n")
    encoding = facts.encoding
    assert encoding.bom
    assert (encoding.cr, encoding.lf) == (1, 1)
    assert encoding.replaced == 1
    assert encoding.controls == 3
    assert encoding.mojibake == 5
    assert "dÃ©jÃ" in encoding.mojibake_example
    assert encoding.mojibake_example.isprintable()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf \r\n", "it is empty"),
        (b"text\n" * 300 + b"\0", r"binary file \(NUL at byte 1500\)"),
        ("Straße\n".encode("latin-1"), r"byte 4 \(line 1\) is not valid UTF-8"),
        (b"good line\n" * 200 + b"bad \xff line", r"byte 2004 \(line 201\) is not valid UTF-8"),
        ("text".encode("utf-16"), "is UTF-16"),
        ("Ende: ü".encode()[:-1], r"byte 6 \(line 1\) is not valid UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, why: str, block: int) -> None:
    with pytest.raises(InvalidDataError, match=r"text\.txt cannot be used as calibration text") as caught:
        inspected(tmp_path, data)
    assert re.search(why, caught.value.why)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_folder_a_pipe_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("", "it is a folder"), ("pipe", "not a regular file"), ("none.txt", "No such file")):
        with pytest.raises(InvalidDataError, match=why):
            inspect_text(tmp_path / name)


def test_a_text_beyond_all_reason_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_BYTES", 10)
    with pytest.raises(InvalidDataError, match="larger than"):
        inspected(tmp_path, "eleven bytes")


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 2500, "字" * 3000, ("y" * 300 + " ") * 20, "\n" + "z" * 5000])
def test_lines_without_an_end_are_read_in_pieces(tmp_path: Path, text: str, block: int) -> None:
    facts = inspected(tmp_path, text)
    assert facts.n_characters == len(text)
    assert facts.n_words == len(text.split())
    assert facts.n_lines == text.count("\n") + 1
