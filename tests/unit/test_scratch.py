"""Temporary folders say whose they are; those of the dead are cleared away, those of the living are not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.scratch import PREFIX, remove_abandoned, scratch_folder
from support.children import python

HOLDER = """
    import sys
    from pathlib import Path
    from imatrix_runner.scratch import scratch_folder
    with scratch_folder(Path(sys.argv[1])) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        print(folder, flush=True)
        sys.stdin.read()
"""


def test_a_folder_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(PREFIX)
        assert os.name == "nt" or folder.stat().st_mode & 0o77 == 0
        assert remove_abandoned(tmp_path) == 0
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_later_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    command = python(HOLDER, tmp_path).argv
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            folder = Path(holder.stdout.readline().decode().strip())
            assert remove_abandoned(tmp_path) == 0
            assert (folder / "deep" / "file").is_file()
        finally:
            holder.kill()
    assert remove_abandoned(tmp_path) == 1
    assert not folder.exists()


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Folders of other programs, of other machines (in a shared place), of a reused process number's owner, and links."""
    with scratch_folder(tmp_path) as living:
        machine, pid, began, _ = living.name.removeprefix(PREFIX).split("-")
        elsewhere = "0" * 8 if machine != "0" * 8 else "1" * 8
        kept = [f"{PREFIX}{elsewhere}-{pid}-1-abc", f"{PREFIX}release", f"other-{machine}-{pid}-1-abc"]
        for name in kept:
            (tmp_path / name).mkdir()
        target = tmp_path / "target"
        target.mkdir()
        (tmp_path / f"{PREFIX}{machine}-{pid}-1-link").symlink_to(target)
        (tmp_path / f"{PREFIX}{machine}-{pid}-{int(began) - 60_000}-abc").mkdir()  # the number's owner of a minute before
        assert remove_abandoned(tmp_path) == 1
        assert living.is_dir()
        assert target.is_dir()
        assert all((tmp_path / name).is_dir() for name in kept)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="making a temporary folder"), scratch_folder(tmp_path / "none"):
        pytest.fail("it was made")
    assert remove_abandoned(tmp_path / "none") == 0
