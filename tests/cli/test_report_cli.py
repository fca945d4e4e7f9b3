"""``imatrix-runner report``: what people type, read and get back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imatrix_runner.workspace import Workspace, hold
from support.in_process import CommandLine
from support.workspaces import copy, measure, run_here, unreported

LEVELS = {"Q8_0": 0.001, "Q4_0": 0.05}


@pytest.fixture(scope="module")
def original(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("made")
    workspace = unreported(run_here(folder, "run", tiny_model, "--levels", ",".join(LEVELS), "--imatrix", "none"))
    measure(workspace, LEVELS)
    return workspace


@pytest.fixture
def made(original: Workspace, tmp_path: Path) -> Workspace:
    """``work/tiny`` where commands are typed."""
    return copy(original, tmp_path / "work")


def test_the_table_comes_and_then_the_paths(cli: CommandLine, made: Workspace) -> None:
    ran = cli("report", "work/tiny")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[1].split() == ["Level", "Size", "Bits/weight", "Mean", "KLD", "PPL", "Same", "top", "Δp", "RMS", "Time"]
    assert any(line.startswith("Q4_0") and "0.0500 ± " in line for line in lines)
    names = ("report.html", "report.md", "report.png", "report.json")
    assert lines[-4:] == [str(made.root / name) for name in names]
    assert all((made.root / name).is_file() for name in names)


def test_a_models_name_is_enough_and_a_path_may_end_in_a_dot(
    cli: CommandLine, made: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("report", "tiny", "-q").code == 0
    assert cli("report", "tiny", "--work-dir", tmp_path / "work", "-q").code == 0
    monkeypatch.chdir(made.root)
    ran = cli("report", ".")
    assert ran.code == 0, ran.err
    assert str(made.root / "report.html") in ran.out


def test_json_is_the_reports_own_document(cli: CommandLine, made: Workspace) -> None:
    ran = cli("report", "tiny", "--json", "-q", "--quantized-by", "ada")
    assert (ran.code, ran.err) == (0, "")
    document = ran.document
    assert document == json.loads((made.root / "report.json").read_text(encoding="utf-8"))
    assert (document["schema"], document["version"], document["quantized_by"]) == ("imatrix-runner/report", 1, "ada")
    assert [level["name"] for level in document["levels"]] == list(LEVELS)


def test_quiet_says_nothing(cli: CommandLine, made: Workspace) -> None:
    ran = cli("report", "tiny", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_the_name_on_the_card_may_stand_in_the_settings_file(cli: CommandLine, made: Workspace, tmp_path: Path) -> None:
    (tmp_path / "imatrix-runner.toml").write_text('quantized-by = "ada"\n', encoding="utf-8")
    assert cli("report", "tiny", "--json").document["quantized_by"] == "ada"
    assert "quantized_by: ada" in (made.root / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["nothing-here", "work", "../elsewhere", ""])
def test_where_there_is_no_journal_there_is_no_report(cli: CommandLine, made: Workspace, name: str) -> None:
    ran = cli("report", name)
    assert ran.code == 6
    assert "is not a workspace" in ran.err
    assert "imatrix-runner status" in ran.err
    assert ran.out == ""


def test_a_file_in_the_way_is_exit_6_with_three_lines(cli: CommandLine, made: Workspace) -> None:
    (made.root / "report.md").write_text("mine", encoding="utf-8")
    ran = cli("report", "tiny")
    assert ran.code == 6
    assert "is in the way of the report" in ran.err
    assert ran.err.count("\n  Why: ") == ran.err.count("\n  Do:  ") == 1


def test_a_workspace_in_use_is_left_alone(cli: CommandLine, made: Workspace) -> None:
    with hold(made, "somebody else"):
        ran = cli("report", "tiny")
    assert ran.code == 7
    assert not (made.root / "report.html").exists()
