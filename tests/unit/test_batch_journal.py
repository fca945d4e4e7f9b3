"""The journal of a batch: torn ends, damage, locks, and what is folded from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.batch.batch_folder import BatchFolder, append_addition, hold_batch
from imatrix_runner.batch.batch_journal import (
    BatchBegan,
    BatchEvent,
    BatchJournal,
    FileMade,
    FileRemoved,
    LevelFailed,
    ModelDone,
    ModelFailed,
    ModelPrepared,
    PlannedLevel,
    StageBegan,
    StageDone,
    ThreeLines,
    read_history,
)
from imatrix_runner.batch.release_files import remove_files
from imatrix_runner.errors import InvalidDataError, WorkspaceLockedError
from imatrix_runner.events import Event, Notice
from imatrix_runner.files import stamp

ERROR = ThreeLines("usage", "what", "why", "do")
EVENTS: tuple[BatchEvent, ...] = (
    BatchBegan("imatrix-runner batch m.yaml", "2026-01-01"),
    StageBegan("a", "e1", "download"),
    StageDone("a", "e1", "download", (), 2.0, 100),
    ModelPrepared("a", "e1", "work/a", 100, False, (PlannedLevel("Q4_0", 10),)),
    StageDone("a", "e1", "make", ("Q4_0",), 3.0, 110),
    LevelFailed("a", "e1", "Q8_0", ERROR),
    ModelDone("a", "e1", "http://x"),
    ModelFailed("b", "e2", "check", ERROR),
)


def test_what_was_appended_is_read_again_without_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = BatchJournal(path)
    journal.append(*EVENTS)
    journal.close()
    with path.open("ab") as handle:
        handle.write(b'{"event":"done","mod')
    history = read_history(path)
    assert history.of("a").made == {"Q4_0"}
    assert history.of("a").seconds == 5.0
    assert history.of("b").failure is not None
    again = BatchJournal(path)  # cuts the torn line off
    again.append(StageBegan("b", "e2", "download"))
    again.close()
    assert len(path.read_text().splitlines()) == len(EVENTS) + 1


def test_the_next_command_tries_failures_again_and_keeps_what_is_done(tmp_path: Path) -> None:
    journal = BatchJournal(tmp_path / "journal.jsonl")
    journal.append(*EVENTS, BatchBegan("again", "1999-01-01"))  # the clock was set back: nothing depends on it
    a, b = journal.history.of("a"), journal.history.of("b")
    assert (a.failed_levels, a.done, a.made) == ({}, None, {"Q4_0"})
    assert b.failure is None
    journal.close()


def test_another_entry_begins_anew_and_still_owns_its_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x")
    journal = BatchJournal(tmp_path / "journal.jsonl")
    journal.append(*EVENTS, FileMade("a", "level", str(file), stamp(file), "Q4_0"), StageBegan("a", "e9", "download"))
    assert journal.history.of("a").made == set()
    assert [*journal.history.of("a").files] == [str(file)]
    journal.close()


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event":"done"}\n{"event":"began","command":"","at":""}\n')
    with pytest.raises(InvalidDataError, match=r"journal\.jsonl cannot be read: line 1"):
        read_history(path)
    with pytest.raises(InvalidDataError):
        BatchJournal(path)


def test_two_batches_on_one_list_are_refused(tmp_path: Path) -> None:
    folder = BatchFolder.of(tmp_path / "m.yaml")
    with (
        hold_batch(folder, "first"),
        pytest.raises(WorkspaceLockedError, match="first") as caught,
        hold_batch(folder, "second"),
    ):
        pass
    assert caught.value.exit_code == 7
    with hold_batch(folder, "third"):
        append_addition(folder, [{"model": "a"}])
    append_addition(folder, ["b"])
    assert folder.additions.read_text() == '{"model":"a"}\n"b"\n'


def test_only_unchanged_files_are_removed(tmp_path: Path) -> None:
    """A file that somebody replaced, and a link's target outside the downloads, stay."""
    mine, changed, gone = (tmp_path / name for name in ("mine", "changed", "gone"))
    for path in (mine, changed, gone):
        path.write_bytes(b"made by the batch")
    downloads = tmp_path / "downloads"
    snapshot = downloads / "models--o--n" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    blob = downloads / "models--o--n" / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (snapshot / "m.gguf").symlink_to(blob)
    users = tmp_path / "users"
    users.write_bytes(b"the user's")
    (snapshot / "other.gguf").symlink_to(users)
    files = [
        FileMade("a", "level", str(path), stamp(path))
        for path in (mine, changed, gone, snapshot / "m.gguf", snapshot / "other.gguf")
    ]
    changed.write_bytes(b"put there by the user")
    gone.unlink()
    journal = BatchJournal(tmp_path / "journal.jsonl")
    journal.append(*files)
    said: list[Event] = []
    freed = remove_files(files, journal, downloads, said.append)
    assert freed == len(b"made by the batch") + len(b"weights") + len(b"the user's")
    assert not mine.exists()
    assert changed.read_bytes() == b"put there by the user"
    assert users.read_bytes() == b"the user's"
    assert [*downloads.rglob("*")] == []
    assert [event.level for event in said if isinstance(event, Notice)] == ["warning"]
    assert journal.history.of("a").files == {}
    assert isinstance(journal.history.of("a"), object)
    journal.append(FileRemoved("a", "never there"))
    journal.close()
