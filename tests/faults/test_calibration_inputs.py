"""Sources of calibration text that are broken, hostile or larger than memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imatrix_runner.documents.conversations import content_of
from imatrix_runner.documents.documents import BadRecord, DocumentRecord
from imatrix_runner.documents.records import read_source, source_bytes, source_files
from imatrix_runner.errors import DownloadError, InvalidDataError, RunnerError

MEGABYTES = 120
MOST_MEMORY = 100 << 20  # less than any of the large files here
MOST_WITH_ARROW = 180 << 20  # its library takes half of that
posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX file system")


def read(path: Path, **options: Any) -> list[DocumentRecord | BadRecord]:
    return list(read_source(path, content_of, **options))


def refusal(path: Path) -> RunnerError:
    with pytest.raises(InvalidDataError) as caught:
        read(path)
    return caught.value


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# -- what is no text ----------------------------------------------------------------------------------------------------

LATIN = "Grüße\n".encode() * 100_000 + "Grüße".encode("latin-1")


def test_text_of_another_encoding_is_named_with_byte_line_and_remedy(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "my notes.txt", LATIN))
    assert error.why == "byte 800002 in line 100001 is not valid UTF-8"
    assert error.todo.endswith(f"iconv -f latin1 -t utf-8 '{tmp_path}/my notes.txt' > 'my notes-utf8.txt'")


@pytest.mark.parametrize("cut", range(1, 4))
def test_a_character_cut_off_at_the_end_of_a_text(cut: int, tmp_path: Path) -> None:
    data = b"x" * ((1 << 18) - 2) + "🥊".encode()[:cut]
    assert refusal(written(tmp_path / "a.txt", data)).why == f"byte {(1 << 18) - 2} in line 1 is not valid UTF-8"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.unknown"])
@pytest.mark.parametrize(
    ("data", "why", "todo"),
    [
        ('{"text": "x"}'.encode("utf-16"), "it is UTF-16", "iconv -f UTF-16 -t UTF-8 "),
        ('{"text": "x"}'.encode("utf-32"), "it is UTF-32", "iconv -f UTF-32 -t UTF-8 "),
        ('{"text": "x"}'.encode("utf-16-le"), "it is a binary file (byte 1 is NUL)", "Give UTF-8 text"),
        (b"GGUF\3\0\0\0", "it is a binary file (byte 5 is NUL)", "Give UTF-8 text"),
        (b"\x28\xb5\x2f\xfd\x04", "it is compressed with zstd", "zstd -d "),
        (lzma.compress(b"text"), "it is compressed with xz", "unxz --keep "),
        (bz2.compress(b"text"), "it is compressed with bzip2", "bunzip2 --keep "),
        (b"PK\3\4\x14\0", "it is a zip archive, or a document that is one (.docx, .epub)", "unzip "),
        (b"%PDF-1.7\n", "it is a PDF", "pdftotext "),
        (gzip.compress(b"%PDF-1.7\n", mtime=0), "it is a PDF", "pdftotext "),
        (gzip.compress(b"some text" * 100, mtime=0)[:-20], "it is a damaged .gz file: ", "Download or create it again."),
        (b"\x1f\x8b\x08\0garbage and more of it", "it is a damaged .gz file: ", "Download or create it again."),
        (b"PAR1 and nothing else", "it is not a Parquet file, or a damaged one: ", "Download or create it again."),
    ],
)
def test_what_is_no_text_is_refused_by_its_kind(name: str, data: bytes, why: str, todo: str, tmp_path: Path) -> None:
    error = refusal(written(tmp_path / name, data))
    assert error.why.startswith(why)
    assert todo in error.todo


def test_a_nul_far_inside_a_text_is_found(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.txt", b"word " * 200_000 + b"\0")).why == "it is a binary file (byte 1000000 is NUL)"


def test_a_text_named_parquet(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.parquet", b"text" * 10)).why.startswith("it is not a Parquet file, or a damaged one: ")


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.parquet", "none/a.txt"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / name)
    assert "No such file" in error.why
    assert source_bytes(tmp_path / name) is None


@posix
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    error = refusal(tmp_path / "pipe.jsonl")
    assert error.why == "it is a pipe or a device, and a source is read more than once"
    assert source_bytes(tmp_path / "pipe.jsonl") is None


@pytest.mark.parametrize(
    "data", [b"word " * 300_000, gzip.compress(random.Random(1).randbytes(500_000).hex().encode(), mtime=0)]
)
def test_whoever_counts_the_bytes_can_stop(data: bytes, tmp_path: Path) -> None:
    def stop(_n_bytes: int) -> None:
        raise DownloadError("stopped", "it was asked to", "Go on.")

    path = written(tmp_path / "a.txt", data)
    with pytest.raises(DownloadError, match="stopped"):
        read(path, on_bytes=stop)


# -- folders ------------------------------------------------------------------------------------------------------------


@posix
def test_links_in_a_folder_are_never_followed(tmp_path: Path) -> None:
    secret = written(tmp_path / "secret.txt", b"not yours\n")
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    written(root / "inner" / "a.txt", b"mine\n")
    (root / "inner" / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "outside.txt").symlink_to(secret)
    (root / "again.txt").symlink_to("inner/a.txt")
    (root / "etc").symlink_to("/etc")
    os.mkfifo(root / "pipe")
    skipped: dict[str, str] = {}
    found = read(root, on_skipped=lambda path, why: skipped.update({path.name: why}))
    assert found == [DocumentRecord("mine", f"{root}/inner/a.txt")]
    assert skipped == {
        **dict.fromkeys(("loop", "self", "outside.txt", "again.txt", "etc"), "link"),
        "pipe": "not a regular file",
    }
    assert list(source_files(root)) == [root / "inner" / "a.txt"]


@posix
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_in_a_folder_is_told(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", b"text\n")
    written(tmp_path / "b.txt", b"text\n").chmod(0)
    (tmp_path / "c").mkdir(mode=0)
    skipped: dict[str, str] = {}
    assert len(read(tmp_path, on_skipped=lambda path, why: skipped.update({path.name: why}))) == 1
    assert skipped == {"b.txt": "unreadable: Permission denied", "c": "unreadable"}


@posix
def test_names_that_command_a_terminal_stay_harmless(tmp_path: Path) -> None:
    name = "\x1b[2J\x1b]0;owned\x07\n\u202e"
    root = tmp_path / name
    root.mkdir()
    written(root / f"{name}.txt", b"text\n")
    written(root / f"{name}.md", b"\0")
    written(tmp_path / f"{name}.jsonl", b"broken\n")
    written(tmp_path / f"{name}.csv", f'"{name}","{name}"\n1,2\n'.encode())
    written(tmp_path / f"{name}.txt", b"\xff")
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(b"[]x")
    told: list[str] = []
    for path in tmp_path.iterdir():
        try:
            for document in read(path):
                told += [document.where, *((document.why, document.todo) if isinstance(document, BadRecord) else ())]
        except InvalidDataError as error:
            told += [error.what, error.why, error.todo]
    assert len(told) >= 10
    assert all(text.isprintable() and text.encode() for text in told)


def test_a_folder_as_deep_as_the_system_allows(tmp_path: Path) -> None:
    here = tmp_path
    for _ in range(300):
        here = here / "d"
    here.mkdir(parents=True)
    written(here / "a.txt", b"deep\n")
    assert [each.content for each in read(tmp_path) if isinstance(each, DocumentRecord)] == ["deep"]


# -- damage -------------------------------------------------------------------------------------------------------------


def parquet_file(path: Path) -> bytes:
    rows = [[{"role": "user", "content": f"é {number}"}] for number in range(200)]
    pq.write_table(pa.table({"messages": rows, "text": [f"x{number % 7}" for number in range(200)]}), path, row_group_size=80)
    return path.read_bytes()


def test_a_damaged_parquet_ends_in_an_error_of_ours(tmp_path: Path) -> None:
    """In a process of its own: pyarrow is native code."""
    code = """
        import random, sys
        from pathlib import Path
        from imatrix_runner.documents.conversations import content_of
        from imatrix_runner.documents.records import read_source
        from imatrix_runner.errors import InvalidDataError
        path, data, rng = Path(sys.argv[1]), bytearray(Path(sys.argv[1]).read_bytes()), random.Random(7)
        refused = 0
        for number in range(400):
            broken = bytearray(data)
            for _ in range(3):
                # Most of it lies in the last bytes: what says how to read the others.
                broken[rng.randrange(rng.choice((0, len(data) // 2)), len(data))] = rng.randrange(256)
            path.write_bytes(broken[: rng.choice((len(data), rng.randrange(len(data))))])
            try:
                list(read_source(path, content_of))
            except InvalidDataError as error:
                assert error.why.isprintable()
                refused += 1
        print(refused)
    """
    path = tmp_path / "a.parquet"
    assert len(parquet_file(path)) > 3000
    assert int(in_a_child(code, path)) > 200


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.md", "a.py", "a.txt.gz"])
def test_damage_to_any_byte_ends_in_records_or_an_error_of_ours(name: str, tmp_path: Path) -> None:
    records = [{"text": f"Grüße {number} 🥊", "n": number} for number in range(20)]
    texts = {
        "a.jsonl": "\n".join(map(json.dumps, records)),
        "a.json": json.dumps({"data": records}, indent=1, ensure_ascii=False),
        "a.csv": 'text,n\r\n"Grüße ""1""\r\n🥊",2\r\n' * 20,
        "a.md": "# Grüße\n\n```sh\necho 🥊\n\n```\r\nText.\n" * 20,
        "a.py": "def f():\n    return '🥊'\n\n\n" * 20,
        "a.txt.gz": "Grüße 🥊\n\n" * 20,
    }
    data, rng = texts[name].encode(), random.Random(3)
    data = gzip.compress(data) if name.endswith(".gz") else data
    outcomes = set()
    for _ in range(100):
        broken = bytearray(data)
        place = rng.randrange(len(broken))
        broken[place : place + rng.randrange(3)] = rng.choice((b"", b"\0", b"\xff", b'"', b"{", b"\n", b"\\", rng.randbytes(2)))
        try:
            for document in read(written(tmp_path / name, bytes(broken))):
                outcomes.add(type(document).__name__)
                assert isinstance(document, BadRecord) or str(document.content).encode() is not None
        except InvalidDataError as error:
            outcomes.add("error")
            assert error.why.isprintable()  # noqa: PT017 - whichever it is, it may end in one
    assert {"DocumentRecord", "error"} <= outcomes


# -- larger than memory, or wishing to be -------------------------------------------------------------------------------

SENTENCE = 'A leaf is a compromise between thirst and hunger, "quoted" – and so on. ' * 14
DIALOGUE = {"messages": [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": SENTENCE}]}

READ = """
    import json, sys, time
    from collections import Counter
    from pathlib import Path
    from imatrix_runner.documents.conversations import content_of
    from imatrix_runner.documents.documents import BadRecord
    from imatrix_runner.documents.records import read_source, source_bytes

    def peak():
        status = Path("/proc/self/status")
        if status.exists():  # what a process inherits from its parent does not count here
            return int(status.read_text().partition("VmHWM:")[2].split()[0]) << 10
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    counts, first, told = Counter(), "", [0]
    def hear(n_bytes):
        told[0] += n_bytes
    for document in read_source(Path(sys.argv[1]), content_of, on_bytes=hear):
        bad = isinstance(document, BadRecord)
        counts["bad" if bad else "good"] += 1
        first = first or (f"{document.where}: {document.why}" if bad else "")
    whole = told[0] == source_bytes(Path(sys.argv[1]))
    print(json.dumps({"good": counts["good"], "bad": counts["bad"], "first": first, "whole": whole, "peak": peak()}))
"""


def in_a_child(code: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_in_a_child(path: Path) -> Mapping[str, Any]:
    return dict(json.loads(in_a_child(READ, path)))


def repeated(path: Path, head: str, unit: str, tail: str = "", megabytes: int = MEGABYTES) -> Path:
    block = (unit * (1_000_000 // len(unit.encode()) + 1)).encode()
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as target:
        target.write(head.encode())
        for _ in range(megabytes):
            target.write(block)
        target.write(tail.encode())
    return path


def units(unit: str) -> int:
    """How often :func:`repeated` wrote ``unit``."""
    return MEGABYTES * (1_000_000 // len(unit.encode()) + 1)


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A path for a large file, which goes when the test ends: a hundred megabytes each add up."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(tmp_path / name)
        return made[-1]

    yield make
    for path in made:
        path.unlink(missing_ok=True)


LINE = json.dumps(DIALOGUE)
LARGE = [
    ("a.jsonl", "", LINE + "\n", "", 0),
    ("a.json", "[\n", LINE + ",\n", LINE + "]", 1),
    ("b.json", '{"version": [1, 2], "of": {"x": 1}, "data": [', LINE + ",", LINE + '], "end": 0}', 1),
    ("a.csv", "n,text\n", '1,"' + SENTENCE.replace('"', '""') + '\nmore"\n', "", 0),
]


@pytest.mark.parametrize(("name", "head", "unit", "tail", "more"), LARGE, ids=[name for name, *_ in LARGE])
def test_records_of_any_number(name: str, head: str, unit: str, tail: str, more: int, big: Callable[[str], Path]) -> None:
    told = read_in_a_child(repeated(big(name), head, unit, tail))
    assert told["peak"] < MOST_MEMORY
    assert (told["good"], told["bad"], told["whole"]) == (units(unit) + more, 0, True)


@pytest.mark.parametrize("name", ["a.txt", "a.py"])
def test_texts_of_any_length(name: str, big: Callable[[str], Path]) -> None:
    told = read_in_a_child(repeated(big(name), "", f"{SENTENCE}\n{SENTENCE}\n\n"))
    assert told["peak"] < MOST_MEMORY
    assert told["whole"]
    assert told["good"] > MEGABYTES * 50


@pytest.mark.parametrize("row_groups", [1, 20])
def test_parquet_rows_of_any_number(row_groups: int, big: Callable[[str], Path]) -> None:
    rows = [DIALOGUE["messages"]] * 1000
    data = pa.table({"messages": rows, "id": range(1000), "image": [b"x" * 3000] * 1000}).to_batches()[0]
    path = big("a.parquet")
    with pq.ParquetWriter(path, data.schema, compression="none", use_dictionary=False) as target:
        for _ in range(45):
            target.write_batch(data, row_group_size=45_000 // row_groups)
    assert path.stat().st_size > MOST_WITH_ARROW
    told = read_in_a_child(path)
    assert told["peak"] < MOST_WITH_ARROW
    assert (told["good"], told["whole"]) == (45_000, True)


def test_a_parquet_that_repeats_one_long_value(tmp_path: Path) -> None:
    """Stored once, in the column's dictionary: 2.5 GB in a file of 4 MB."""
    path = tmp_path / "a.parquet"
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 600, pa.int32()), pa.array(["x" * (4 << 20)]))
    pq.write_table(pa.table({"text": value}), path, compression="none", dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 5 << 20
    told = read_in_a_child(path)
    assert told["peak"] < MOST_WITH_ARROW
    assert told["good"] == 600


LONG = "it is longer than 16 MiB"
DENSE = "it is longer than 1 MiB and has more than 1048576 values"
HOSTILE = [
    # One line of 120 MB: a text is cut, a record is passed over and the next one read.
    ("line.txt", "", "word ", "", None, ""),
    ("line.py", "", "word", "", None, ""),
    ("line.jsonl", '{"text": "', "word ", '"}\n{"text": "x"}\n', 1, f"line 1: {LONG}"),
    ("line.csv", "id,text\n1,", "word ", "\n2,x\n", 1, f"line 2: {LONG}"),
    ("text.json", '[{"text": "', "word ", '"}, {"text": "x"}]', 0, f"line 1: broken JSON at column 2: {LONG}"),
    # A hundred million levels, or values, or a quote that never ends.
    ("deep.json", "", "[", "", 0, "line 1: broken JSON at column 2: it is nested too deeply"),
    ("deep2.json", "[", '{"a":', "", 0, "line 1: broken JSON at column 2: it is nested too deeply"),
    ("flat.json", '[{"a": [', "[],", "", 0, f"line 1: broken JSON at column 2: {DENSE}"),
    ("blank.json", "[", " ", '{"text": "x"}]', 1, ""),
    ("numbers.json", '{"ids": [', "12345.678,", '0], "data": [{"text": "x"}]}', 1, ""),
    (
        "quote.csv",
        'id,text\n1,x\n2,"',
        "words\n",
        "",
        1,
        "line 3: a quoted field is not closed; the rest of the file is not read",
    ),
    (
        "quotes.csv",
        'id,text\n1,x\n2,"',
        '","\n',
        "",
        1,
        "line 3: a quoted field is not closed; the rest of the file is not read",
    ),
]


@pytest.mark.parametrize(("name", "head", "unit", "tail", "good", "bad"), HOSTILE, ids=[name for name, *_ in HOSTILE])
def test_what_would_not_fit_into_memory(
    name: str, head: str, unit: str, tail: str, good: int | None, bad: str, big: Callable[[str], Path]
) -> None:
    told = read_in_a_child(repeated(big(name), head, unit, tail, 10 if name == "numbers.json" else MEGABYTES))
    assert told["peak"] < MOST_MEMORY
    assert told["good"] == good if good is not None else told["good"] > 1000
    assert bad in told["first"]
    assert told["bad"] == bool(bad)


@pytest.mark.parametrize("deep", ["[", '{"a":'])
def test_a_line_nested_without_end(deep: str, tmp_path: Path) -> None:
    for times, why in ((100_000, "it is nested more than 100 levels deep"), (2_000_000, DENSE)):
        path = written(tmp_path / "a.jsonl", f'{{"a": {deep * times}\n{{"text": "x"}}\n'.encode())
        assert [getattr(each, "why", "") for each in read(path)] == [why, ""]


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz", "bomb.csv.gz", "bomb.json.gz"])
def test_a_small_archive_of_a_large_file(name: str, big: Callable[[str], Path]) -> None:
    path = repeated(big(name), "", "a", megabytes=200)
    assert path.stat().st_size < 2_000_000
    if name == "bomb.csv.gz":
        assert "its header line cannot be read" in refusal(path).why
        return
    told = read_in_a_child(path)
    assert told["peak"] < MOST_MEMORY
    assert (told["good"] > 3000) == (name == "bomb.txt.gz")


def test_an_archive_of_nothing_but_zeros_is_given_up_at_once(tmp_path: Path) -> None:
    path = tmp_path / "zeros.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as target:
        for _ in range(100):
            target.write(bytes(1 << 20))
    told: list[int] = []
    with pytest.raises(InvalidDataError, match="binary"):
        read(path, on_bytes=told.append)
    assert sum(told) < path.stat().st_size
