"""Every kind of source is read as documents, each with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imatrix_runner.documents.csv_rows import csv_rows
from imatrix_runner.documents.documents import BadRecord, Conversation, DocumentRecord, Row
from imatrix_runner.documents.json_rows import json_rows
from imatrix_runner.documents.records import read_source, source_bytes, source_files, spool_stdin
from imatrix_runner.errors import InvalidDataError, UsageError

HELLO = [{"role": "user", "content": "Grüß dich"}, {"role": "assistant", "content": "Hello! 🥊"}]
RECORDS = [{"text": "one"}, {"messages": HELLO}, {"text": "three\n\nlines"}]
EXPECTED = ["one", Conversation(tuple(HELLO)), "three\n\nlines"]


@dataclass(frozen=True)
class Unfit:
    why: str
    todo: str


def interpret(row: Mapping[str, Any]) -> str | Conversation | Unfit:
    if row.get("messages") is not None:
        return Conversation(tuple(row["messages"]))
    text = row.get("text")
    return text if isinstance(text, str) else Unfit("it has no field `text`", "Name one with --field.")


def read(path: Path, **options: Any) -> list[DocumentRecord | BadRecord]:
    return list(read_source(path, interpret, **options))


def contents(path: Path) -> list[Any]:
    found = read(path)
    assert all(isinstance(each, DocumentRecord) for each in found), found
    return [each.content for each in found if isinstance(each, DocumentRecord)]


def places(path: Path) -> list[str]:
    return [each.where.removeprefix(f"{path}").removeprefix(", ") for each in read(path)]


def written(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines_of(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


# -- texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.unheard-of", "README"])
def test_a_text_is_cut_into_passages_with_their_lines(name: str, tmp_path: Path) -> None:
    sentence = "One tide follows another. " * 30
    path = written(tmp_path / name, f"\n{sentence}\r\n\r\n{sentence}\n\n{sentence}\n\nThe end.")
    assert contents(path) == [f"{sentence}\n\n{sentence}\n\n{sentence}", "The end."]
    assert places(path) == ["line 2", "line 8"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, data in (
        ("a.txt", "word"),
        ("a.jsonl", '{"text": "word"}'),
        ("a.json", '[{"text": "word"}]'),
        ("a.csv", "text\nword"),
    ):
        assert contents(written(tmp_path / name, "\ufeff" + data)) == ["word"]


def test_source_code_stays_whole_up_to_a_limit(tmp_path: Path) -> None:
    short = "import os\n\n\ndef f():\n    pass\n" * 100
    assert contents(written(tmp_path / "a.py", short)) == [short.rstrip()]
    assert len(contents(written(tmp_path / "b.py", short * 12))) > 1
    assert len(contents(written(tmp_path / "c.txt", short))) > 1


def test_a_crlf_between_two_blocks_is_one_line_end(tmp_path: Path) -> None:
    for before in range((1 << 18) - 3, (1 << 18) + 2):
        path = written(tmp_path / "a.py", b"x" * before + b"\r\n" + "é".encode() + b"\r")
        assert "".join(contents(path)).replace("\n", "") == "x" * before + "é\r"


def test_another_name_is_shown(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "x"}\n')
    assert read(path, name="org/set") == [DocumentRecord("x", "org/set, line 1")]


# -- JSON ---------------------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", "\n" + lines_of(RECORDS).replace("\n", "\r\n \r\n") + '{"text": "no end"}')
    assert contents(path) == [*EXPECTED, "no end"]
    assert places(path) == ["line 2", "line 4", "line 6", "line 8"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": "x"', "it is cut short: the JSON has no end"),
        ('{"text": x}', "it is not valid JSON (column 10)"),
        ('{"text": NaN}', "it holds NaN, which JSON does not have"),
        ('["text"]', "it is array, not object"),
        ('"text"', "it is str, not object"),
        ('{"text": "x"} {"text": "y"}', "it is not valid JSON (column 15)"),
        ('{"text": "half \\ud83d of it"}', "it holds half of a surrogate pair, which is not a character"),
        (b'{"text": "Stra\xdfe"}', "it is not valid UTF-8 (byte 14)"),
        (b'{"text": "a\0b"}', "it is not valid JSON (column 12)"),
        ('{"text": "a\\u0000b"}', "it contains NUL characters"),
        ('{"messages": [{"role": "user", "content": ["a", {"b\\u0000": 1}]}]}', "it contains NUL characters"),
        ('{"title": "x"}', "it has no field `text`"),
    ],
)
def test_a_broken_line_costs_itself_and_is_named(line: str | bytes, why: str, tmp_path: Path) -> None:
    line = line.encode() if isinstance(line, str) else line
    path = written(tmp_path / "a.jsonl", b'{"text": "before"}\n' * 8000 + line + b'\n{"text": "after"}\n')
    found = read(path)
    bad = found.pop(8000)
    assert isinstance(bad, BadRecord)
    assert bad.where == f"{path}, line 8001"
    assert bad.why.endswith(why)
    assert bad.todo.endswith(".")
    assert [each.content for each in found if isinstance(each, DocumentRecord)] == ["before"] * 8000 + ["after"]


DOCUMENTS = [
    json.dumps(RECORDS),
    json.dumps(RECORDS, indent=2).replace("\n", "\r\n"),
    json.dumps({"data": RECORDS}),
    json.dumps({"version": 1.5, "names": ["a", "b"], "empty": [], "of": {"x": [{}]}, "train": RECORDS, "end": None}, indent=1),
    lines_of(RECORDS),
    "\n\n" + lines_of(RECORDS),
]


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_file_holds_a_list_an_object_with_one_or_lines(document: str, name: str, tmp_path: Path) -> None:
    data = document.encode()
    path = written(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert contents(path) == EXPECTED
    assert places(path)[0] in ("item 1", "line 1", "line 3")


def test_json_lines_that_are_a_list_are_read_as_one(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps(RECORDS, indent=4))
    assert contents(path) == EXPECTED
    assert places(path) == ["item 1", "item 2", "item 3"]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_conversation_is_not_taken_for_a_list_of_records(indent: int | None, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", json.dumps({"messages": HELLO}, indent=indent))
    assert read(path) == [DocumentRecord(Conversation(tuple(HELLO)), str(path))]


def test_an_object_that_is_no_record_says_what_it_lacks(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '{"title": "x"}')
    assert read(path) == [BadRecord(str(path), "it has no field `text`", "Name one with --field.")]


def test_two_lists_in_one_object_are_one_too_many(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", json.dumps({"train": [{"text": "x"}], "test": [{"text": "y"}]}))
    with pytest.raises(InvalidDataError) as caught:
        read(path)
    assert caught.value.why == "it has several lists of objects: 'train' and 'test'"


@pytest.mark.parametrize(
    ("document", "place", "why"),
    [
        ('[{"text": "x"},\n {"text": "y"}\n {"text": "z"}]', "after item 2, line 3", "column 2: ',' or ']' is expected"),
        ('[{"text": "x"},\n {"text": "y",}]', "after item 1, line 2", "column "),
        ('[{"text": "x"}, {"text": "y"}', "after item 2, line 1", "column 30: the file ends too early"),
        ('[{"text": "x"}, {"text": "y"}] x', "after item 2, line 1", "column 32: something follows the end"),
        ('[{"text": "x"}, {"text": "y', "after item 1, line 1", "Unterminated string"),
        ('[{"text": "x"},\r\n{"text": Infinity}]', "after item 1, line 2", "column 1: Infinity is not JSON"),
        ('{"data" [1]}', "line 1", "column 9: ':' is expected"),
        ('{"data": 1, 2: 3}', "line 1", "column 13: a name in double quotes is expected"),
        ('{"data": [1, 2], "more": [[1]]', "line 1", "the file ends too early"),
        ("words", "line 1", "column 1: a list or an object is expected"),
    ],
)
def test_broken_json_says_where_and_ends(document: str, place: str, why: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", document)
    *before, last = read(path)
    assert all(isinstance(each, DocumentRecord) for each in before)
    assert isinstance(last, BadRecord)
    assert last.where == f"{path}, {place}"
    assert why in last.why
    assert last.why.endswith("; the rest is not read")


def test_what_is_no_object_in_a_list_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"text": "x"}, 7, "s", null, [1], true, {"text": "y"}]')
    assert [each.why for each in read(path) if isinstance(each, BadRecord)] == [
        f"it is {kind}, not an object" for kind in ("a number", "a text", "null", "a list", "true or false")
    ]


def test_bytes_of_another_encoding_cost_the_records_they_are_in(tmp_path: Path) -> None:
    rows = b'{"text": "good"},\n{"text": "Stra\xdfe"},\n{"text": "fine", "note": "\xdf"},\n{"text": "\\ud800"}'
    found = read(written(tmp_path / "a.json", b"[" + rows + b"]"))
    assert [isinstance(each, DocumentRecord) for each in found] == [True, False, True, False]
    assert all("not UTF-8" in each.why for each in found if isinstance(each, BadRecord))


def in_blocks(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(items=st.lists(JSON, max_size=8), indent=st.sampled_from([None, 1]), size=st.integers(1, 40), ascii=st.booleans())
@example(items=[1234567, -1.5e300, 0], indent=None, size=1, ascii=True)
def test_a_list_read_in_any_blocks_is_the_list(items: list[Any], indent: int | None, size: int, ascii: bool) -> None:  # noqa: A002
    text = json.dumps(items, indent=indent, ensure_ascii=ascii)
    found = list(json_rows(in_blocks(text, size), "f"))
    assert [row.fields for row in found if isinstance(row, Row)] == [item for item in items if isinstance(item, dict)]
    assert [row.where for row in found] == [f"f, item {number}" for number in range(1, len(items) + 1)]


@given(text=st.text(alphabet='[]{}",:1 \n\\eax', max_size=60), size=st.integers(1, 7))
def test_broken_json_never_raises_anything_else(text: str, size: int) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    found = list(json_rows(in_blocks(text, size), "f"))
    broken = any(isinstance(row, BadRecord) and "the rest is not read" in row.why for row in found)
    assert broken != isinstance(value, list) or isinstance(value, dict)


def test_a_long_item_is_read_whole(tmp_path: Path) -> None:
    text = "漢字 and more; " * 100_000
    path = written(tmp_path / "a.json", json.dumps([{"text": "x"}, {"text": text}, {"text": "y"}], ensure_ascii=False))
    assert contents(path) == ["x", text, "y"]


# -- tables -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_tells_the_delimiter(delimiter: str, tmp_path: Path) -> None:
    text = '\r\nid,"a, note",text\r\n\r\n1,,"one, ""two""\r\nthree"\r\n2,x,four'.replace("a, note", "note").replace(
        ",", delimiter
    )
    path = written(tmp_path / "a.csv", text)
    assert contents(path) == [f'one{delimiter} "two"\nthree', "four"]
    assert places(path) == ["line 4", "line 6"]


def test_a_tsv_is_parted_by_tabs_alone(tmp_path: Path) -> None:
    assert contents(written(tmp_path / "a.tsv", "text\tx,y,z,w\na,b,c,d\t1\n")) == ["a,b,c,d"]


def test_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    assert contents(written(tmp_path / "a.csv", 'text\nplain words\n"quoted, words"\n')) == ["plain words", "quoted, words"]


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=8), size=st.integers(1, 30), delimiter=st.sampled_from(",;\t|"))
def test_a_table_read_in_any_blocks_is_the_table(rows: list[tuple[str, str]], size: int, delimiter: str) -> None:
    target = io.StringIO()
    writer = csv.writer(target, delimiter=delimiter, lineterminator="\n")
    writer.writerows([("text", "note"), *rows])
    found = list(csv_rows(in_blocks(target.getvalue(), size), "f"))
    assert [row.fields for row in found if isinstance(row, Row)] == [{"text": text, "note": note} for text, note in rows]
    line = 2
    for row, cells in zip(found, rows, strict=True):
        assert row.where == f"f, line {line}"
        line += 1 + "".join(cells).count("\n")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"1", "it has 1 fields, and the header line has 2"),
        (b"1,x,y", "it has 3 fields, and the header line has 2"),
        (b'1,"x"y', "it is not CSV: ',' expected after '\"'"),
        (b"1,Stra\xdfe", "it contains bytes that are not UTF-8, or half a surrogate pair"),
    ],
)
def test_a_broken_row_costs_itself_and_is_named(line: bytes, why: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b'id,text\n0,"be\nfore"\n' + line + b"\n2,after\n")
    found = read(path)
    assert [each.where for each in found] == [f"{path}, line {number}" for number in (2, 4, 5)]
    bad = found.pop(1)
    assert isinstance(bad, BadRecord)
    assert bad.why == why
    assert [each.content for each in found if isinstance(each, DocumentRecord)] == ["be\nfore", "after"]


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("text,text", "two of its columns are named 'text'"),
        ("," * 2000, "its first line has 2001 fields, and at most 1000 columns are read"),
        ('"text"x,y', "its header line cannot be read: it is not CSV"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(header: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError) as caught:
        read(written(tmp_path / "a.csv", f"{header}\n1,2\n"))
    assert caught.value.why.startswith(why)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet_rows_in_order(compression: str, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(1000)]
    path = table(tmp_path / "a.parquet", {"id": range(1000), "text": texts}, row_group_size=300, compression=compression)
    assert contents(path) == texts
    assert places(path) == [f"row {number}" for number in range(1, 1001)]


def test_parquet_values_are_pythons(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "messages": [HELLO, None],
        "text": pa.array([None, "large"], pa.large_string()),
        "image": pa.array([{"bytes": b"\x89PNG", "path": "a.png"}] * 2),
        "embedding": [[0.5] * 4] * 2,
        "when": pa.array([1, 2], pa.timestamp("ns")),
    }
    seen: list[Mapping[str, Any]] = []
    path = table(tmp_path / "a.parquet", columns)
    found = list(read_source(path, lambda row: seen.append(row) or interpret(row)))
    assert [each.content for each in found if isinstance(each, DocumentRecord)] == [Conversation(tuple(HELLO)), "large"]
    assert seen == [{"messages": HELLO, "text": None}, {"messages": None, "text": "large"}]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x", "y"]).dictionary_encode(),
        pa.array([b"x", b"y"]),
        pa.array(["x", "y"], pa.large_string()),
    ],
    ids=["dictionary", "bytes", "large"],
)
def test_text_in_any_of_parquets_types(column: Any, tmp_path: Path) -> None:
    assert contents(table(tmp_path / "a.parquet", {"text": column})) == ["x", "y"]


def test_parquet_strings_that_are_not_utf8_cost_their_rows(tmp_path: Path) -> None:
    strings, large = (pa.array([b"good", b"Stra\xdfe", b"fine"]).view(pa.string()), ["a", "b", "x" * 17_000_000])
    path = table(tmp_path / "a.parquet", {"text": strings, "note": large}, compression="zstd")
    found = read(path)
    assert found[0] == DocumentRecord("good", f"{path}, row 1")
    assert [(each.where, each.why[:17]) for each in found[1:] if isinstance(each, BadRecord)] == [
        (f"{path}, row 2", "it cannot be read"),
        (f"{path}, row 3", "it is longer than"),
    ]


def test_a_parquet_that_unpacks_to_a_hundred_times_its_size_is_refused_unread(tmp_path: Path) -> None:
    texts = pa.array([*["short"] * 400, "a" * (257 << 20)], pa.large_string())
    path = table(tmp_path / "a.parquet", {"text": texts}, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InvalidDataError) as caught:
        read(path)
    assert "unpack to 257.0" in caught.value.why


def test_a_parquet_without_text_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"when": [datetime(2024, 1, 1)], "n": [1]})
    with pytest.raises(InvalidDataError) as caught:
        read(path)
    assert caught.value.why == "it has no text column; its columns: when, n"


# -- compressed, counted, empty -----------------------------------------------------------------------------------------

FILES: dict[str, bytes] = {
    "a.txt": b"word " * 200_000,
    "a.jsonl": (json.dumps({"text": "word " * 2000}) + "\n").encode() * 60,
    "a.json": b"[" + b",".join([json.dumps({"text": "word " * 2000}).encode()] * 60) + b"]",
    "b.json": json.dumps({"text": "word " * 2000}, indent=1).encode(),
    "a.csv": b"text,id\n" + b'"word word",1\n' * 8_000,
    "a.py": b"word = 1\n\n\n" * 60_000,
}


@pytest.mark.parametrize("name", FILES)
def test_a_gz_holds_what_the_file_holds_and_every_byte_is_told(name: str, tmp_path: Path) -> None:
    plain = written(tmp_path / name, FILES[name])
    packed = written(tmp_path / f"{name}.gz", gzip.compress(FILES[name]))
    renamed = written(tmp_path / "other" / name, gzip.compress(FILES[name]))
    for path in (plain, packed, renamed):
        reported: list[int] = []
        assert [each.content for each in read(path, on_bytes=reported.append) if isinstance(each, DocumentRecord)] == contents(
            plain
        )
        assert sum(reported) == source_bytes(path) == path.stat().st_size


def test_every_byte_of_a_parquet_is_told(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"text": [f"x{number}" for number in range(1000)]}, row_group_size=70)
    reported: list[int] = []
    read(path, on_bytes=reported.append)
    assert sum(reported) == source_bytes(path) == path.stat().st_size
    assert len(reported) > 14


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.txt", b""), ("a.md", b" \n\t\n"), ("a.jsonl", b"\n\n"), ("a.json", b"[]"), ("a.csv", b"text,id\n"), ("a.csv", b"")],
)
def test_an_empty_file_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError) as caught:
        read(written(tmp_path / name, data))
    assert caught.value.why == "it is empty"


def test_an_empty_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="it is empty"):
        read(table(tmp_path / "a.parquet", {"text": pa.array([], pa.string())}))


# -- folders ------------------------------------------------------------------------------------------------------------

TREE = {
    "b/deep/er.py": b"import os\n",
    "a.md": b"# Title\n\nText.\n",
    "data.json": b'{"text": "not a record here"}\n',
    "Makefile": b"all:\n\techo\n",
}
PASSED_OVER = {
    ".git": "hidden",
    ".env": "hidden",
    "b/node_modules": "built or installed",
    "__pycache__": "built or installed",
    "pkg.egg-info": "built or installed",
    "yarn.lock": "lock file",
    "package-lock.json": "lock file",
    "jquery.min.js": "generated",
    "logo.png": "binary",
    "program": "binary",
    "latin.txt": "not UTF-8",
    "large.sql": "too large",
    "empty.py": "empty",
    "blank.py": "empty",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, data in TREE.items():
        written(root / name, data)
    for name in (".git/config", "b/node_modules/x.js", "__pycache__/x.txt", "pkg.egg-info/PKG"):
        written(root / name, b"text\n")
    for name in (".env", "yarn.lock", "package-lock.json", "jquery.min.js", "logo.png"):
        written(root / name, b"text\n")
    written(root / "program", b"\x7fELF\0\0")
    written(root / "latin.txt", "Straße".encode("latin-1"))
    written(root / "large.sql", b"SELECT 1;\n" * 200_000)
    written(root / "empty.py", b"")
    written(root / "blank.py", b"\n \n")
    return root


def test_a_folder_is_the_documents_people_wrote_in_it(tree: Path) -> None:
    skipped: dict[str, str] = {}
    found = read(tree, on_skipped=lambda path, why: skipped.update({path.relative_to(tree).as_posix(): why}))
    assert [(each.where, each.content) for each in found if isinstance(each, DocumentRecord)] == [
        (f"{tree}/{name}", TREE[name].decode().strip()) for name in sorted(TREE)
    ]
    assert skipped == PASSED_OVER


def test_the_files_of_a_folder_and_their_bytes_are_known_beforehand(tree: Path) -> None:
    reported: list[int] = []
    read(tree, on_bytes=reported.append)
    assert sum(reported) == source_bytes(tree)
    named = {path.relative_to(tree).as_posix() for path in source_files(tree)}
    assert set(TREE) < named
    assert "large.sql" not in named
    assert list(source_files(tree / "a.md")) == [tree / "a.md"]


def test_a_long_file_of_a_folder_is_cut(tmp_path: Path) -> None:
    written(tmp_path / "f" / "a.py", b"def f():\n    return 1\n\n\n" * 2000)
    written(tmp_path / "f" / "b.md", b"Words and more words.\n\n" * 2000)
    found = read(tmp_path / "f")
    for name, least in (("a.py", 3), ("b.md", 20)):
        lines = (tmp_path / "f" / name).read_text().split("\n")
        blocks = [each for each in found if each.where.startswith(f"{tmp_path}/f/{name}, line ")]
        assert len(blocks) >= least
        for each in blocks:
            assert isinstance(each, DocumentRecord)
            assert str(each.content).split("\n")[0] == lines[int(each.where.rpartition(" ")[2]) - 1] != ""


def test_a_folder_of_nothing_but_data_is_a_data_set(tmp_path: Path) -> None:
    root = tmp_path / "set"
    written(root / "README.md", "About it.")
    written(root / "LICENSE", "Free.")
    written(root / "dataset_infos.json", "{}")
    written(root / ".gitattributes", "x")
    written(root / "train" / "1.jsonl.gz", gzip.compress(lines_of(RECORDS[:1]).encode()))
    written(root / "train" / "2.csv", "text\ntwo\n")
    written(root / "train" / "3.jsonl", "")
    table(root / "4.parquet", {"text": ["four"]})
    written(root / "large.jsonl", (json.dumps({"text": "x" * 1000}) + "\n") * 2000)
    skipped: dict[str, str] = {}
    found = read(root, on_skipped=lambda path, why: skipped.update({path.name: why}))
    assert [each.content for each in found if isinstance(each, DocumentRecord)] == ["four", *["x" * 1000] * 2000, "one", "two"]
    assert found[0].where == f"{root}/4.parquet, row 1"
    assert found[-1].where == f"{root}/train/2.csv, line 2"
    assert skipped == {
        "README.md": "not data",
        "LICENSE": "not data",
        "dataset_infos.json": "not data",
        ".gitattributes": "hidden",
        "3.jsonl": "empty",
    }
    written(root / "one.py", "import os\n")
    assert "one" not in [each.content for each in read(root) if isinstance(each, DocumentRecord)]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "f" / "logo.png", b"x")
    with pytest.raises(InvalidDataError) as caught:
        read(tmp_path / "f")
    assert caught.value.why == "it contains no text or source code"


# -- stdin --------------------------------------------------------------------------------------------------------------


def parquet_bytes() -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.table({"text": ["one"]}), target)
    return target.getvalue()


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (lambda: lines_of(RECORDS).encode(), "stdin.jsonl", EXPECTED),
        (lambda: b'\n\n{"text": "one"}', "stdin.jsonl", ["one"]),
        (lambda: gzip.compress(lines_of(RECORDS).encode()), "stdin.jsonl", EXPECTED),
        (lambda: json.dumps(RECORDS, indent=1).encode(), "stdin.json", EXPECTED),
        (lambda: json.dumps({"data": RECORDS}, indent=1).encode(), "stdin.json", EXPECTED),
        (lambda: b"[Scene: a quay]\n{not json}", "stdin.txt", ["[Scene: a quay]\n{not json}"]),
        (lambda: b"plain words", "stdin.txt", ["plain words"]),
        (parquet_bytes, "stdin.parquet", ["one"]),
    ],
)
def test_stdin_is_kept_under_a_name_that_says_what_it_is(
    make: Callable[[], bytes], name: str, expected: list[Any], tmp_path: Path
) -> None:
    reported: list[int] = []
    path = spool_stdin(io.BytesIO(make()), tmp_path, reported.append)
    assert path == tmp_path / name
    assert sum(reported) == len(make())
    assert contents(path) == expected
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
def test_a_terminal_is_no_source(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "rb", buffering=0) as terminal, pytest.raises(UsageError, match="stdin is a terminal"):
        spool_stdin(terminal, tmp_path)
    os.close(leader)
    assert list(tmp_path.iterdir()) == []


def test_stdin_that_is_no_text_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError) as caught:
        spool_stdin(io.BytesIO(b"\x7fELF\0\0"), tmp_path)
    assert caught.value.what == "stdin cannot be used as a source of calibration text"
    assert list(tmp_path.iterdir()) == []


def test_stdin_can_be_stopped(tmp_path: Path) -> None:
    def stop(_n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spool_stdin(io.BytesIO(b"x" * 10), tmp_path, stop)
    assert list(tmp_path.iterdir()) == []
