"""``batch --keep nothing`` killed again and again: the same command ends with complete repositories and an empty disk, with
never more than a source and two levels on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from imatrix_runner.batch.batch_folder import BatchFolder
from imatrix_runner.batch.batch_journal import read_history
from support.batches import check_repository, surroundings, watched, weights_in, write_list
from support.command_line import Ran, started
from support.hub_server import HubServer
from support.publishing import TOKEN, Killer, published, stored_once
from support.tiny_architectures import write_architecture

LEVELS = ("Q8_0", "Q4_0", "IQ4_XS")
NAMES = ("qwen3", "mamba")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: write_architecture(name, folder / f"{name}-BF16.gguf", dtype="BF16") for name in NAMES}


def batch(folder: Path, hub: HubServer, point: int | None) -> Ran | None:
    """The command, killed at a request of its hub; None if it was killed, else how it ended."""
    killer = Killer(hub, point)
    with started("batch", "m.yaml", "--keep", "nothing", "--json", cwd=folder, env=surroundings(hub, folder)) as running:
        killer.watch(running)
        code = running.process.wait(200)
        return None if code == -signal.SIGKILL else running.finish()


def test_killed_three_times_and_continued(sources: Mapping[str, Path], tmp_path: Path) -> None:
    """In a download, in an upload, and between a commit and its answer; a third model fails each time."""
    with HubServer(token=TOKEN) as hub:
        for name, path in sources.items():
            hub.add(f"org/{name}", {path.name: path})
        hub.add("org/broken", {"broken-BF16.gguf": b"GGUF but not one"})
        entries = ["org/broken", *(f"org/{name}" for name in NAMES)]
        file = write_list(tmp_path / "m.yaml", entries, levels=[*LEVELS], publish="me", imatrix="none", threads=1)
        kills = 0
        with watched(file) as disk:
            for point in (34, 60, 101):
                kills += batch(tmp_path, hub, point) is None
            done = batch(tmp_path, hub, None)
        assert kills == 3
        assert done is not None
        assert done.code == 100, done.err
        failed = [model["model"] for model in done.document["batch"]["models"] if model["state"] != "done"]
        assert failed == ["org/broken"]
        sizes = {}
        for name in NAMES:
            check_repository(hub, name, LEVELS)
            sizes[name] = [len(published(hub, f"me/{name}-GGUF").content(f"{name}-{level}.gguf")) for level in LEVELS]
        assert stored_once(hub)
        assert weights_in(tmp_path / "work") == 0
        bound = max(sources[name].stat().st_size + max(sum(sizes[name][:2]), sum(sizes[name][1:])) for name in NAMES)
        assert disk.most <= bound, disk.files
        history = read_history(BatchFolder.of(file).journal)
        assert history.begun == 4
        assert all(history.of(f"org/{name}").files == {} for name in NAMES)


def test_ctrl_c_ends_every_stage_and_prints_what_continues(sources: Mapping[str, Path], tmp_path: Path) -> None:
    with HubServer(token=TOKEN) as hub:
        hub.add("org/qwen3", {"qwen3-BF16.gguf": sources["qwen3"]})
        write_list(tmp_path / "m.yaml", ["org/qwen3"], levels=[*LEVELS], imatrix="none", threads=1)
        arguments = ("batch", "m.yaml", "--keep", "levels")
        with started(*arguments, cwd=tmp_path, env=surroundings(hub, tmp_path)) as running:
            hub.trouble.bytes_per_second = 50_000  # the download lasts until it is stopped
            running.wait_for(lambda: "qwen3-BF16.gguf" in hub.downloads())
            os.kill(running.pid, signal.SIGINT)
            stopped = running.finish()
        hub.trouble.bytes_per_second = 0
        assert stopped.code == 130
        assert "Continue with: imatrix-runner batch m.yaml --keep levels" in stopped.err
        assert running.descendants() == []
        assert "Stopped: the same command continues" in (tmp_path / "m.yaml.batch" / "batch.html").read_text()
        with started("batch", "status", "m.yaml", cwd=tmp_path) as status:
            assert "Continue with: imatrix-runner batch m.yaml --keep levels" in status.finish().out
        with started(*arguments, cwd=tmp_path, env=surroundings(hub, tmp_path)) as running:
            done = running.finish()
        assert done.code == 0, done.err
        assert sorted(path.suffix for path in tmp_path.rglob("*.gguf")) == [".gguf"] * 3
