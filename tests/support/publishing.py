"""A finished workspace to publish, and what a loopback hub holds afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from imatrix_runner.journal import Journal
from imatrix_runner.workspace import Workspace
from support.hub_repository import Repository
from support.hub_server import HubServer

TO = "me/Tiny-GGUF"
TOKEN = "hf_" + "x" * 34
LEVELS = ("Q8_0", "Q4_K_M")
RUN = ("--levels", ",".join(LEVELS), "-c", "128", "--chunks", "4", "-t", "1")


def environment(hub: HubServer) -> dict[str, str]:
    """For a command that publishes to the hub."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def published(hub: HubServer, repo: str = TO) -> Repository:
    found = hub.find(repo)
    assert found is not None
    return found


def contents(repository: Repository) -> dict[str, str]:
    """The hash of every file that was uploaded, by name."""
    names = [name for name in repository.files if name != ".gitattributes"]
    return {name: hashlib.sha256(repository.content(name)).hexdigest() for name in sorted(names)}


def expected(workspace: Workspace) -> dict[str, str]:
    """The hashes of levels and imatrix, by name, as they are in the workspace."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in workspace.root.glob("*.gguf")}


def titles(repository: Repository) -> list[str]:
    return [commit.title for commit in repository.commits]


def stored_once(hub: HubServer) -> bool:
    """Whether every large file arrived once."""
    return len(hub.uploads.stored) == len({*hub.uploads.stored})


def finished_levels(workspace: Workspace) -> Mapping[str, Path]:
    journal = Journal(workspace.journal)
    return {name: workspace.root / record.output.name for name, record in journal.of_kind("level").items()}
