"""``publish`` when the hub or the way to it is in trouble: retried where that helps, else three lines and nothing half done."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from imatrix_runner.workspace import Workspace
from support.children import eventually
from support.command_line import started
from support.hub_server import HubServer, Request, be_quick_and_anonymous
from support.in_process import CommandLine
from support.mounts import mounted
from support.publishing import TO, TOKEN, contents, environment, expected, finished_levels, published, stored_once, titles
from support.workspaces import copy, run_here

COMMITS = ["Upload Q4_0", "Upload card, imatrix and report"]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One level without an imatrix, and a report."""
    folder = tmp_path_factory.mktemp("made")
    return run_here(folder, "run", tiny_model, "--imatrix", "none", "--levels", "Q4_0", "-t", "1")


@pytest.fixture
def own(made: Workspace, tmp_path: Path) -> Workspace:
    return copy(made, tmp_path / "work")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    be_quick_and_anonymous(monkeypatch, tmp_path)
    with HubServer(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def whole(hub: HubServer, workspace: Workspace) -> bool:
    """Whether the hub holds everything once, by the commits of an undisturbed command."""
    repository = published(hub)
    assert titles(repository) == COMMITS
    assert stored_once(hub)
    return expected(workspace).items() <= contents(repository).items()


@pytest.mark.parametrize(
    "where",
    [
        "GET /api/models/me",
        "GET /api/whoami",
        "POST /api/repos/create",
        "POST /api/models/me/Tiny-GGUF/preupload",
        "POST /me/Tiny-GGUF.git",
        "PUT /storage",
        "POST /api/models/me/Tiny-GGUF/commit",
    ],
)
@pytest.mark.parametrize(("status", "retry_after"), [(500, None), (429, 60)])
def test_what_passes_is_tried_again(
    own: Workspace, hub: HubServer, cli: CommandLine, where: str, status: int, retry_after: int | None
) -> None:
    trouble = hub.trouble
    trouble.status, trouble.retry_after, trouble.status_for, trouble.status_times = status, retry_after, where, 2
    done = cli("publish", own.root, "--to", TO)
    assert done.code == 0, done.err
    assert whole(hub, own)
    assert trouble.status_times == 0
    if retry_after == 60:
        assert "limits the rate of requests; the next attempt is in 1:00." in done.err


def test_what_does_not_pass_ends_with_code_4_and_continues_later(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    hub.trouble.status, hub.trouble.retry_after, hub.trouble.status_for = 429, 7200, "POST /api/models/me/Tiny-GGUF/commit"
    failed = cli("publish", own.root, "--to", TO)
    assert failed.code == 4
    assert "a pause of 2:00:00" in failed.err
    assert "Run the same command again" in failed.err
    hub.trouble.status = 0
    assert cli("publish", own.root, "--to", TO).code == 0
    assert whole(hub, own)


@pytest.mark.parametrize("part_bytes", [None, 300_000])
def test_cut_uploads_begin_again(own: Workspace, hub: HubServer, cli: CommandLine, part_bytes: int | None) -> None:
    hub.uploads.part_bytes = part_bytes
    hub.trouble.cut_uploads = 2
    done = cli("publish", own.root, "--to", TO)
    assert done.code == 0, done.err
    assert whole(hub, own)
    assert hub.trouble.cut_uploads == 0


@pytest.mark.parametrize("where", ["/commit/main", "/api/repos/create", "/lfs/verify", "/preupload/main"])
def test_a_lost_answer_makes_nothing_twice(own: Workspace, hub: HubServer, cli: CommandLine, where: str) -> None:
    hub.trouble.lose_answers_of, hub.trouble.lose_answers = where, 1
    done = cli("publish", own.root, "--to", TO)
    assert done.code == 0, done.err
    assert whole(hub, own)
    assert hub.trouble.lose_answers == 0


def test_a_commit_of_others_in_between_is_looked_at(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    """Someone commits a file just before each of ours: it stays, and ours follow it."""
    added: list[str] = []

    def commit_before(request: Request, done: bool) -> None:
        if request.path.endswith("/commit/main") and not done and len(added) < 2:
            added.append(f"notes-{len(added)}.txt")
            published(hub).add_commit("notes", "", {added[-1]: b"by hand"})

    hub.on_request = commit_before
    done = cli("publish", own.root, "--to", TO)
    assert done.code == 0, done.err
    assert {*added} <= {*published(hub).files}
    assert sorted(titles(published(hub))) == sorted([*COMMITS, "notes", "notes"])
    assert stored_once(hub)


def test_a_file_of_others_that_appears_in_between_is_kept(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    name = finished_levels(own)["Q4_0"].name

    def commit_before(request: Request, done: bool) -> None:
        if request.path.endswith("/commit/main") and not done and not published(hub).commits:
            published(hub).add_commit("mine", "", {name: b"by hand"})

    hub.on_request = commit_before
    refused = cli("publish", own.root, "--to", TO)
    assert refused.code == 6
    assert f"holds another {name}" in refused.err
    assert published(hub).files[name] == b"by hand"


def test_a_wrong_checksum_on_the_hub_is_noticed(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    hub.uploads.corrupt.add(finished_levels(own)["Q4_0"].name)
    failed = cli("publish", own.root, "--to", TO)
    assert failed.code == 4
    assert "does not hold tiny-Q4_0.gguf as it was uploaded" in failed.err


def test_settings_of_the_repository(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    collected = ("--collection", "me/Tiny models")
    done = cli("publish", own.root, "--to", TO, "--private", "--gated", "manual", "--licence", "mit", *collected)
    assert done.code == 0, done.err
    repository = published(hub)
    assert (repository.private, repository.gated) == (True, "manual")
    assert "license: mit" in repository.content("README.md").decode()
    (collection,) = hub.uploads.collections.values()
    assert collection.items == [TO]
    again = cli("publish", own.root, "--to", TO, "--private", *collected)
    assert again.code == 0, again.err
    assert collection.items == [TO]
    assert titles(repository) == COMMITS


def test_a_public_repository_does_not_become_private(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    hub.add(TO, {})
    refused = cli("publish", own.root, "--to", TO, "--private")
    assert refused.code == 4
    assert f"{TO} is public" in refused.err
    assert not published(hub).commits


@pytest.mark.parametrize("what", ["html", "answer"])
def test_what_is_no_hub_is_said_in_three_lines(own: Workspace, hub: HubServer, cli: CommandLine, what: str) -> None:
    hub.trouble.html = what == "html"
    hub.trouble.answer = b'{"id": 7, "sha": [], "siblings": 3}' if what == "answer" else None
    refused = cli("publish", own.root, "--to", TO)
    assert refused.code == 4
    assert "does not answer like a hub" in refused.err
    assert "Traceback" not in refused.err


def test_a_full_disk_is_told_and_loses_nothing(own: Workspace, hub: HubServer, cli: CommandLine, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as disk:
        workspace = copy(own, disk)
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        done = cli("publish", workspace.root, "--to", TO)
        assert done.code == 8, done.err
        assert "Traceback" not in done.err
        assert expected(workspace) == expected(own)
        (disk / "filler").unlink()
        again = cli("publish", workspace.root, "--to", TO)
        assert again.code == 0, again.err
        assert whole(hub, workspace)


def test_a_clock_that_was_set_back_changes_nothing(
    own: Workspace, hub: HubServer, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("publish", own.root, "--to", TO).code == 0
    there = contents(published(hub))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1e8)
    done = cli("publish", own.root, "--to", TO)
    assert done.code == 0, done.err
    assert contents(published(hub)) == there
    assert whole(hub, own)


def test_ctrl_c_ends_a_slow_upload_at_once(own: Workspace, hub: HubServer, tmp_path: Path) -> None:
    hub.trouble.upload_bytes_per_second = 2000.0
    sending = [False]

    def see(request: Request, done: bool) -> None:
        sending[0] = sending[0] or request.path.startswith("/storage/")

    hub.on_request = see
    with started("publish", own.root, "--to", TO, cwd=tmp_path, env=environment(hub)) as running:
        running.wait_for(lambda: sending[0])
        running.process.poll()
        import os

        os.kill(running.pid, signal.SIGINT)
        assert eventually(lambda: running.process.poll() is not None)
        ended = running.finish()
    assert ended.code == 130
    assert "Continue with: imatrix-runner publish" in ended.err
