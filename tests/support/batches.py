"""Batches of tiny models on a loopback hub: lists, what the disk held meanwhile, and what the hub holds in the end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from support.hub_server import HubServer
from support.publishing import environment, published, titles

OWNER = "me"
LAST = "Upload card, imatrix and report"
WEIGHTS = (".gguf", ".safetensors", ".gguf.part", ".incomplete")


def write_list(path: Path, models: Sequence[object], **defaults: object) -> Path:
    path.write_text(yaml.safe_dump({"defaults": defaults, "models": list(models)}, sort_keys=False), encoding="utf-8")
    return path


def surroundings(hub: HubServer, folder: Path) -> dict[str, str]:
    """For a batch that downloads from and publishes to the hub, with a hub's cache of its own."""
    return {**environment(hub), "HF_HOME": str(folder / "hub-home")}


def weights_in(folder: Path, seen: list[str] | None = None) -> int:
    """Bytes that models and levels take below a folder now, finished or not; links count once. ``seen`` gets a line a file."""
    total, seen = 0, seen if seen is not None else []
    waiting = [str(folder)]
    while waiting:
        try:
            entries = [*os.scandir(waiting.pop())]
        except OSError:
            continue  # removed meanwhile
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_symlink() and (entry.name.endswith(WEIGHTS) or Path(entry.path).parent.name == "blobs"):
                    total += (size := entry.stat(follow_symlinks=False).st_size)
                    seen.append(f"{entry.path} {size}")
            except OSError:
                continue
    return total


class DiskWatch:
    """Looks at folders again and again; ``most`` is the most that was seen, in ``files``."""

    def __init__(self, *folders: Path) -> None:
        self.most = 0
        self.files: list[str] = []
        self._folders = folders
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._end.wait(0.005):
            seen: list[str] = []
            total = sum(weights_in(folder, seen) for folder in self._folders)
            if total > self.most:
                self.most, self.files = total, seen

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@contextmanager
def watched(list_file: Path) -> Iterator[DiskWatch]:
    """Watches what a batch has on the disk."""
    with DiskWatch(list_file.parent / "work", list_file.with_name(list_file.name + ".batch")) as watch:
        yield watch


def check_repository(hub: HubServer, name: str, levels: Sequence[str]) -> None:
    """The repository of a model is complete: every level once, in a commit of its own, then what comes with them."""
    repository = published(hub, f"{OWNER}/{name}-GGUF")
    wanted = {f"{name}-{level}.gguf" for level in levels}
    assert {file for file in repository.files if file.endswith(".gguf") and "imatrix" not in file} == wanted
    said = titles(repository)
    assert sorted(title for title in said if title != LAST) == sorted(f"Upload {level}" for level in levels)
    assert said[-1] == LAST
    card = repository.content("README.md").decode()
    assert all(f"{name}-{level}.gguf" in card for level in levels)
