"""Levels in shards, killed while they are written or named, and made by the same command: the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.command_line import Ran, run_command, started
from support.llama_tools import BareTools, digest, leftovers
from support.tiny_models import write_llama_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("split") / "m-BF16.gguf", hidden=512, ff=1024)


@pytest.fixture(scope="module")
def bare(model: Path, tools: BareTools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """llama-gguf-split's shards of at most 2 MB, without imatrix."""
    found: dict[str, dict[str, str]] = {}
    folder = tmp_path_factory.mktemp("bare")
    for level in ("Q8_0", "Q4_K_M"):
        whole = tools.quantize(model, folder / f"m-{level}.gguf", level)
        shards = tools.split(whole, folder / level / f"m-{level}", max_size="2M")
        found[level] = {shard.name: digest(shard) for shard in shards}
    return found


def split_names(path: Path) -> dict[str, str]:
    """Digests of the shards in a folder by name."""
    return {shard.name: digest(shard) for shard in sorted(path.glob("*-of-*.gguf"))}


def make(folder: Path, model: Path) -> Ran:
    options = ("--imatrix", "none", "--levels", "Q4_K_M", "-t", "1", "--split-max-size", "2M", "--json")
    done = run_command("quantize", model, *options, cwd=folder)
    assert done.code == 0, done.err
    return done


def test_while_shards_are_written(bare: dict[str, dict[str, str]], model: Path, tmp_path: Path) -> None:
    arguments = ("quantize", model, "--imatrix", "none", "--levels", "Q8_0,Q4_K_M", "-t", "1", "--split-max-size", "2M")
    workspace = tmp_path / "work" / "m"
    seen = (
        lambda: list(workspace.glob(".partial/*/*-of-*.gguf")),
        lambda: any(path.stat().st_size > 400 for path in workspace.glob(".partial/*/ledger.jsonl")),
        lambda: any(path.read_bytes()[:4] == b"GGUF" for path in workspace.glob(".partial/*/*-of-*.gguf")),
        lambda: list(workspace.glob("m-*/*.gguf")),
    )
    for moment in seen:
        with started(*arguments, cwd=tmp_path) as running:
            running.wait_for(moment)
            running.kill_tree()
    done = run_command(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert {name: split_names(workspace / f"m-{name}") for name in bare} == bare
    assert leftovers(workspace) == []


def test_between_two_renames(bare: dict[str, dict[str, str]], model: Path, tmp_path: Path) -> None:
    """As after a kill there: the record is written, some shards have their names. The others get theirs."""
    make(tmp_path, model)
    workspace = tmp_path / "work" / "m"
    folder, partial = workspace / "m-Q4_K_M", workspace / ".partial" / "Q4_K_M"
    for kept in range(len(bare["Q4_K_M"])):
        partial.mkdir(parents=True)
        for shard in sorted(folder.iterdir())[kept:]:
            shard.replace(partial / shard.name)
        (workspace / ".ledgers" / "Q4_K_M.jsonl").replace(partial / "ledger.jsonl")
        done = make(tmp_path, model)
        assert done.document["levels"][0]["status"] == "skipped"
        assert split_names(folder) == bare["Q4_K_M"]
        assert leftovers(workspace) == []
        assert (workspace / ".ledgers" / "Q4_K_M.jsonl").is_file()


def test_between_two_renames_with_a_shard_lost(bare: dict[str, dict[str, str]], model: Path, tmp_path: Path) -> None:
    make(tmp_path, model)
    workspace = tmp_path / "work" / "m"
    partial = workspace / ".partial" / "Q4_K_M"
    partial.mkdir(parents=True)
    first, second, *_ = sorted((workspace / "m-Q4_K_M").iterdir())
    shutil.move(first, partial / first.name)
    second.unlink()
    assert make(tmp_path, model).document["levels"][0]["status"] == "done"
    assert split_names(workspace / "m-Q4_K_M") == bare["Q4_K_M"]
