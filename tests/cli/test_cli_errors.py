"""Bad input: what, why and what to do on three lines, and the right exit code. Nothing is computed, nothing raised."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from imatrix_runner import __version__
from imatrix_runner.cli import main as main_module
from imatrix_runner.workspace import Workspace, hold
from support.command_line import PROGRAM, Ran, RunCommand
from support.in_process import CommandLine
from support.tiny_models import write_llama_gguf


def assert_three_lines(ran: Ran, code: int, *told: str) -> None:
    """``Error: what. / Why: … / Do: …`` is all that is said, and each of ``told`` is in it."""
    what, why, todo = ran.err.splitlines()[-3:]
    assert ran.code == code
    assert what.startswith("Error: ")
    assert why.startswith("  Why: ")
    assert todo.startswith("  Do:  ")
    assert all(line.rstrip().split(": ", 1)[1] for line in (what, why, todo))
    assert "Traceback" not in ran.err
    for text in told:
        assert text in ran.err


def said(value: object) -> str | None:
    """A test is called by the command line it tries."""
    return " ".join(value) if isinstance(value, list) and "".join(value).isprintable() and value[0].isalpha() else ""


@pytest.fixture
def model(tmp_path: Path, demo_model: Path) -> Path:
    path = tmp_path / "demo.gguf"
    path.symlink_to(demo_model)
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["frobnicate"], ["No such command 'frobnicate'", "imatrix-runner --help"]),
        (["imatrix", "frobnicate"], ["No such command", "imatrix-runner imatrix --help"]),
        (["run"], ["Missing argument 'MODEL'", "imatrix-runner run [OPTIONS] MODEL"]),
        (["run", "m", "--levls", "Q4_0"], ["--levls", "'--levels'"]),
        (["run", "m", "--preset", "mine"], ["'mine' is not one of", "bartowski"]),
        (["run", "m", "-c", "many"], ["'many' is not a valid integer"]),
        (["run", "m", "-c", "1"], ["not in the range"]),
        (["run", "m", "-ofreq", "0"], ["not in the range"]),
        (["run", "m", "--engine", "magic"], ["'magic' is not one of"]),
        (["run", "m", "-ngl", "x"], ["Invalid -ngl 'x'", "-ngl 99"]),
        (["run", "m", "-ngl", "-1"], ["-ngl '-1'"]),
        (["run", "m", "-ts", "3;1"], ["Invalid -ts '3;1'", "-ts 3,1"]),
        (["run", "m", "-ot", "exps"], ["Invalid -ot 'exps'", "REGEX=BUFFER", "_exps=CPU"]),
        (["run", "m", "-sm", "diagonal"], ["'diagonal' is not one of"]),
        (["run", "m", "-fa", "maybe"], ["'maybe' is not one of"]),
        (["run", "m", "-mg", "-1"], ["not in the range"]),
        (["run", "m", "--until-converged", "0"], ["not in the range"]),
        (["run", "m", "--until-converged", "soon"], ["'soon' is not a valid float"]),
        (["run", "m", "--min-expert-tokens", "-1"], ["not in the range"]),
        (["run", "m", "--jobs", "many"], ["Invalid --jobs 'many'", "--jobs 2"]),
        (["run", "m", "--jobs", "0"], ["--jobs '0'"]),
        (["run", "m", "-j", "-3"], ["--jobs '-3'"]),
        (["run", "m", "--include-weights", "a", "--exclude-weights", "b"], ["exclude each other"]),
        (["run", "m", "--tensor-type", "ffn"], ["--tensor-type ffn has no type", "ffn_down=q6_k"]),
        (["run", "m", "--tensor-type-file", "none.txt"], ["none.txt does not exist"]),
        (["run", "m", "--prune-layers", "1,x"], ["Invalid --prune-layers '1,x'"]),
        (["run", "m", "-c", "3000", "-b", "2048"], ["cannot be divided into batches"]),
        (["quantize", "m", "--imatrix", "generate"], ["quantize does not generate", "imatrix-runner run"]),
        (["completion", "cmd"], ["'cmd' is not one of"]),
    ],
    ids=said,
)
def test_a_wrong_request_is_exit_2(cli: CommandLine, tmp_path: Path, arguments: Sequence[str], told: Sequence[str]) -> None:
    ran = cli(*arguments)
    assert_three_lines(ran, 2, *told)
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_level_suggests_near_ones(cli: CommandLine, model: Path) -> None:
    ran = cli("run", model, "--levels", "Q8_0,Q4_KM", "--dry-run")
    assert_three_lines(ran, 2, "Unknown level 'Q4_KM'", "similar names are", "Q4_K_M")


def test_a_missing_model_is_named(cli: CommandLine) -> None:
    assert_three_lines(cli("run", "none.gguf", "--dry-run"), 6, "none.gguf")


def test_a_file_that_is_no_model_is_called_what_it_is(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    assert_three_lines(cli("run", "page.gguf", "--dry-run"), 6, "not a GGUF file", "a web page")


def test_a_model_as_imatrix_is_refused(cli: CommandLine, model: Path) -> None:
    ran = cli("run", model, "--imatrix", model, "--dry-run")
    assert_three_lines(ran, 6, "not a usable imatrix", "model weights")


def test_the_imatrix_of_another_model_is_refused(cli: CommandLine, tmp_path: Path, model: Path, tiny_text: Path) -> None:
    other = write_llama_gguf(tmp_path / "other.gguf", hidden=512, layers=1)
    made = cli("imatrix", "generate", other, "-f", tiny_text, "-c", "64", "--chunks", "2", "-o", "other-imatrix.gguf")
    assert made.code == 0, made.err
    ran = cli("run", model, "--imatrix", "other-imatrix.gguf", "--dry-run")
    assert_three_lines(ran, 6, "does not belong to demo", "512 values where the model needs 256")


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "it is empty"), (b"a\0b", "binary"), (b"\xe4", "UTF-8"), (b"two words", "at least 2 must remain")],
)
def test_a_useless_calibration_text_is_exit_6(cli: CommandLine, tmp_path: Path, model: Path, content: bytes, why: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert_three_lines(cli("run", model, "-f", "text.txt", "--dry-run"), 6, why)


def test_no_toolchain_is_exit_3(cli: CommandLine, tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_three_lines(cli("run", model, "--llama-cpp", "empty"), 3, "--llama-cpp", "tools build")


def test_an_engine_that_cannot_be_used_is_exit_3(
    cli: CommandLine, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    ran = cli("run", model, "--engine", "embedded")
    assert_three_lines(ran, 3, f"{tmp_path} (LLAMA_CPP_LIB_PATH) holds no llama library", "Unset LLAMA_CPP_LIB_PATH")
    assert not (tmp_path / "work").exists()


def test_what_the_embedded_engine_cannot_do_is_exit_2(cli: CommandLine, model: Path) -> None:
    ran = cli("run", model, "--engine", "embedded", "--dry-run", "--", "--rope-scaling", "yarn")
    assert_three_lines(ran, 2, "--rope-scaling", "--engine binaries")
    ran = cli("run", model, "--engine", "embedded", "--dry-run", "--levels", "Q3_K_HIFI")
    assert_three_lines(ran, 2, "Unknown level 'Q3_K_HIFI'")


def test_a_held_workspace_is_exit_7_and_names_the_owner(cli: CommandLine, tmp_path: Path, model: Path) -> None:
    with hold(Workspace(tmp_path / "work" / "demo", "demo"), "imatrix-runner run the-other"):
        assert_three_lines(cli("run", model), 7, "imatrix-runner run the-other", "--work-dir")


def test_only_impossible_levels_is_exit_6_before_anything_runs(cli: CommandLine, tmp_path: Path, model: Path) -> None:
    ran = cli("run", model, "--imatrix", "none", "--levels", "IQ2_XS", "-q")
    assert_three_lines(ran, 6, "needs an importance matrix")
    assert list(tmp_path.glob("work/demo/*.gguf")) == []


def test_a_bad_settings_file_is_told(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "imatrix-runner.toml").write_text("work-dri = 'x'\n")
    assert_three_lines(cli("status"), 2, "Unknown setting 'work-dri'", "'work-dir'")
    (tmp_path / "imatrix-runner.toml").write_text("= 1\n")
    assert_three_lines(cli("status"), 6, "not valid TOML")


def test_a_bug_is_called_one_and_keeps_its_traceback(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("never expected")

    monkeypatch.setattr(main_module.cli, "main", lambda *_arguments, **options: broken(**options))
    ran = cli("status")
    assert ran.code == 1
    assert "never expected" in ran.err
    assert f"This is a bug in imatrix-runner {__version__}" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["run", "m", "--jobs", "x", "--json"], 2, "usage"),
        (["run", "--json"], 2, "usage"),
        (["run", "none.gguf", "--dry-run", "--json"], 6, "invalid-data"),
        (["run", "none.gguf", "--llama-cpp", "none", "--json"], 3, "toolchain"),
    ],
    ids=said,
)
def test_with_json_an_error_is_one_document_too(cli: CommandLine, arguments: Sequence[str], code: int, kind: str) -> None:
    ran = cli(*arguments)
    document = ran.document
    assert_three_lines(ran, code)
    assert {key: document[key] for key in ("schema", "version", "program", "exit_code")} == {
        "schema": "imatrix-runner/error",
        "version": 1,
        "program": __version__,
        "exit_code": code,
    }
    assert document["error"].keys() == {"kind", "what", "why", "do"}
    assert document["error"]["kind"] == kind
    assert f"Error: {document['error']['what']}." in ran.err


def test_the_process_ends_with_the_code(runner: RunCommand) -> None:
    ran = runner("run", "m", "-ngl", "x", "--json", program=PROGRAM)
    assert_three_lines(ran, 2)
    assert ran.document["exit_code"] == 2


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["status", "--json"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, arguments: list[str]) -> None:
    """As in ``imatrix-runner --help | head -1``: the pipe is closed before anything is written."""
    with subprocess.Popen([*PROGRAM, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
