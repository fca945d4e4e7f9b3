"""One writer per workspace; a dead one's lock and children are taken care of."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from imatrix_runner.errors import InvalidDataError, WorkspaceLockedError
from imatrix_runner.files import write_json
from imatrix_runner.workspace import Owner, Workspace, hold, identity, read_owner
from support.children import eventually, is_running, python

COMMAND = "imatrix-runner run m.gguf"

# Holds the workspace argv[1] and a child that would run for ever; says its pid; waits for its stdin to close.
HOLDER = f"""
    import sys, threading
    from pathlib import Path
    from imatrix_runner.process import Command, Runner
    from imatrix_runner.workspace import Workspace, hold
    with hold(Workspace(Path(sys.argv[1]), "m"), {COMMAND!r}) as held:
        def on_child(pid, alive):
            held.on_child(pid, alive)
            print(pid, flush=True)
        sleep = Command((sys.executable, "-c", "import time; time.sleep(600)"))
        runner = Runner(on_child=on_child, mark=held.mark)
        threading.Thread(target=runner.run, args=(sleep,), daemon=True).start()
        sys.stdin.read()
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "m", "m")


@contextmanager
def held_elsewhere(workspace: Workspace) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The workspace is held by another process: that process, and its child's pid."""
    with subprocess.Popen(python(HOLDER, workspace.root).argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            yield holder, child
        finally:
            holder.kill()
            if is_running(child):
                psutil.Process(child).kill()


def owner(**changes: object) -> Owner:
    ours = Owner(os.getpid(), psutil.Process().create_time(), socket.gethostname(), COMMAND, "2026-01-01T00:00:00+0000")
    return replace(ours, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", range(4))
def test_an_imatrix_is_found_by_the_documented_order_of_names(workspace: Workspace, first: int) -> None:
    names = ["imatrix.dat", "imatrix.gguf", "m.imatrix", "m-imatrix.gguf"]
    workspace.root.mkdir()
    for name in names[first:]:
        (workspace.root / name).touch()
    assert workspace.find_imatrix() == workspace.root / names[first]


def test_no_imatrix_no_path(workspace: Workspace) -> None:
    assert workspace.find_imatrix() is None
    (workspace.root / "imatrix.dat").mkdir(parents=True)
    (workspace.root / "imatrix.gguf.part").touch()
    (workspace.root / "other-imatrix.gguf").touch()
    assert workspace.find_imatrix() is None


def test_paths_carry_the_model_and_the_level(workspace: Workspace) -> None:
    assert workspace.level_file("Q4_K_M").name == "m-Q4_K_M.gguf"
    assert workspace.log("level-Q4_K_M") == workspace.root / "logs" / "level-Q4_K_M.log"
    assert not workspace.root.exists()


def test_holding_tells_who_holds_and_leaves_nothing_behind(workspace: Workspace) -> None:
    with hold(workspace, COMMAND) as held:
        told = read_owner(workspace)
        assert told is not None
        assert (told.pid, told.command, told.alive) == (os.getpid(), COMMAND, True)
        assert held.orphans == 0
    assert read_owner(workspace) is None


def test_a_workspace_can_be_held_again_after_an_error(workspace: Workspace) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold(workspace, COMMAND):
            raise ZeroDivisionError


def test_a_held_workspace_is_refused_and_its_owner_named(workspace: Workspace) -> None:
    with held_elsewhere(workspace) as (holder, _):
        with pytest.raises(WorkspaceLockedError) as caught, hold(workspace, "another"):
            pytest.fail("two held it")
        assert f"process {holder.pid} on {socket.gethostname()}" in caught.value.why
        assert COMMAND in caught.value.why
        told = read_owner(workspace)
        assert told is not None
        assert told.command == COMMAND  # the refused one did not write itself in


def test_one_process_cannot_hold_twice(workspace: Workspace) -> None:
    with hold(workspace, COMMAND), pytest.raises(WorkspaceLockedError), hold(workspace, COMMAND):
        pytest.fail("two held it")


def test_a_killed_owner_is_succeeded_and_its_children_ended(workspace: Workspace) -> None:
    with held_elsewhere(workspace) as (holder, child):
        holder.kill()
        holder.wait()
        assert is_running(child)
        with hold(workspace, COMMAND) as held:
            assert held.orphans == 1
            assert not is_running(child)
        with hold(workspace, COMMAND) as held:
            assert held.orphans == 0


@pytest.fixture
def stranger() -> Iterator[psutil.Process]:
    """A process that has nothing to do with us."""
    with subprocess.Popen(python("import time; time.sleep(600)").argv) as child:
        try:
            yield psutil.Process(child.pid)
        finally:
            child.kill()


def test_a_process_of_another_program_is_left_alone(workspace: Workspace, stranger: psutil.Process) -> None:
    """A file that names a living process of anybody's with the right start, as a copied or a forged one can."""
    write_json(workspace.owner, owner(children={str(stranger.pid): stranger.create_time(), "x": 1.0, "-1": 1.0}))
    with hold(workspace, COMMAND) as held:
        assert held.orphans == 0
    assert is_running(stranger.pid)


def test_a_copy_of_a_held_workspace_is_free_and_ends_nothing(workspace: Workspace, tmp_path: Path) -> None:
    with held_elsewhere(workspace) as (holder, child):
        copy = Workspace(tmp_path / "copy", "m")
        shutil.copytree(workspace.root, copy.root)
        assert read_owner(copy) is None
        assert eventually(lambda: (told := read_owner(workspace)) is not None and str(child) in told.children)
        with hold(copy, COMMAND) as held:
            assert held.orphans == 0
        # Also one whose file claims to be of the copy.
        told = read_owner(workspace)
        assert told is not None
        write_json(copy.owner, replace(told, workspace=identity(copy)))
        with hold(copy, COMMAND) as held:
            assert held.orphans == 0
        assert is_running(child)
        assert holder.poll() is None


@pytest.mark.parametrize(
    "place", ["logs/imatrix.log", ".journal.json.part", ".lock", ".partial/Q4_0/level.gguf", ".twins/.lock"]
)
@pytest.mark.parametrize("exists", [True, False])
def test_links_out_of_a_workspace_are_not_written_through(
    workspace: Workspace, tmp_path: Path, place: str, exists: bool
) -> None:
    target = tmp_path / "profile"
    if exists:
        target.write_text("mine")
    link = workspace.root / place
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(InvalidDataError, match="symbolic link") as caught, hold(workspace, COMMAND):
        pytest.fail("held")
    assert str(link) in caught.value.why
    assert target.exists() is exists
    assert not exists or target.read_text() == "mine"


def test_links_to_folders_and_of_inputs_may_be_there(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "imatrix.dat").touch()
    workspace.root.mkdir()
    workspace.evaluation.symlink_to(tmp_path / "large")
    (workspace.root / "imatrix.dat").symlink_to(tmp_path / "imatrix.dat")
    with hold(workspace, COMMAND) as held:
        assert held.orphans == 0


def test_a_renamed_workspace_still_knows_its_orphans(workspace: Workspace, tmp_path: Path) -> None:
    with held_elsewhere(workspace) as (holder, child):
        assert eventually(lambda: (told := read_owner(workspace)) is not None and str(child) in told.children)
        holder.kill()
        holder.wait()
        moved = Workspace(workspace.root.rename(tmp_path / "moved"), "m")
        with hold(moved, COMMAND) as held:
            assert held.orphans == 1
        assert not is_running(child)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(workspace: Workspace, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(InvalidDataError, match="cannot lock files while opening") as caught, hold(workspace, COMMAND):
        pytest.fail("held without a lock")
    assert os.strerror(number) in caught.value.why
    assert "--work-dir" in caught.value.todo


@pytest.mark.parametrize(("host", "born"), [(socket.gethostname(), 1.0), ("elsewhere", None)])
def test_a_reused_pid_and_another_machine_are_left_alone(
    workspace: Workspace, stranger: psutil.Process, host: str, born: float | None
) -> None:
    """The stranger merely has the number of an orphan: born at another time, or on a machine that is not this one."""
    write_json(workspace.owner, owner(host=host, children={str(stranger.pid): born or stranger.create_time()}))
    with hold(workspace, COMMAND) as held:
        assert held.orphans == 0
    assert is_running(stranger.pid)


def test_an_owner_is_alive_only_as_the_same_process_on_this_machine() -> None:
    assert owner().alive
    assert not owner(created=1.0).alive
    assert not owner(host="elsewhere").alive
    gone = subprocess.Popen(python("").argv)
    gone.wait()
    assert not owner(pid=gone.pid).alive


def test_a_torn_owner_file_is_as_good_as_none(workspace: Workspace) -> None:
    workspace.root.mkdir()
    workspace.owner.write_bytes(b'{"pid": 1')
    assert read_owner(workspace) is None
    with hold(workspace, COMMAND):
        assert read_owner(workspace) is not None


def test_children_are_listed_while_they_live(workspace: Workspace) -> None:
    def listed() -> set[str]:
        told = read_owner(workspace)
        return set(told.children) if told is not None else set()

    with hold(workspace, COMMAND) as held:
        held.on_child(os.getpid(), True)
        assert listed() == {str(os.getpid())}
        held.on_child(os.getpid(), False)
        assert listed() == set()


def test_a_place_that_cannot_hold_a_workspace_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidDataError, match="opening the workspace"), hold(Workspace(tmp_path / "file" / "m", "m"), COMMAND):
        pytest.fail("held nothing")
