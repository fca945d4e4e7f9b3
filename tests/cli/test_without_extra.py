"""A plain install, without the extra ``calibration``: what needs it says so in three lines, and everything else works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from packaging.requirements import Requirement

from imatrix_runner.batch.notices import Notifier
from imatrix_runner.errors import ToolchainError
from imatrix_runner.events import ignore
from imatrix_runner.extras import CALIBRATION, CONVERT, NOTIFY, TASKS, Extra
from support.children import python
from support.command_line import Ran
from support.evaluations import held_out_text
from support.in_process import CommandLine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Plain = Callable[..., Ran]

_PLAIN = """
    import json, sys
    sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))  # importing one raises ModuleNotFoundError
    from imatrix_runner.cli.main import main
    main(sys.argv[2:])
"""


def test_notifications_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imatrix_runner.batch.notices.NOTIFY", Extra("notify", ("no_such_package",)))
    Notifier((), ignore)
    with pytest.raises(ToolchainError) as caught:
        Notifier(("ntfy://topic",), ignore)
    assert 'pip install "imatrix-runner[notify]"' in caught.value.todo


@pytest.fixture
def plain(tmp_path: Path) -> Plain:
    """Run a command line in a process in which the extra's modules cannot be imported."""

    def run(*arguments: str | Path) -> Ran:
        argv = python(_PLAIN, json.dumps(CALIBRATION.modules), *arguments).argv
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Prompts as Parquet."""
    path = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["One?", "Two?"]}), path)
    return path


def says_what_to_install(ran: Ran, what: str) -> None:
    assert ran.code == ToolchainError.exit_code
    first, why, todo = ran.err.splitlines()[-3:]
    assert first == f"Error: {what} needs packages that are not installed."
    assert why == "  Why: there is no datasketch, fontTools, py3langid, pyarrow; a plain install leaves them out."
    assert todo == '  Do:  Install them with: pip install "imatrix-runner[calibration]"'
    assert "Traceback" not in ran.err


def test_building_a_text(plain: Plain, tiny_text: Path) -> None:
    says_what_to_install(plain("calibration", "build", tiny_text, "-o", "out.txt"), "Building a calibration text")


def test_inspecting_a_text(plain: Plain, tiny_text: Path) -> None:
    says_what_to_install(plain("calibration", "inspect", tiny_text), "Inspecting a calibration text")


def test_prompts_as_parquet(plain: Plain, tiny_model: Path, table: Path) -> None:
    ran = plain("run", tiny_model, "--levels", "Q8_0", "--imatrix", "none", "--domain", table, "--dry-run")
    says_what_to_install(ran, "Reading a Parquet file")


def test_scoring_tasks(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: CommandLine) -> None:
    assert cli("run", tiny_model, "--levels", "Q8_0", "--imatrix", "none", "-q", "--work-dir", tmp_path).code == 0
    monkeypatch.setattr("imatrix_runner.evaluate.tasks.measure_tasks.TASKS", Extra("tasks", ("no_such_package",)))
    ran = cli("evaluate", tiny_model, "--tasks", "mini", "--work-dir", tmp_path)
    assert ran.code == ToolchainError.exit_code
    assert 'pip install "imatrix-runner[tasks]"' in ran.err
    assert TASKS.modules[0] not in {each.partition(".")[0] for each in sys.modules}


def test_texts_are_listed(plain: Plain) -> None:
    ran = plain("calibration", "list")
    assert (ran.code, ran.err) == (0, "")


def test_levels_are_made_and_measured_on_a_text_compared_with_the_calibration(
    plain: Plain, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    levels = ("--levels", "Q4_K_M", "-c", "128", "--chunks", "4", "-t", "1")
    text = held_out_text(tmp_path / "held-out.txt", chunks=20)
    ran = plain("run", tiny_model, *levels, "-f", tiny_text, "--text", text, "--json")
    assert ran.code == 0, ran.err
    assert set(ran.document["measured"]["levels"]) == {"Q4_K_M"}
    refused = plain("evaluate", tiny_model, "--text", tiny_text)
    assert refused.code == 6
    assert "cannot say how good the levels are" in refused.err


def test_advice_leaves_out_what_the_extra_would_tell(plain: Plain, tiny_model: Path, tiny_text: Path) -> None:
    arguments = ("advise", tiny_model, "-f", tiny_text, "--no-probe", "--levels", "Q8_0", "--use", "code", "--json")
    ran = plain(*arguments)
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.err.splitlines() if "near-duplicates" in line]
    assert line.endswith('pip install "imatrix-runner[calibration]"')
    calibration = ran.document["calibration"]
    assert calibration["languages"] == []
    assert calibration["tokens"] > 0
    assert "code-share" not in {judgement["kind"] for judgement in calibration["judgements"]}


def test_the_extras_are_those_of_the_package() -> None:
    """The modules of one come with its packages; what else the converter imports comes with others of them."""
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    packages = {name: {Requirement(text).name for text in texts} for name, texts in extras.items()}
    assert packages["calibration"] == {module.lower() for module in CALIBRATION.modules}
    assert packages["notify"] == {*NOTIFY.modules}
    assert {"torch", "transformers", "safetensors", "sentencepiece"} <= packages["convert"] & set(CONVERT.modules)


def test_an_extra_that_is_there_is_not_asked_for() -> None:
    Extra("some", ("json",)).require("Anything")
    with pytest.raises(ToolchainError, match="there is no no_such_module"):
        Extra("some", ("json", "no_such_module")).require("Anything")
