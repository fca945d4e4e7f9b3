"""``run --publish``: levels are uploaded while others are made, and a failing upload does not lose the run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.children import eventually
from support.hub_server import HubServer, Request, be_quick_and_anonymous
from support.in_process import CommandLine
from support.publishing import TO, TOKEN, published, stored_once, titles

RUN = ("--imatrix", "none", "-t", "1", "--publish", TO)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    be_quick_and_anonymous(monkeypatch, tmp_path)
    with HubServer(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_level_is_uploaded_while_the_next_is_made(tiny_model: Path, tmp_path: Path, hub: HubServer, cli: CommandLine) -> None:
    """The upload of the first level is answered only once the second exists."""
    second = tmp_path / "work" / "tiny" / "tiny-Q8_0.gguf"
    overlapped = threading.Event()

    def wait_for_the_second(request: Request, done: bool) -> None:
        if request.path.startswith("/storage/") and not done and not overlapped.is_set():
            assert eventually(second.exists)
            overlapped.set()

    hub.on_request = wait_for_the_second
    done = cli("run", tiny_model, *RUN, "--levels", "Q4_0,Q8_0", "--one-by-one", "--json")
    assert done.code == 0, done.err
    assert overlapped.is_set()
    assert titles(published(hub)) == ["Upload Q4_0", "Upload Q8_0", "Upload card, imatrix and report"]
    assert done.document["published"]["verified"]
    assert stored_once(hub)


def test_a_failing_upload_leaves_the_levels_and_the_command(
    tiny_model: Path, tmp_path: Path, hub: HubServer, cli: CommandLine
) -> None:
    hub.trouble.status, hub.trouble.status_for = 403, "POST /api/repos/create"
    failed = cli("run", tiny_model, *RUN, "--levels", "Q4_0", "--private")
    assert failed.code == 4
    root = tmp_path / "work" / "tiny"
    assert (root / "tiny-Q4_0.gguf").is_file()
    command = f"imatrix-runner publish {root} --to {TO} --private"
    assert command in failed.err
    hub.trouble.status = 0
    again = cli(*command.split()[1:])
    assert again.code == 0, again.err
    assert published(hub).private


def test_what_would_refuse_the_upload_is_found_before_any_work(
    tiny_model: Path, tmp_path: Path, hub: HubServer, cli: CommandLine
) -> None:
    hub.uploads.account.role = "read"
    refused = cli("run", tiny_model, *RUN, "--levels", "Q4_0")
    assert refused.code == 4
    assert not list((tmp_path / "work").rglob("*.gguf"))
    hub.uploads.account.role = "write"
    badly_named = cli("run", tiny_model, *RUN, "--levels", "Q4_0", "--name-template", "model")
    assert badly_named.code == 2
    assert "--name-template" in badly_named.err
    assert not list((tmp_path / "work").rglob("*.gguf"))


def test_levels_that_are_there_are_published_too(tiny_model: Path, hub: HubServer, cli: CommandLine) -> None:
    assert cli("run", tiny_model, "--imatrix", "none", "-t", "1", "--levels", "Q4_0").code == 0
    done = cli("run", tiny_model, *RUN, "--levels", "Q4_0", "--json")
    assert done.code == 0, done.err
    assert [level["status"] for level in done.document["levels"]] == ["skipped"]
    assert titles(published(hub)) == ["Upload Q4_0", "Upload card, imatrix and report"]


def test_options_without_publish_are_said_to_do_nothing(tiny_model: Path, hub: HubServer, cli: CommandLine) -> None:
    said = cli("run", tiny_model, "--imatrix", "none", "--levels", "Q4_0", "--dry-run", "--private")
    assert "--private has no effect: nothing is published without --publish." in said.err


def test_a_name_that_others_have_taken_is_found_before_any_work(
    tiny_model: Path, tmp_path: Path, hub: HubServer, cli: CommandLine
) -> None:
    hub.add(TO, {"tiny-Q4_0.gguf": b"GGUF of others"})
    refused = cli("run", tiny_model, *RUN, "--levels", "Q4_0")
    assert refused.code == 6
    assert f"{TO} holds another tiny-Q4_0.gguf" in refused.err
    assert not list((tmp_path / "work").rglob("*.gguf"))
