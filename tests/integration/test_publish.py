"""``publish`` against a loopback hub: what is uploaded, what is refused, and what the hub holds afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from huggingface_hub import ModelCard, get_session

from imatrix_runner.files import sha256
from imatrix_runner.journal import Journal
from imatrix_runner.models.hub.limits import _ask_for_gzip, _bound
from imatrix_runner.models.hub.transfer import _refuse_long_wait, _refuse_odd_etag
from imatrix_runner.workspace import Workspace
from support.dialogues import TEMPLATE
from support.hub_server import HubServer, Request, be_quick_and_anonymous
from support.in_process import CommandLine
from support.publishing import LEVELS, RUN, TO, TOKEN, contents, expected, finished_levels, published, stored_once, titles
from support.tiny_models import write_llama_gguf
from support.workspaces import copy, run_here

TITLES = [*(f"Upload {level}" for level in LEVELS), "Upload card, imatrix and report"]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two levels with an imatrix and a report."""
    return run_here(tmp_path_factory.mktemp("made"), "run", tiny_model, *RUN, "-f", tiny_text)


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


def test_all_of_a_workspace_is_published_once(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    done = cli("publish", own.root, "--to", TO, "--json")
    assert done.code == 0, done.err
    repository, document = published(hub), done.document
    assert expected(own).items() <= contents(repository).items()
    assert {"README.md", "report.html", "report.json", "imatrix.gguf"} <= {*contents(repository)}
    assert sorted(titles(repository)) == sorted(TITLES)
    assert titles(repository)[-1] == TITLES[-1]
    assert document["verified"]
    assert document["commit"] == repository.commit
    assert {file["status"] for file in document["files"]} == {"uploaded"}
    assert stored_once(hub)
    assert f"hf download {TO}" in repository.content("README.md").decode()

    again = cli("publish", own.root, "--to", TO, "--json")
    assert {file["status"] for file in again.document["files"]} == {"there"}
    assert len(titles(repository)) == len(TITLES)
    assert stored_once(hub)


def test_a_dry_run_shows_what_would_come_and_writes_nothing(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.root.rglob("*")}
    planned = cli("publish", own.root, "--to", TO, "--dry-run", "--json").document["planned"]
    assert {file["state"] for file in planned} == {"missing"}
    assert hub.find(TO) is None
    assert before == {path: path.stat().st_mtime_ns for path in own.root.rglob("*")}
    cli("publish", own.root, "--to", TO)
    again = cli("publish", own.root, "--to", TO, "--dry-run")
    assert again.code == 0
    assert "0 files to upload" in again.out


def test_only_the_hub_sees_the_token(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    done = cli("publish", own.root, "--to", TO, "-v")
    storage = [request for request in hub.requests if request.path.startswith("/storage/")]
    assert storage
    assert not any("authorization" in request.headers for request in storage)
    assert TOKEN not in done.out + done.err
    assert not any(TOKEN.encode() in path.read_bytes() for path in own.root.rglob("*") if path.is_file())


def test_it_leaves_nothing_in_the_session_that_all_of_the_process_share(
    own: Workspace, hub: HubServer, cli: CommandLine
) -> None:
    """What is asked of another hub afterwards has a token of its own."""
    before = {name: list(hooks) for name, hooks in get_session().event_hooks.items()}
    assert cli("publish", own.root, "--to", TO, "--levels", LEVELS[0]).code == 0
    assert set(get_session().event_hooks["request"]) - set(before["request"]) <= {_ask_for_gzip}
    assert set(get_session().event_hooks["response"]) - set(before["response"]) <= {_bound, _refuse_long_wait, _refuse_odd_etag}


def test_files_of_others_are_not_overwritten(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    name = finished_levels(own)["Q4_K_M"].name
    theirs = hub.add(TO, {name: b"GGUF of somebody else"})
    planned = cli("publish", own.root, "--to", TO, "--dry-run")
    assert planned.code == 6
    assert "another file of this name" in planned.out
    refused = cli("publish", own.root, "--to", TO)
    assert refused.code == 6
    assert f"{TO} holds another {name}" in refused.err
    assert theirs.files == {name: b"GGUF of somebody else"}


def test_a_level_that_changed_is_not_published(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    with finished_levels(own)["Q8_0"].open("ab") as file:
        file.write(b"x")
    refused = cli("publish", own.root, "--to", TO)
    assert refused.code == 6
    assert "Q8_0 is not what was verified" in refused.err
    assert hub.find(TO) is None


def test_a_level_that_was_removed_counts_if_the_hub_has_it(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    assert cli("publish", own.root, "--to", TO).code == 0
    finished_levels(own)["Q8_0"].unlink()
    again = cli("publish", own.root, "--to", TO, "--json")
    assert again.code == 0, again.err
    assert published(hub).commits[-1].changed[0] != finished_levels(own)["Q8_0"].name


@pytest.mark.parametrize(
    ("role", "repo", "message"),
    [
        ("read", TO, "may only read"),
        ("write", "others/Tiny-GGUF", "not a member of others"),
        ("write", "guests/Tiny-GGUF", "has the role read in guests"),
    ],
)
def test_a_token_that_may_not_write_is_refused_at_once(
    own: Workspace, hub: HubServer, cli: CommandLine, role: str, repo: str, message: str
) -> None:
    hub.uploads.account.role = role
    hub.uploads.account.organisations["guests"] = "read"
    refused = cli("publish", own.root, "--to", repo)
    assert refused.code == 4
    assert message in refused.err
    assert not hub.uploads.stored


def test_without_a_token_nothing_is_asked(
    own: Workspace, hub: HubServer, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused = cli("publish", own.root, "--to", TO)
    assert refused.code == 4
    assert "There is no token" in refused.err
    assert not hub.requests


def test_a_renamed_repository_is_named(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    hub.add("me/New-GGUF", {})
    hub.renamed[TO] = "me/New-GGUF"
    refused = cli("publish", own.root, "--to", TO)
    assert refused.code == 4
    assert "--to me/New-GGUF" in refused.err
    assert not published(hub, "me/New-GGUF").files


def test_the_card_lists_what_the_repository_has(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    """One level now, the other later: the card never names a file that is not there."""
    assert cli("publish", own.root, "--to", TO, "--levels", "Q8_0").code == 0
    repository = published(hub)
    assert "Q4_K_M.gguf" not in repository.content("README.md").decode()
    assert cli("publish", own.root, "--to", TO, "--levels", "Q4_K_M").code == 0
    card = repository.content("README.md").decode()
    assert "Q4_K_M.gguf" in card
    assert "Q8_0.gguf" in card


def test_what_a_person_wrote_into_the_card_stays(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    """Published, edited in a browser, published again and again, with a level more: the edit stays, the rest is renewed."""
    assert cli("publish", own.root, "--to", TO, "--levels", "Q8_0").code == 0
    repository = published(hub)
    written = repository.content("README.md").decode()
    edited = written.replace("## How it was made", "## Thanks\n\nTo all.\n\n## How it was made").replace(
        "by imatrix-runner", "by hand and by"
    )
    edited = edited.replace("library_name: gguf", "library_name: gguf\nthumbnail: https://example.org/x.png").replace(
        "\n", "\r\n"
    )
    repository.add_commit("Update README.md", "", {"README.md": edited.encode()})
    same = cli("publish", own.root, "--to", TO, "--levels", "Q8_0")
    assert same.code == 0, same.err
    assert "Warning" not in same.err
    assert repository.content("README.md") == edited.encode()
    assert titles(repository)[-1] == "Update README.md"
    more = cli("publish", own.root, "--to", TO)
    assert more.code == 0, more.err
    card = ModelCard(repository.content("README.md").decode())
    assert "## Thanks\n\nTo all.\n\n## How it was made" in card.text
    assert "by hand and by" in card.text
    assert "Q4_K_M.gguf" in card.text
    assert (card.data.get("thumbnail"), card.data.get("library_name")) == ("https://example.org/x.png", "gguf")
    assert (
        "Warning: The card keeps the section 'tiny GGUF' as it was edited on the hub; the new report has another." in more.err
    )
    n_commits = len(titles(repository))
    assert cli("publish", own.root, "--to", TO).code == 0
    assert len(titles(repository)) == n_commits


def test_a_lost_level_is_left_out_unless_it_is_named(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    finished_levels(own)["Q8_0"].unlink()
    done = cli("publish", own.root, "--to", TO)
    assert done.code == 0, done.err
    assert "Q8_0 is left out" in done.err
    refused = cli("publish", own.root, "--to", TO, "--levels", "Q8_0")
    assert refused.code == 6
    assert "neither in the workspace any more" in refused.err


def test_a_secret_stops_everything_and_is_not_repeated(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    Journal(own.journal).remember(quantized_by=f"me {TOKEN}")
    for further in ((), ("--dry-run",)):
        refused = cli("publish", own.root, "--to", TO, *further)
        assert refused.code == 6
        assert "a file holds a secret or a path of this machine" in refused.err
        assert "README.md" in refused.err
        assert TOKEN not in refused.err
    assert hub.find(TO) is None


def test_a_template_that_differs_from_the_source_is_told(tmp_path: Path, hub: HubServer, cli: CommandLine) -> None:
    model = write_llama_gguf(tmp_path / "chat-BF16.gguf", metadata={"tokenizer.chat_template": TEMPLATE})
    override = ("--override-kv", "tokenizer.chat_template=str:{{ messages[0].content }}<|im_end|>")
    assert cli("run", model, "--imatrix", "none", "--levels", "Q4_0", "-t", "1", *override).code == 0
    done = cli("publish", model, "--to", TO)
    assert done.code == 0, done.err
    assert "Warning: Chat template:" in done.err
    assert "<|im_end|>" in done.err


def test_a_projector_comes_along(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    for name, architecture in ((f"mmproj-{own.model}-BF16.gguf", "clip"), (f"mmproj-{own.model}-F16.gguf", "llama")):
        writer = GGUFWriter(own.root / name, architecture)
        writer.add_tensor("v.weight", np.zeros((2, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert cli("publish", own.root, "--to", TO).code == 0
    assert f"mmproj-{own.model}-BF16.gguf" in published(hub).files
    assert f"mmproj-{own.model}-F16.gguf" not in published(hub).files


def test_another_file_of_a_label_is_told(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    hub.add(TO, {"Old-Q8_0.gguf": b"GGUF"})
    done = cli("publish", own.root, "--to", TO)
    assert done.code == 0
    assert "also holds Old-Q8_0.gguf, which programs may load instead of tiny-Q8_0.gguf" in done.err


def test_a_split_level_is_published_in_a_folder(tiny_model: Path, tmp_path: Path, hub: HubServer, cli: CommandLine) -> None:
    made = cli("run", tiny_model, "--imatrix", "none", "--levels", "Q4_0", "-t", "1", "--split-max-tensors", "12")
    assert made.code == 0, made.err
    done = cli("publish", tiny_model, "--to", TO, "--json")
    assert done.code == 0, done.err
    shards = [file["name"] for file in done.document["files"] if file["level"]]
    assert len(shards) > 1
    assert shards[0] == f"tiny-Q4_0/tiny-Q4_0-00001-of-0000{len(shards)}.gguf"
    assert titles(published(hub))[0] == "Upload Q4_0"
    assert shards[0] in published(hub).content("README.md").decode()
    assert cli("publish", tiny_model, "--to", TO, "--dry-run").out.count("is there") == len(done.document["files"])


def test_a_level_that_changes_while_others_are_uploaded_is_refused(own: Workspace, hub: HubServer, cli: CommandLine) -> None:
    """Nothing but what was verified, at the time of its own upload."""
    files = finished_levels(own)

    def change_the_other(request: Request, done: bool) -> None:
        if request.path.endswith("/commit/main") and not done and not published(hub).commits:
            (later,) = (path for path in files.values() if sha256(path) not in hub.uploads.blobs)
            with later.open("ab") as file:
                file.write(b"x")

    hub.on_request = change_the_other
    refused = cli("publish", own.root, "--to", TO)
    assert refused.code == 6
    assert "is not what was verified" in refused.err
    assert len(published(hub).commits) == 1
