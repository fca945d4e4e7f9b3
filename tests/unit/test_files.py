"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner import files
from imatrix_runner.errors import InvalidDataError, NoSpaceError
from imatrix_runner.files import (
    atomic_writer,
    exact_bytes,
    existing_parent,
    human_bytes,
    human_seconds,
    parse_bytes,
    part_path,
    publish,
    read_json,
    require_space,
    sha256,
    stamp,
    write_json,
)


@dataclass(frozen=True)
class Note:
    text: str
    numbers: list[int]


def write_half(final: Path, error: BaseException) -> None:
    with atomic_writer(final) as handle:
        handle.write(b"torn")
        raise error


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_with_its_content_only_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "new" / "folder" / "a.bin"
    with atomic_writer(final) as handle:
        handle.write(b"half")
        assert not final.exists()
        assert part_path(final).parent == final.parent  # else the rename would not be atomic
        handle.write(b" and half")
    assert final.read_bytes() == b"half and half"
    assert names_in(final.parent) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_written_to_all_the_same(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fsync)
    with atomic_writer(tmp_path / "a") as handle:
        handle.write(b"whole")
    publish(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"whole"
    assert names_in(tmp_path) == ["b"]


def test_a_disk_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(InvalidDataError, match="input/output error while writing a"), atomic_writer(tmp_path / "a") as handle:
        handle.write(b"whole")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing_new_and_the_old_file_whole(tmp_path: Path, error: type[BaseException]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"old")
    for path in (old, new):
        with pytest.raises(error):
            write_half(path, error())
    assert names_in(tmp_path) == ["old"]
    assert old.read_bytes() == b"old"


def test_a_full_disk_leaves_nothing_and_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match=r"while writing a\.bin"):
        write_half(tmp_path / "a.bin", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert names_in(tmp_path) == []


def test_a_disk_that_is_full_only_when_flushed_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError):
        write_json(tmp_path / "a.json", {})
    assert names_in(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidDataError, match=r"file/a\.bin"), atomic_writer(tmp_path / "file" / "a.bin"):
        pytest.fail("there is nothing to write to")


def test_publish_renames_and_replaces(tmp_path: Path) -> None:
    part, final = tmp_path / "part", tmp_path / "final"
    part.write_bytes(b"new")
    final.write_bytes(b"old")
    inode = stamp(part).inode
    publish(part, final)
    assert names_in(tmp_path) == ["final"]
    assert final.read_bytes() == b"new"
    assert stamp(final).inode == inode


def test_publishing_what_is_not_there_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "final").write_bytes(b"old")
    with pytest.raises(InvalidDataError, match="giving final its name"):
        publish(tmp_path / "part", tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == b"old"


def test_json_round_trip(tmp_path: Path) -> None:
    note = Note("straße", [1, 2])
    write_json(tmp_path / "n.json", note)
    assert read_json(tmp_path / "n.json", Note) == note
    assert (tmp_path / "n.json").read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("content", [b"", b"{", b'{"text": "a"}', b'{"text": 1, "numbers": []}', b"\xff\xfe", b"[]"])
def test_json_of_another_shape_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "n.json"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError, match=r"n\.json cannot be read"):
        read_json(path, Note)


def test_json_beyond_the_limit_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    path.write_bytes(b" " * 101)
    with pytest.raises(InvalidDataError, match="too large"):
        read_json(path, Note, limit=100)


def test_missing_json_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="No such file"):
        read_json(tmp_path / "none.json", Note)


def test_a_stamp_notices_every_kind_of_change(tmp_path: Path) -> None:
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"12345678")
    first = stamp(path)
    assert stamp(path) == first
    os.utime(path, ns=(first.mtime_ns + 1, first.mtime_ns + 1))
    assert stamp(path) != first
    copy.write_bytes(b"12345678")
    os.utime(copy, ns=(first.mtime_ns, first.mtime_ns))
    assert stamp(copy) != first


def test_sha256_is_that_of_the_content_and_hears_of_every_byte(tmp_path: Path) -> None:
    data = os.urandom(9 << 20)
    (tmp_path / "a").write_bytes(data)
    heard: list[int] = []
    assert sha256(tmp_path / "a", heard.append) == hashlib.sha256(data).hexdigest()
    assert sum(heard) == len(data)
    assert len(heard) > 1


def test_sha256_can_be_stopped_by_its_listener(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sha256(tmp_path / "a", stop)


def test_existing_parent_climbs_to_what_is_there(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b" / "c") == tmp_path
    assert existing_parent(tmp_path) == tmp_path


def test_space_is_required_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _path: 2048)
    require_space(tmp_path / "later", 2048, "a level")
    with pytest.raises(NoSpaceError) as caught:
        require_space(tmp_path / "later", 2049, "a level")
    assert "a level" in caught.value.what
    assert caught.value.why == f"2.00 KiB needed, 2.00 KiB free at {tmp_path}"


def test_more_than_the_disk_holds_never_fits(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError):
        require_space(tmp_path, 1 << 62, "everything")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (5 << 20, "5.00 MiB"), (3 << 40, "3.00 TiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


@given(st.integers(0, 1 << 60))
def test_bytes_for_people_are_right_to_half_a_percent(count: int) -> None:
    number, unit = human_bytes(count).split()
    assert float(number) * 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (900, "900B"),
        (4 << 30, "4GiB"),
        (3 << 29, "1.5GiB"),
        (500 << 20, "500MiB"),
        (4402341478, "4.1GiB"),
        (10**9, "1000000000B"),
    ],
)
def test_exact_bytes(count: int, text: str) -> None:
    assert exact_bytes(count) == text


@given(st.integers(1, 1 << 46))
def test_exact_bytes_are_read_back(count: int) -> None:
    assert parse_bytes(exact_bytes(count)) == count


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (59.94, "59.9 s"), (59.96, "1:00"), (65, "1:05"), (3599.6, "1:00:00"), (3725, "1:02:05")],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize("size", [0, 1, 5000, 64 << 10, (64 << 10) + 14 * 4096 + 1, 1 << 20])
def test_a_stamp_holds_samples_of_the_content(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(size))
    before, status = stamp(path), path.stat()
    assert stamp(path) == before
    if size:
        with path.open("r+b") as handle:
            handle.write(b"\1")
            handle.seek(size - 1)
            handle.write(b"\1")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        after = stamp(path)
        assert (after.size, after.mtime_ns, after.inode) == (before.size, before.mtime_ns, before.inode)
        assert after != before
    assert replace(before, sample="") == stamp(path)  # a stamp of an earlier version knows no samples
    assert replace(before, size=size + 1) != before


def test_another_model_of_the_same_size_has_another_sample(tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in "ab")
    first.write_bytes(b"header" + os.urandom(1 << 20))
    second.write_bytes(b"header" + os.urandom(1 << 20))
    assert not stamp(first).same_content(stamp(second))
    assert stamp(first).same_content(stamp(Path(shutil.copyfile(first, tmp_path / "c"))))
    assert not replace(stamp(first), sample="").same_content(replace(stamp(first), sample=""))


def test_what_cannot_be_read_has_a_stamp_without_samples(tmp_path: Path) -> None:
    assert stamp(tmp_path).sample == ""
