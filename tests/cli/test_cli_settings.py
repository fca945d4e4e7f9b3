"""Where a setting comes from: flag, environment, file, default, in this order."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import imatrix_runner
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.main import cli as root
from imatrix_runner.cli.settings import FILE
from imatrix_runner.context.requests import DEFAULT_TOLERANCE
from support.in_process import CommandLine


def shown(cli: CommandLine, *arguments: str) -> dict[str, tuple[str, str]]:
    """What ``run --show-config`` tells: setting -> (value, origin)."""
    ran = cli("run", *arguments, "--show-config")
    assert (ran.code, ran.err) == (0, "")
    rows = (line.split(maxsplit=2) for line in ran.out.splitlines()[1:])
    return {name: (value, origin.strip()) for name, value, origin in rows}


def test_without_anything_all_is_default(cli: CommandLine) -> None:
    settings = shown(cli)
    assert settings["work-dir"] == ("work", "default")
    assert settings["ctx-size"] == ("512", "default")
    assert settings["levels"] == ("-", "default")
    assert settings["ppl"] == ("yes", "default")
    assert {origin for _, origin in settings.values()} == {"default"}


def test_each_origin_is_named_and_the_nearest_to_the_user_wins(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_text(
        'work-dir = "/from/file"\nctx-size = 256\nbatch-size = 1024\nlevels = ["Q4_K_M", "Q8_0"]\nppl = false\n'
        'tensor-type = ["a=q8_0", "b=q6_k"]\n'
    )
    monkeypatch.setenv("IMATRIX_RUNNER_CTX_SIZE", "128")
    monkeypatch.setenv("IMATRIX_RUNNER_BATCH_SIZE", "512")
    settings = shown(cli, "-b", "64")
    assert settings["work-dir"] == ("/from/file", str(tmp_path / FILE))
    assert settings["ctx-size"] == ("128", "environment IMATRIX_RUNNER_CTX_SIZE")
    assert settings["batch-size"] == ("64", "command line")
    assert settings["levels"] == ("Q4_K_M,Q8_0", str(tmp_path / FILE))
    assert settings["tensor-type"] == ("a=q8_0,b=q6_k", str(tmp_path / FILE))
    assert settings["ppl"] == ("no", str(tmp_path / FILE))


def test_the_table_of_pyproject_is_named_as_origin(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.imatrix-runner]\njobs = 3\n")
    assert shown(cli)["jobs"] == ("3", str(tmp_path / "pyproject.toml"))


def test_a_file_that_came_with_a_model_does_not_choose_programs_or_trust(cli: CommandLine, tmp_path: Path) -> None:
    """Settings of the current directory apply by themselves; a model's archive may hold some."""
    file = tmp_path / FILE
    for named in ("tools", "./tools/../tools/bin", str(tmp_path / "tools")):
        file.write_text(f'llama-cpp = "{named}"\n')
        ran = cli("doctor", "--offline")
        assert ran.code == 2
        assert "cannot name programs next to it" in ran.err
        assert "IMATRIX_RUNNER_LLAMA_CPP" in ran.err
    file.write_text('llama-cpp = "/opt/llama.cpp"\n')
    assert shown(cli)["llama-cpp"] == ("/opt/llama.cpp", str(file))
    file.write_text("trust-remote-code = true\n")
    assert "Unknown setting 'trust-remote-code'" in cli("run", "--show-config").err


def test_a_pattern_is_shown_as_it_was_typed(cli: CommandLine) -> None:
    assert shown(cli, "--tensor-type", "attn_[qk]:x:=q8_0")["tensor-type"] == ("attn_[qk]:x:=q8_0", "command line")


def test_a_tolerance_may_be_left_to_the_default(cli: CommandLine, tmp_path: Path) -> None:
    assert shown(cli)["until-converged"] == ("-", "default")
    assert shown(cli, "--until-converged")["until-converged"] == (str(DEFAULT_TOLERANCE), "command line")
    assert shown(cli, "--until-converged", "-q")["until-converged"] == (str(DEFAULT_TOLERANCE), "command line")
    assert shown(cli, "--until-converged", "0.01")["until-converged"] == ("0.01", "command line")
    (tmp_path / FILE).write_text("until-converged = 0.05\n")
    assert shown(cli)["until-converged"] == ("0.05", str(tmp_path / FILE))


