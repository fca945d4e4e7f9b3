"""Every error says what, why and what to do, and its class decides the exit code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from imatrix_runner import errors
from imatrix_runner.errors import InvalidDataError, NoSpaceError, RunnerError, from_os_error

EXIT_CODES = {
    "UsageError": 2,
    "ToolchainError": 3,
    "DownloadError": 4,
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


def test_a_forbidden_path_is_not_called_a_broken_disk() -> None:
    assert "permission" in from_os_error(PermissionError(errno.EACCES, "no"), "reading").what.lower()


def test_the_path_comes_from_the_error_when_none_is_given() -> None:
    assert from_os_error(OSError(errno.EIO, "bad", "/disk/y"), "reading").why == "/disk/y: bad"
    assert from_os_error(OSError("nothing known"), "reading").why == "nothing known"
