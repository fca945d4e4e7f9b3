"""Help is complete, quick, and costs no import that it does not need."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from children import python
from command_line import PROGRAM
from in_process import CommandLine

from imatrix_runner import __version__
from imatrix_runner.cli.main import cli as root

HEAVY = {"numpy", "gguf", "rich", "huggingface_hub"}


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and subcommand, with the words that lead to it."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


EVERY = dict(commands(root))


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_command_has_a_page_that_names_each_of_its_options(cli: CommandLine, words: tuple[str, ...]) -> None:
    ran = cli(*words, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: imatrix-runner {' '.join(words)} ")
    for parameter in EVERY[words].params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in ran.out


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_no_command_and_no_option_without_its_sentence(words: tuple[str, ...]) -> None:
    command = EVERY[words]
    assert command.help
    helps = {option.name: option.help or "" for option in command.params if isinstance(option, click.Option)}
    assert {name: text for name, text in helps.items() if not text.rstrip().endswith((".", ")"))} == {}


def test_the_documented_commands_are_there(cli: CommandLine) -> None:
    said = cli("--help").out
    names = ("run", "quantize", "advise", "imatrix", "calibration", "evaluate", "report", "tools", "doctor", "status", "demo")
    for name in (*names, "completion"):
        assert f"\n  {name} " in said
    assert {("imatrix", "generate"), ("tools", "locate"), ("tools", "build"), ("tools", "install")} <= set(EVERY)
    assert {("calibration", "list"), ("calibration", "fetch")} <= set(EVERY)


@pytest.mark.parametrize(
    "option",
    [
        *("-ngl", "-c", "-b", "-ub", "-t", "--chunks", "--chunk", "--output-frequency", "--save-frequency", "--parse-special"),
        *("-ts", "-sm", "-mg", "-ot", "-fa", "--no-mmap", "--until-converged", "--min-expert-tokens"),
        *("--process-output", "--no-ppl", "--include-weights", "--exclude-weights", "--tensor-type", "--tensor-type-file"),
        *("--output-tensor-type", "--token-embedding-type", "--pure", "--keep-split", "--leave-output-tensor", "--override-kv"),
        *("--prune-layers", "--allow-requantize", "--max-buffer-size", "--levels", "--preset", "--imatrix", "--jobs"),
        *("--work-dir", "--engine", "--dry-run", "--json", "-q", "-v", "--llama-cpp", "--timeout", "--show-config"),
    ],
)
def test_run_knows_the_contract_s_options(option: str) -> None:
    parameters = EVERY[("run",)].params
    assert option in {spelling for parameter in parameters for spelling in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("command", ["run", "evaluate"])
@pytest.mark.parametrize("option", ["--text", "--max-disk", "--ab", "--domain", "--predict", "--target-kld", "--target-size"])
def test_measuring_is_asked_for_alike(command: str, option: str) -> None:
    assert option in {spelling for parameter in EVERY[(command,)].params for spelling in parameter.opts}


@pytest.mark.parametrize("option", ["--levels", "--chunks", "-c", "-ngl", "-t", "--kl-divergence-base", "--again", "--dry-run"])
def test_evaluate_knows_the_contract_s_options(option: str) -> None:
    assert option in {spelling for parameter in EVERY[("evaluate",)].params for spelling in parameter.opts}


def test_quantise_is_another_spelling(cli: CommandLine) -> None:
    one, other = cli("quantize", "--help"), cli("quantise", "--help")
    assert one.code == other.code == 0
    assert one.out.splitlines()[2:] == other.out.splitlines()[2:]


def test_without_a_command_the_page_is_shown(cli: CommandLine) -> None:
    ran = cli()
    assert ran.code == 0
    assert "Commands:" in ran.out


@pytest.mark.parametrize("group", ["imatrix", "calibration", "tools"])
def test_a_group_without_its_command_is_a_usage_error_that_shows_them(cli: CommandLine, group: str) -> None:
    ran = cli(group)
    assert ran.code == 2
    assert "Commands:" in ran.out


def test_the_version(cli: CommandLine) -> None:
    ran = cli("--version")
    assert ran.code == 0
    assert __version__ in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["run", "--help"], ["imatrix", "generate", "--help"], ["calibration", "fetch", "--help"], ["--version"]),
        *(["evaluate", "--help"], ["report", "--help"], ["advise", "--help"]),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = """
        import json, sys
        from imatrix_runner.cli.main import main
        try:
            main(json.loads(sys.argv[1]))
        finally:
            print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    """
    told = subprocess.run(python(script, json.dumps(arguments)).argv, cwd=tmp_path, capture_output=True, check=True)
    assert not HEAVY & set(json.loads(told.stdout.splitlines()[-1]))


def test_the_package_itself_imports_nothing_but_itself() -> None:
    script = """
        import sys
        before = set(sys.modules)
        import imatrix_runner
        print(*sorted(set(sys.modules) - before))
    """
    told = subprocess.run(python(script).argv, capture_output=True, check=True, text=True)
    assert {name.partition(".")[0] for name in told.stdout.split()} <= {"imatrix_runner", "__future__"}


@pytest.mark.parametrize("argv", [(*PROGRAM, "--help"), python("import imatrix_runner").argv], ids=["--help", "import"])
def test_it_is_there_at_once(argv: tuple[str, ...], tmp_path: Path) -> None:
    """Under 0.3 s: the best of some tries, because other programs may hold the machine."""

    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run(argv, cwd=tmp_path, capture_output=True, check=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.3