def test_a_file_s_value_is_checked_like_a_typed_one(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("ctx-size = 3\n")
    ran = cli("run", "m")
    assert ran.code == 2
    assert "not in the range" in ran.err


def test_settings_reach_subcommands_too(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('work-dir = "elsewhere"\n')
    ran = cli("imatrix", "generate", "--show-config")
    assert ran.code == 0
    assert "elsewhere" in ran.out
    assert "elsewhere" in cli("status").out


def test_what_is_dangerous_cannot_be_set_by_a_file(cli: CommandLine, tmp_path: Path) -> None:
    """A file in the current folder may come with a download: it must not allow code from the model's directory."""
    (tmp_path / FILE).write_text("trust-remote-code = true\n")
    assert cli("run", "m").code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli: CommandLine, shell: str) -> None:
    ran = cli("completion", shell)
    assert ran.code == 0
    assert "_IMATRIX_RUNNER_COMPLETE" in ran.out


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("Q8_0,iq2_x", ["Q8_0,IQ2_XS", "Q8_0,IQ2_XXS"]),
        ("m", ["MXFP4_MOE", "MIX@like:", "MIX@kld:", "MIX@ram:", "MIX@vram:", "MIX@"]),
        ("Q8_0,MIX@", ["Q8_0,MIX@like:", "Q8_0,MIX@kld:", "Q8_0,MIX@ram:", "Q8_0,MIX@vram:"]),
        ("mix@like:iq2_x", ["MIX@like:IQ2_XS", "MIX@like:IQ2_XXS"]),
        ("MIX@ram:64GiB,v", ["MIX@ram:64GiB,vram:"]),
        ("Q8_0,mix@vram:24GiB,r", ["Q8_0,mix@vram:24GiB,ram:"]),
        ("MIX@ram:64GiB,vram:24GiB,vr", []),
    ],
)
def test_level_names_complete(typed: str, completed: list[str]) -> None:
    words = {"COMP_WORDS": f"imatrix-runner run --levels {typed}", "COMP_CWORD": "3"}
    env = {"_IMATRIX_RUNNER_COMPLETE": "bash_complete", **words}
    ran = CliRunner().invoke(root, env=env, prog_name="imatrix-runner", obj=Invocation((), ()))
    assert ran.output.split() == [f"plain,{name}" for name in completed]


def _typed_in_bash(line: str, folder: Path) -> str:
    """What is on bash's command line after ``line``, which presses the tabulator with ``\\t``."""
    program = folder / "imatrix-runner"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m imatrix_runner "$@"\n')
    program.chmod(0o755)
    parent, child = os.openpty()
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "> "}
    bash = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(bash, stdin=child, stdout=child, stderr=child, env=env, cwd=folder, start_new_session=True) as shell:
        os.close(child)
        os.write(parent, b'eval "$(imatrix-runner completion bash)"; echo rea""dy\n')
        _read_until(parent, b"ready")
        # Ctrl-A goes to the line's beginning: the shell prints the words instead of running the command.
        os.write(parent, line.encode() + b"done\x01printf '<%s>' \n")
        printed = _read_until(parent, b"done>")
        shell.kill()
    os.close(parent)
    return printed[printed.rindex("<imatrix-runner>") + 1 : printed.rindex("done>")].replace("><", " ")


def _read_until(terminal: int, end: bytes) -> str:
    found = b""
    while end not in found:
        assert select.select([terminal], [], [], 60)[0], found.decode()
        found += os.read(terminal, 4096)
    return found.decode()


@pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="bash in a pseudo terminal")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("run --levels Q8_0,mix@like:iq2_xx\t", "run --levels Q8_0,mix@like:IQ2_XXS "),
        ("run org/name@main:m.gguf --levels MIX@k\t", "run org/name@main:m.gguf --levels MIX@kld:"),
        ("run --levels MIX@ram:64GiB,v\t24GiB ", "run --levels MIX@ram:64GiB,vram:24GiB "),
        ("run m.gguf --levels 'MIX@like:q3_k_x\t", "run m.gguf --levels MIX@like:Q3_K_XL "),
        ("run m.gguf --like q3_k_x\t", "run m.gguf --like Q3_K_XL "),
    ],
)
def test_bash_completes_names_with_colons(typed: str, completed: str, tmp_path: Path) -> None:
    assert _typed_in_bash(f"imatrix-runner {typed}", tmp_path) == f"imatrix-runner {completed}"


def test_show_config_as_a_document(cli: CommandLine) -> None:
    document = cli("run", "--show-config", "--json", "-c", "256").document
    assert document["schema"] == "imatrix-runner/config"
    found = {entry["name"]: (entry["value"], entry["from"]) for entry in document["settings"]}
    assert found["ctx-size"] == (256, "command line")
    assert found["work-dir"] == ("work", "default")


def test_a_misspelt_variable_is_told_with_the_one_that_was_meant(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMATRIX_RUNNER_CTX_SIZ", "128")
    monkeypatch.setenv("IMATRIX_RUNNER_LEVELS", "Q8_0")
    monkeypatch.setenv("IMATRIX_RUNNER_CACHE", os.environ.get("IMATRIX_RUNNER_CACHE", ""))
    ran = cli("run", "--show-config")
    (line,) = ran.err.splitlines()
    assert "IMATRIX_RUNNER_CTX_SIZ has no effect" in line
    assert line.endswith("Did you mean IMATRIX_RUNNER_CTX_SIZE?")
    assert cli("run", "--show-config", "-q").err == ""


@pytest.mark.parametrize("command", [("quantize", "m"), ("evaluate", "m"), ("status",), ("imatrix", "stats", "m")])
def test_options_after_the_dashes_are_refused_where_nothing_takes_them(cli: CommandLine, command: tuple[str, ...]) -> None:
    ran = cli(*command, "--", "--no-warmup")
    assert ran.code == 2
    assert "takes no options after --" in ran.err
    assert "--no-warmup" in ran.err


def test_every_variable_that_the_program_reads_is_known(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be told to have no effect."""
    package = Path(imatrix_runner.__file__).parent
    read = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r'"(IMATRIX_RUNNER_[A-Z_]+)"', path.read_text(encoding="utf-8"))
    }
    assert len(read) >= 5
    for name in read - {"IMATRIX_RUNNER_LLAMA_CPP", "IMATRIX_RUNNER_CACHE"}:
        monkeypatch.setenv(name, "x")
    assert cli("run", "--show-config").err == ""
