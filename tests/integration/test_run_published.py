"""``run`` on a hub id: the workspace first, then what others published, then generation; each step says why it fell through."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.models.model import open_gguf
from support.command_line import Ran, RunCommand
from support.hub_server import HubServer
from support.tiny_models import write_llama_gguf

REPO = "tiny-org/Tiny-Llama"
PUBLISHED = "bartowski/tiny-org_Tiny-Llama-GGUF"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama_gguf(tmp_path / "Tiny-Llama-BF16.gguf", layers=1)


@pytest.fixture
def matrix(model: Path) -> Matrix:
    random = np.random.default_rng(3)
    names = {tensor.name: tensor.shape[0] for tensor in open_gguf(model, allow_requantize=False).tensors}
    entries = {
        name: MatrixEntry(random.random((1, columns)), np.array([64 * 512]))
        for name, columns in names.items()
        if name.startswith("blk.") and "norm" not in name
    }
    return Matrix(entries, 512, 64, ("calibration_datav5.txt",))


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, {"Tiny-Llama-BF16.gguf": model})
        yield server


@pytest.fixture
def on_hub(hub: HubServer, runner: RunCommand, tmp_path: Path) -> RunCommand:
    def run(*arguments: str | Path) -> Ran:
        surroundings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        return runner("run", *arguments, "--levels", "Q4_K_M", "--json", env=surroundings)

    return run


def publish(hub: HubServer, matrix: Matrix, folder: Path) -> None:
    write_gguf(matrix, folder / "published.gguf")
    hub.add(PUBLISHED, {"tiny-org_Tiny-Llama-imatrix.gguf": folder / "published.gguf"})


def test_auto_takes_the_published_one_and_then_what_lies_there(
    on_hub: RunCommand, hub: HubServer, matrix: Matrix, tmp_path: Path
) -> None:
    publish(hub, matrix, tmp_path)
    ran = on_hub(REPO)
    assert ran.code == 0, ran.err
    assert ran.document["plan"]["imatrix"]["action"] == "use"
    assert ran.document["imatrix"]["datasets"] == ["calibration_datav5.txt"]
    workspace = tmp_path / "work" / "Tiny-Llama"
    assert json.loads((workspace / "imatrix.source.json").read_text())["repo"] == PUBLISHED
    assert read(workspace / "imatrix.gguf").matrix.chunk_count == 64
    asked = len(hub.requests)
    again = on_hub(REPO)
    assert [level["status"] for level in again.document["levels"]] == ["skipped"]
    assert not [request for request in hub.requests[asked:] if "bartowski" in request.path]


def test_auto_generates_when_nothing_is_published_and_says_so(on_hub: RunCommand, tmp_path: Path) -> None:
    ran = on_hub(REPO, "-c", "64", "--chunks", "8")
    assert ran.code == 0, ran.err
    assert "No published imatrix is used" in ran.err
    assert ran.document["plan"]["imatrix"]["action"] == "generate"


def test_auto_generates_when_the_published_one_does_not_fit(
    on_hub: RunCommand, hub: HubServer, matrix: Matrix, tmp_path: Path
) -> None:
    name = next(iter(matrix.entries))
    wide = MatrixEntry(np.tile(matrix.entries[name].sums, 2), matrix.entries[name].counts)
    publish(hub, replace(matrix, entries={**matrix.entries, name: wide}), tmp_path)
    ran = on_hub(REPO, "-c", "64", "--chunks", "8")
    assert ran.code == 0, ran.err
    assert ran.document["plan"]["imatrix"]["action"] == "generate"


def test_published_is_an_error_when_there_is_none(on_hub: RunCommand, tmp_path: Path) -> None:
    ran = on_hub(REPO, "--imatrix", "published")
    assert ran.code == 4, ran.err
    assert not list((tmp_path / "work").rglob("*.gguf"))


def test_offline_never_asks_the_hub(on_hub: RunCommand, hub: HubServer, matrix: Matrix, tmp_path: Path) -> None:
    publish(hub, matrix, tmp_path)
    assert on_hub(REPO, "--imatrix", "none").code == 0
    asked = len(hub.requests)
    ran = on_hub(REPO, "--offline", "-c", "64", "--chunks", "8")
    assert ran.code == 0, ran.err
    assert ran.document["plan"]["imatrix"]["action"] == "generate"
    assert len(hub.requests) == asked


def test_a_local_model_is_not_looked_up_unasked(on_hub: RunCommand, hub: HubServer, model: Path) -> None:
    ran = on_hub(model, "-c", "64", "--chunks", "8")
    assert ran.code == 0, ran.err
    assert hub.requests == []
