"""``publish`` killed at its requests: the same command ends with the same repository, every file once, no commit twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.workspace import Workspace
from support.hub_server import HubServer
from support.publishing import RUN, TO, TOKEN, contents, publish_and_kill, published, run_and_kill, stored_once, titles
from support.workspaces import run_here

POINTS = 54
"""Of an undisturbed command: 27 requests, each when it comes and when it was done."""
EVERY = 5


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two levels with an imatrix, and the report that is published."""
    workspace = run_here(tmp_path_factory.mktemp("made"), "run", tiny_model, *RUN, "-f", tiny_text)
    with HubServer(token=TOKEN) as hub:
        undisturbed, _ = publish_and_kill(hub, workspace, workspace.root.parent, None)
        assert undisturbed is not None
        assert undisturbed.code == 0, undisturbed.err
    return workspace


@pytest.fixture(scope="module")
def undisturbed(made: Workspace) -> tuple[dict[str, str], list[str]]:
    """The repository's files and commits after a command that nothing befell."""
    with HubServer(token=TOKEN) as hub:
        _, points = publish_and_kill(hub, made, made.root.parent, None)
        assert points == POINTS
        return contents(published(hub)), titles(published(hub))


@pytest.mark.parametrize("point", range(1, POINTS, EVERY))
def test_a_killed_command_is_continued_from_the_hub(
    made: Workspace, undisturbed: tuple[dict[str, str], list[str]], tmp_path: Path, point: int
) -> None:
    with HubServer(token=TOKEN) as hub:
        ended, _ = publish_and_kill(hub, made, tmp_path, point)
        assert ended is None
        done, _ = publish_and_kill(hub, made, tmp_path, None)
        assert done is not None
        assert done.code == 0, done.err
        assert (contents(published(hub)), titles(published(hub))) == undisturbed
        assert stored_once(hub)


def test_killed_again_and_again_it_still_ends(
    made: Workspace, undisturbed: tuple[dict[str, str], list[str]], tmp_path: Path
) -> None:
    """Each command gets one point further than the one before."""
    with HubServer(token=TOKEN) as hub:
        for point in range(5, POINTS, 12):
            publish_and_kill(hub, made, tmp_path, point)
        publish_and_kill(hub, made, tmp_path, None)
        assert (contents(published(hub)), titles(published(hub))) == undisturbed


@pytest.mark.parametrize("point", [12, 23, 37])
def test_a_killed_run_that_publishes_continues(tiny_model: Path, tmp_path: Path, point: int) -> None:
    """Two levels, one by one: killed while the first is uploaded, between both, and near the end."""
    words = ("run", tiny_model, "--imatrix", "none", "--levels", "Q4_0,Q8_0", "--one-by-one", "-t", "1", "--publish", TO)
    with HubServer(token=TOKEN) as hub:
        ended, _ = run_and_kill(hub, words, tmp_path, point)
        assert ended is None
        done, _ = run_and_kill(hub, words, tmp_path, None)
        assert done is not None
        assert done.code == 0, done.err
        assert titles(published(hub)) == ["Upload Q4_0", "Upload Q8_0", "Upload card, imatrix and report"]
        assert stored_once(hub)
