"""Levels in shards, killed while they are written or named, and made by the same command: the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import Ran, run_command, started
from support.llama_tools import BareTools, digest, fake_tools, leftovers
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


def test_another_limit_after_a_kill(bare: dict[str, dict[str, str]], model: Path, tmp_path: Path) -> None:
    """Nothing of the level in one file, or of other shards, gets into these."""
    arguments = ("quantize", model, "--imatrix", "none", "--levels", "Q4_K_M", "-t", "1")
    workspace = tmp_path / "work" / "m"
    for options in ((), ("--split-max-tensors", "3")):
        with started(*arguments, *options, cwd=tmp_path) as running:
            running.wait_for(lambda: any(path.stat().st_size > 400 for path in workspace.glob(".partial/*/ledger.jsonl")))
            running.kill_tree()
    make(tmp_path, model)
    assert split_names(workspace / "m-Q4_K_M") == bare["Q4_K_M"]
    assert not list(workspace.glob("*.gguf"))
    assert leftovers(workspace) == []


def test_a_gguf_split_that_dies(bare: dict[str, dict[str, str]], model: Path, toolchain: Toolchain, tmp_path: Path) -> None:
    """Half of its shards are there, and the level in one file: the next run makes the level again."""
    folder = fake_tools(toolchain, tmp_path / "tools")
    program = folder / "llama-gguf-split"
    real = toolchain.tool("llama-gguf-split")
    program.write_text(f'#!/bin/sh\n"{real}" "$@" || exit\ncase "$1" in --split) kill -9 $$;; esac\n', encoding="utf-8")
    program.chmod(0o755)
    arguments = ("quantize", model, "--imatrix", "none", "--levels", "Q4_K_M", "-t", "1", "--split-max-size", "2M")
    died = run_command(*arguments, "--engine", "binaries", "--llama-cpp", folder, cwd=tmp_path)
    assert died.code == 100
    assert "Q4_K_M: failed" in died.err
    workspace = tmp_path / "work" / "m"
    assert not (workspace / "m-Q4_K_M").exists()
    done = run_command(*arguments, "--engine", "binaries", cwd=tmp_path)
    assert done.code == 0, done.err
    assert split_names(workspace / "m-Q4_K_M") == bare["Q4_K_M"]
    assert leftovers(workspace) == []


@pytest.mark.parametrize("damage", ["mv {2} {2}.gone", "cp {2} {3}", "printf GGUX | dd of={2} conv=notrunc 2>/dev/null"])
def test_shards_that_are_not_what_was_planned(damage: str, model: Path, toolchain: Toolchain, tmp_path: Path) -> None:
    """One is missing, one is there twice, one is no GGUF: nothing of it gets a name."""
    folder = fake_tools(toolchain, tmp_path / "tools")
    program = folder / "llama-gguf-split"
    real, partial = toolchain.tool("llama-gguf-split"), "work/m/.partial/Q8_0/m-Q8_0"
    doing = damage.format(*(tmp_path / f"{partial}-0000{number}-of-00003.gguf" for number in range(4)))
    program.write_text(f'#!/bin/sh\n"{real}" "$@" || exit\ncase "$1" in --split) {doing};; esac\n', encoding="utf-8")
    program.chmod(0o755)
    options = ("--engine", "binaries", "--llama-cpp", folder, "--split-max-size", "2M")
    done = run_command("quantize", model, "--imatrix", "none", "--levels", "Q8_0", "-t", "1", *options, cwd=tmp_path)
    assert done.code == 100
    assert not (tmp_path / "work" / "m" / "m-Q8_0").exists()


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
