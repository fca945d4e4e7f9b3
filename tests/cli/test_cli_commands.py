"""What commands say when all is well: plans, documents, status, doctor."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from imatrix_runner import __version__
from imatrix_runner.journal import Journal
from imatrix_runner.report.document import read_report
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.workspace import Workspace, hold
from support.command_line import PROGRAM, RunCommand
from support.in_process import CommandLine


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "tiny-BF16.gguf"
    path.symlink_to(tiny_model)
    return path


def test_a_dry_run_prints_the_plan_and_writes_nothing(cli: CommandLine, tmp_path: Path, model: Path) -> None:
    ran = cli("run", model, "--levels", "Q4_K_M,IQ2_XS", "--imatrix", "none", "--dry-run")
    assert ran.code == 100
    assert "Q4_K_M" in ran.out
    assert "IQ2_XS will fail: it needs an importance matrix and there is none" in ran.out
    assert "1 of 2 levels to make" in ran.out
    assert list(tmp_path.iterdir()) == [model]


def test_a_dry_run_as_a_document(cli: CommandLine, tmp_path: Path, model: Path, tiny_text: Path) -> None:
    ran = cli("run", model, "--levels", "q8_0,IQ2_XS", "-f", tiny_text, "-c", "128", "--dry-run", "--json", "-q")
    document = ran.document
    assert (ran.code, ran.err) == (0, "")
    assert (document["schema"], document["version"], document["program"]) == ("imatrix-runner/run", 1, __version__)
    assert document["exit_code"] == 0
    assert document["model"]["name"] == "tiny"
    assert document["plan"]["workspace"] == str(tmp_path / "work" / "tiny")
    assert document["plan"]["imatrix"]["action"] == "generate"
    assert document["plan"]["imatrix"]["chunks"] > 10
    eight, two = document["plan"]["levels"]
    assert (eight["level"], eight["state"], eight["needs_imatrix"]) == ("Q8_0", "todo", False)
    assert (two["level"], two["state"], two["needs_imatrix"]) == ("IQ2_XS", "todo", True)
    assert eight["bytes"] > two["bytes"] > 0
    assert document["levels"] == []


def test_a_run_makes_its_levels_and_the_second_time_nothing(cli: CommandLine, tmp_path: Path, model: Path) -> None:
    arguments = ("run", model, "--levels", "Q8_0,Q4_0", "--imatrix", "none", "--json", "-q")
    first, second = cli(*arguments).document, cli(*arguments).document
    assert [(level["level"], level["status"]) for level in first["levels"]] == [("Q8_0", "done"), ("Q4_0", "done")]
    assert [level["status"] for level in second["levels"]] == ["skipped", "skipped"]
    for level in first["levels"]:
        (file,) = level["files"]
        assert Path(file).stat().st_size == level["bytes"]
        assert level["error"] is None


def test_some_levels_failed_is_exit_100_and_the_others_are_made(cli: CommandLine, tmp_path: Path, model: Path) -> None:
    ran = cli("run", model, "--levels", "IQ2_XS,Q4_0", "--imatrix", "none")
    assert ran.code == 100
    assert (tmp_path / "work" / "tiny" / "tiny-Q4_0.gguf").is_file()
    assert not (tmp_path / "work" / "tiny" / "tiny-IQ2_XS.gguf").exists()
    assert "1 made, 1 failed" in ran.out


def test_a_level_named_twice_is_planned_once(cli: CommandLine, model: Path) -> None:
    """By a preset and by name, by an alias, in small letters."""
    ran = cli("run", model, "--preset", "k-quants", "--levels", "Q4_K,q4_k_m,Q8_0", "--imatrix", "none", "--dry-run", "--json")
    names = [level["level"] for level in ran.document["plan"]["levels"]]
    assert len(names) == len(set(names)) == 10
    assert "Q4_K_M" in names


def test_without_an_imatrix_the_default_levels_are_those_that_need_none(cli: CommandLine, model: Path) -> None:
    ran = cli("quantize", model, "--dry-run")
    assert ran.code == 0
    assert "IQ3_XXS, IQ2_M left out: they need an imatrix, and there is none." in ran.err
    assert "6 of 6 levels to make" in ran.out
    named = cli("quantize", model, "--levels", "IQ2_M,Q8_0", "--dry-run")
    assert (named.code, "IQ2_M will fail" in named.out) == (100, True)


def test_the_time_of_a_pass_is_said_once_and_levels_have_their_shares(cli: CommandLine, tmp_path: Path, model: Path) -> None:
    ran = cli("run", model, "--imatrix", "none", "--engine", "embedded", "--levels", "Q6_K,Q4_K_M,Q4_K_S")
    assert re.search("3 levels in one pass of .*; Time: each level's share of what it computed", ran.out)
    rows = [line for line in ran.out.splitlines() if line.startswith(("Q6_K", "Q4_K"))]
    assert sum(int(found[1]) for row in rows if (found := re.search(r"(\d+)%  done", row))) == pytest.approx(100, abs=2)
    report = read_report(tmp_path / "work" / model.stem.removesuffix("-BF16") / "report.json")
    assert len({level.seconds for level in report.levels}) == 1
    assert sum(level.own_seconds for level in report.levels) == pytest.approx(report.levels[0].seconds, rel=0.01)


def test_quiet_says_nothing_at_all(cli: CommandLine, model: Path) -> None:
    ran = cli("run", model, "--levels", "Q4_0", "--imatrix", "none", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_talk_goes_to_stderr_and_results_to_stdout(cli: CommandLine, model: Path) -> None:
    ran = cli("run", model, "--levels", "Q4_0", "--imatrix", "none")
    assert "Plan" in ran.err
    assert "Result" in ran.out
    assert "Result" not in ran.err


def test_what_stands_after_two_dashes_reaches_llama_imatrix_unread(cli: CommandLine, model: Path, tiny_text: Path) -> None:
    arguments = ("imatrix", "generate", model, "-f", tiny_text, "-c", "128", "--chunks", "2", "-q")
    assert cli(*arguments, "--", "-ctk", "f16", "--check-tensors").code == 0
    log = (model.parent / "work" / "tiny" / "logs" / "imatrix.log").read_text(encoding="utf-8", errors="replace")
    assert "-ctk f16 --check-tensors" in log


def test_an_option_that_llama_imatrix_does_not_know_is_its_own_usage_error(
    cli: CommandLine, model: Path, tiny_text: Path
) -> None:
    ran = cli("imatrix", "generate", model, "-f", tiny_text, "-c", "128", "--chunks", "2", "--", "--frobnicate")
    assert ran.code == 2
    assert "do not know the option --frobnicate" in ran.err


def test_layers_on_a_gpu_that_is_not_there_are_warned_about(cli: CommandLine, toolchain: Toolchain, model: Path) -> None:
    if toolchain.devices:
        pytest.skip("this toolchain sees a GPU")
    ran = cli("run", model, "--levels", "Q4_0", "--imatrix", "none", "-ngl", "99", "--dry-run")
    assert ran.code == 0
    assert "-ngl 99 has no effect" in ran.err


class TestStatus:
    """Every workspace at a glance."""

    def test_an_empty_work_directory(self, cli: CommandLine) -> None:
        ran = cli("status")
        assert (ran.code, ran.err) == (0, "")
        assert "No workspace in work" in ran.out
        assert cli("status", "--json").document["workspaces"] == []

    def test_a_finished_workspace(self, cli: CommandLine, tmp_path: Path, model: Path) -> None:
        cli("run", model, "--levels", "Q8_0,Q4_0", "--imatrix", "none", "-q")
        document = cli("status", "--json").document
        (entry,) = document["workspaces"]
        assert document["schema"] == "imatrix-runner/status"
        assert (entry["model"], entry["state"], entry["levels_done"], entry["levels_wanted"]) == ("tiny", "done", 2, 2)
        assert entry["n_bytes"] == sum(file.stat().st_size for file in (tmp_path / "work" / "tiny").glob("*.gguf"))
        assert entry["command"] == ""
        assert cli("status").out.splitlines()[1].split()[:2] == ["tiny", "done"]

    def test_a_missing_level_makes_it_resumable_by_the_command_that_was_typed(
        self, cli: CommandLine, tmp_path: Path, model: Path
    ) -> None:
        cli("run", model, "--levels", "Q8_0,Q4_0", "--imatrix", "none", "-q")
        (tmp_path / "work" / "tiny" / "tiny-Q4_0.gguf").unlink()
        (entry,) = cli("status", "--json").document["workspaces"]
        assert (entry["state"], entry["detail"]) == ("resumable", "missing: Q4_0")
        assert entry["command"] == f"imatrix-runner run {model} --levels Q8_0,Q4_0 --imatrix none -q"
        assert f"continue with: {entry['command']}" in cli("status").out

    def test_mixes_whose_types_are_still_to_be_chosen_are_missing_by_their_targets(
        self, cli: CommandLine, tmp_path: Path, model: Path
    ) -> None:
        """As the journal is while costs are measured; the two sizes of one mix are one level."""
        cli("run", model, "--levels", "Q4_0", "--imatrix", "none", "-q")
        journal = Journal(tmp_path / "work" / "tiny" / "journal.json")
        journal.remember(levels="Q4_0,MIX@like:Q4_K_M,MIX@ram:64GiB,vram:24GiB", finished="no")
        (entry,) = cli("status", "--json").document["workspaces"]
        assert (entry["state"], entry["levels_done"], entry["levels_wanted"]) == ("resumable", 1, 3)
        assert entry["detail"] == "missing: MIX@like:Q4_K_M, MIX@ram:64GiB,vram:24GiB"

    def test_a_held_workspace_is_running(self, cli: CommandLine, tmp_path: Path, model: Path) -> None:
        cli("run", model, "--levels", "Q4_0", "--imatrix", "none", "-q")
        with hold(Workspace(tmp_path / "work" / "tiny", "tiny"), "imatrix-runner run x"):
            (entry,) = cli("status", "--json").document["workspaces"]
        assert entry["state"] == "running"
        assert f"process {os.getpid()}" in entry["owner"]

    def test_a_torn_journal_is_unreadable_and_hides_no_other(self, cli: CommandLine, tmp_path: Path, model: Path) -> None:
        cli("run", model, "--levels", "Q4_0", "--imatrix", "none", "-q")
        (tmp_path / "work" / "broken").mkdir()
        (tmp_path / "work" / "broken" / "journal.json").write_text("{")
        (tmp_path / "work" / "not-a-workspace").mkdir()
        states = {entry["model"]: entry["state"] for entry in cli("status", "--json").document["workspaces"]}
        assert states == {"broken": "unreadable", "tiny": "done"}
        assert cli("status").code == 0


class TestDoctor:
    """One page about this machine."""

    def test_a_machine_that_can_do_the_main_job(self, cli: CommandLine, toolchain: Toolchain) -> None:
        ran = cli("doctor", "--json", "--offline")
        document = ran.document
        checks = {check["name"]: check for check in document["checks"]}
        assert ran.code == document["exit_code"] == 0
        assert document["schema"] == "imatrix-runner/doctor"
        expected = {"Python", "Engine", "llama-cpp-python", "llama.cpp", "GPU", "Memory", "Disk, work", "Disk, cache", "Hub"}
        assert expected <= checks.keys()
        assert checks["Engine"]["detail"].startswith("embedded: ")
        assert "libraries " in checks["llama-cpp-python"]["detail"]
        assert checks["llama.cpp"]["verdict"] == "ok"
        assert toolchain.identity() in checks["llama.cpp"]["detail"]
        assert checks["imatrix"]["detail"] == "llama-quantize reads GGUF, llama-imatrix writes GGUF"
        assert "not checked" in checks["Hub"]["detail"]
        assert all(check.keys() == {"name", "verdict", "detail", "do"} for check in document["checks"])

    def test_without_tools_it_fails_with_the_remedy(self, cli: CommandLine, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        ran = cli("doctor", "--offline", "--llama-cpp", "empty")
        assert ran.code == 3
        assert "tools build" in ran.out
        assert "The main job cannot run yet." in ran.out

    def test_secrets_are_never_printed(self, runner: RunCommand) -> None:
        ran = runner("doctor", "--offline", env={"HF_TOKEN": "hf_secret123", "LLAMA_ARG_THREADS": "7"}, program=PROGRAM)
        assert "hf_secret123" not in ran.out + ran.err
        assert "token from HF_TOKEN" in ran.out
        assert "LLAMA_ARG_THREADS" in ran.out


def test_the_tools_in_use_are_told(cli: CommandLine, toolchain: Toolchain) -> None:
    document = cli("tools", "locate", "--json").document
    assert document["toolchain"]["identity"] == toolchain.identity()
    assert document["toolchain"]["directory"] == str(toolchain.directory)
    assert "Q4_K_M" in document["toolchain"]["types"]
    assert document["toolchain"]["imatrix"] == {"reads": "gguf", "writes": "gguf"}
    told = cli("tools", "locate").out
    assert toolchain.identity() in told
    assert "llama-quantize reads GGUF, llama-imatrix writes GGUF" in told
