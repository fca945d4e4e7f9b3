"""A fork whose programs read and write the legacy imatrix only, and that has a type of its own: from the text to its levels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imatrix_runner.imatrix.formats import read
from imatrix_runner.toolchain.probe import Toolchain
from support.caches import proven_cache
from support.command_line import RunCommand
from support.forks import OWN, legacy_fork, rename_type
from support.llama_tools import BareTools, digest, fake_tools, leftovers, levels_in

LEVELS = f"{OWN},Q4_K_M"


def bare_levels(tools: BareTools, model: Path, imatrix: Path, folder: Path) -> dict[str, str]:
    """What llama.cpp's own llama-quantize makes with the same matrix, the fork's type under the fork's number."""
    own = rename_type(tools.quantize(model, folder / "own.gguf", "IQ4_NL", imatrix=imatrix))
    plain = tools.quantize(model, folder / "plain.gguf", "Q4_K_M", imatrix=imatrix)
    return {OWN: digest(own), "Q4_K_M": digest(plain)}


def test_the_imatrix_formats_of_a_fork_are_shown(runner: RunCommand, tools: BareTools, tmp_path: Path) -> None:
    fork = legacy_fork(tools.toolchain, tmp_path / "fork")
    located = runner("tools", "locate", "--llama-cpp", fork, "--json").document
    assert located["toolchain"]["imatrix"] == {"reads": "dat", "writes": "dat"}
    shown = runner("doctor", "--offline", "--llama-cpp", fork)
    assert "llama-quantize reads the legacy .dat, llama-imatrix writes the legacy .dat" in " ".join(shown.out.split())


def test_programs_that_use_no_imatrix_at_all_are_warned_about(runner: RunCommand, toolchain: Toolchain, tmp_path: Path) -> None:
    refuses = 'case " $* " in *" --imatrix "*) exit 1;; esac\n'
    folder = fake_tools(toolchain, tmp_path / "deaf", llama_quantize=refuses)
    located = runner("tools", "locate", "--llama-cpp", folder, "--json").document
    assert located["toolchain"]["imatrix"] == {"reads": None, "writes": "gguf"}
    checks = {
        check["name"]: check for check in runner("doctor", "--offline", "--llama-cpp", folder, "--json").document["checks"]
    }
    assert checks["imatrix"] == {
        "name": "imatrix",
        "verdict": "warn",
        "detail": "llama-quantize reads neither of the known formats, llama-imatrix writes GGUF",
        "do": "imatrix-runner tools build",
    }


@pytest.mark.parametrize("plans", [True, False], ids=["--dry-run", "no --dry-run"])
def test_from_the_text_to_levels_with_a_named_fork(
    plans: bool, tiny_model: Path, tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    fork = legacy_fork(tools.toolchain, tmp_path / "fork", plans=plans)
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--chunks", "8", "--levels", LEVELS)
    arguments = (*arguments, "--imatrix", "generate", "--llama-cpp", fork, "--json")
    done = runner(*arguments)
    assert done.code == 0, done.err
    planned = {level["level"]: level["bytes"] for level in done.document["plan"]["levels"]}
    assert planned == {level["level"]: level["bytes"] for level in done.document["levels"]}
    workspace = tmp_path / "work" / "tiny"
    matrix = workspace / "imatrix.gguf"
    assert levels_in(workspace) == bare_levels(tools, tiny_model, matrix, tmp_path / "bare")
    assert leftovers(workspace) == []
    tokens = {int(read(matrix).matrix.counts(name)[0]) for name in read(matrix).matrix.entries}
    assert tokens == {8 * 128}
    again = runner(*arguments)
    assert [level["status"] for level in again.document["levels"]] == ["skipped", "skipped"]


def test_beside_the_library_the_fork_makes_its_own_type(
    tiny_model: Path, tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    """Nobody named the fork: it is in the PATH, and llama-cpp-python does the rest."""
    fork = legacy_fork(tools.toolchain, tmp_path / "fork")
    env = {
        "PATH": f"{fork}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "IMATRIX_RUNNER_CACHE": str(proven_cache(tmp_path / "cache")),
        "IMATRIX_RUNNER_LLAMA_CPP": "",
        "LLAMA_CPP_LIB_PATH": str(tools.toolchain.directory),
    }
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--chunks", "8", "--levels", LEVELS)
    done = runner(*arguments, "--imatrix", "generate", "--json", env=env)
    assert done.code == 0, done.err
    assert done.document["engine"] == "embedded"
    workspace = tmp_path / "work" / "tiny"
    assert levels_in(workspace) == bare_levels(tools, tiny_model, workspace / "imatrix.gguf", tmp_path / "bare")


def test_a_fork_without_llama_tokenize_quantises_and_says_what_counting_needs(
    tiny_model: Path, tiny_imatrix: Path, tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    fork = legacy_fork(tools.toolchain, tmp_path / "fork")
    (fork / "llama-tokenize").unlink()
    done = runner("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", LEVELS, "--llama-cpp", fork)
    assert done.code == 0, done.err
    assert levels_in(tmp_path / "work" / "tiny") == bare_levels(tools, tiny_model, tiny_imatrix, tmp_path / "bare")
    counted = runner("imatrix", "generate", tiny_model, "-f", tiny_text, "--work-dir", "other", "--llama-cpp", fork)
    assert counted.code == 3
    assert "llama-tokenize is not part of this toolchain" in counted.err


def test_experts_cannot_be_counted_by_a_legacy_collector(
    tiny_model: Path, tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    fork = legacy_fork(tools.toolchain, tmp_path / "fork")
    arguments = ("imatrix", "generate", tiny_model, "-f", tiny_text, "-c", "128", "--min-expert-tokens", "4")
    done = runner(*arguments, "--llama-cpp", fork)
    assert done.code == 2
    assert "does not count the tokens that each expert saw" in done.err


def test_what_another_engine_cannot_measure_or_check_is_said(
    tiny_model: Path, tiny_text: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    fork = legacy_fork(tools.toolchain, tmp_path / "fork")
    made = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", LEVELS, "--verify", "full", "--llama-cpp", fork)
    done = runner(*made)
    assert done.code == 0, done.err
    assert f"Warning: {OWN}: its rows are not checked: only the engine that made them knows their types (TYPE_139)." in done.err
    measure = ("evaluate", tiny_model, "--text", tiny_text, "-c", "128", "--chunks", "4", "--json")
    done = runner(*measure, "--engine", "embedded")
    assert done.code == 100, done.err
    measured = done.document["measured"]
    assert list(measured["levels"]) == ["Q4_K_M"]
    error = measured["failed"][OWN]
    assert "tensor types of a fork or an old release, which llama-cpp-python does not know (TYPE_139)" in error["why"]
    assert "evaluate MODEL --llama-cpp DIRECTORY" in error["do"]
