"""Every error says what, why and what to do, and its class decides the exit code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from imatrix_runner import errors
from imatrix_runner.errors import InvalidDataError, NoSpaceError, RunnerError, from_lock_error, from_os_error

EXIT_CODES = {
    "UsageError": 2,
    "ToolchainError": 3,
    "DownloadError": 4,
    "UploadError": 4,
    "EngineError": 5,
    "InvalidDataError": 6,
    "WorkspaceLockedError": 7,
    "NoSpaceError": 8,
    "SomeLevelsFailedError": 100,
    "InterruptedRunError": 130,
}


def test_exit_codes_are_the_documented_ones() -> None:
    assert {kind.__name__: kind.exit_code for kind in RunnerError.__subclasses__()} == EXIT_CODES


def test_every_kind_has_a_name_of_its_own() -> None:
    kinds = [kind.kind for kind in (RunnerError, *RunnerError.__subclasses__())]
    assert len(set(kinds)) == len(kinds)


def test_an_error_keeps_its_three_sentences_and_reads_as_one_line() -> None:
    error = errors.UsageError("A", "because", "do this")
    assert (error.what, error.why, error.todo) == ("A", "because", "do this")
    assert str(error) == "A: because"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EACCES, InvalidDataError),
        (errno.EROFS, InvalidDataError),
        (errno.ENOENT, InvalidDataError),
        (errno.EIO, InvalidDataError),
    ],
)
def test_os_errors_are_translated(number: int, kind: type[RunnerError]) -> None:
    translated = from_os_error(OSError(number, os.strerror(number)), "writing x", Path("/some/x"))
    assert type(translated) is kind
    assert "writing x" in translated.what
    assert translated.why == f"/some/x: {os.strerror(number)}"
    assert translated.todo


@pytest.mark.parametrize(
    ("number", "what", "todo"),
    [
        (errno.ENOSPC, "The disk is full", "Free some space"),
        (errno.EDQUOT, "The disk quota is used up", "larger quota"),
        (errno.EROFS, "The file system is read-only", "--work-dir"),
        (errno.EFBIG, "too large for this file system", "ulimit -f"),
        (errno.ENAMETOOLONG, "name is too long", "shorter"),
        (errno.EIO, "input/output error", "Check the disk"),
        (errno.ESTALE, "network file system", "Mount it again"),
        (errno.ENOLCK, "cannot lock files", "local disk"),
        (errno.EMFILE, "Too many files are open", "ulimit -n"),
        (errno.ELOOP, "symbolic link", "Remove the link"),
    ],
)
def test_each_trouble_of_a_file_system_has_its_own_words(number: int, what: str, todo: str) -> None:
    error = from_os_error(OSError(number, os.strerror(number)), "writing x", "/some/x")
    assert what in error.what
    assert error.what.endswith("while writing x")
    assert todo in error.todo


def test_what_is_not_supported_is_the_lock_where_one_is_taken() -> None:
    for number in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
        assert "cannot lock files" in from_lock_error(OSError(number, "no"), "opening it", Path("/w")).what
    assert "cannot lock files" in from_lock_error(NotImplementedError("no flock"), "opening it", Path("/w")).what
    assert "No permission" in from_lock_error(PermissionError(errno.EACCES, "no"), "opening it", Path("/w")).what


def test_a_forbidden_path_is_not_called_a_broken_disk() -> None:
    assert "permission" in from_os_error(PermissionError(errno.EACCES, "no"), "reading").what.lower()


def test_the_path_comes_from_the_error_when_none_is_given() -> None:
    assert from_os_error(OSError(errno.EIO, "bad", "/disk/y"), "reading").why == "/disk/y: bad"
    assert from_os_error(OSError("nothing known"), "reading").why == "nothing known"
