"""A type that only a fork's llama-quantize offers, next to levels of the pass: one plan, one run, each by its own engine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from imatrix_runner.journal import Journal
from support.caches import proven_cache
from support.command_line import Ran, RunCommand
from support.llama_tools import BareTools, fake_tools, leftovers, levels_in, times
from support.oracles import quantized

FORK = """
case " $* " in *" --help "*) "$real" --help; echo "  77  or  Q3_K_HIFI :  3.90G, +0.5000 ppl @ Llama-3-8B"; exit 1;; esac
for word in "$@"; do
    shift
    if [ "$word" = Q3_K_HIFI ]; then word=Q3_K_M; own=1; fi
    set -- "$@" "$word"
done
case " $* " in *" --version "*|*" --dry-run "*) exec "$real" "$@";; esac
if [ -z "$own" ]; then echo "only the fork's own type is the fork's"; exit 1; fi
"""
"""A llama-quantize that offers Q3_K_HIFI (bytes of Q3_K_M), and refuses to quantise to anything else."""

LEVELS = "Q4_K_M,Q3_K_HIFI,Q6_K"
FTYPES = {"Q4_K_M": "Q4_K_M", "Q3_K_HIFI": "Q3_K_M", "Q6_K": "Q6_K"}


@dataclass(frozen=True)
class Machine:
    """A machine with llama-cpp-python, and a fork in the ``PATH`` that nobody named."""

    runner: RunCommand
    tools: BareTools
    fork: Path
    env: dict[str, str]
    workspace: Path

    def __call__(self, *arguments: str | Path) -> Ran:
        return self.runner(*arguments, "--json", env=self.env)

    def are_bare(self, model: Path, imatrix: Path, levels: dict[str, str] = FTYPES) -> None:
        bare = {name: quantized(self.tools, model, ftype, imatrix=imatrix).digests[0] for name, ftype in levels.items()}
        assert levels_in(self.workspace) == bare
        assert leftovers(self.workspace) == []

    def engines(self) -> dict[str, str]:
        """The first word of what the journal says made each level."""
        steps = Journal(self.workspace / "journal.json").steps()
        made = {name: record.inputs["engine"] for name, record in steps.items() if name.startswith("level-")}
        return {name.removeprefix("level-"): engine.split()[0] for name, engine in made.items()}


@pytest.fixture
def machine(runner: RunCommand, tools: BareTools, tmp_path: Path) -> Machine:
    return _machine(runner, tools, tmp_path, FORK)


def _machine(runner: RunCommand, tools: BareTools, folder: Path, script: str) -> Machine:
    fork = fake_tools(tools.toolchain, folder / "fork", llama_quantize=script)
    env = {
        "PATH": f"{fork}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "IMATRIX_RUNNER_CACHE": str(proven_cache(folder / "cache")),
        "IMATRIX_RUNNER_LLAMA_CPP": "",
        "LLAMA_CPP_LIB_PATH": str(tools.toolchain.directory),
    }
    return Machine(runner, tools, fork, env, folder / "work" / "tiny")


def test_one_run_from_the_text_to_all_levels(machine: Machine, tiny_model: Path, tiny_text: Path) -> None:
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--chunks", "8", "--levels", LEVELS)
    dry = machine(*arguments, "--dry-run")
    assert dry.code == 0, dry.err
    assert [level["state"] for level in dry.document["plan"]["levels"]] == ["todo"] * 3
    done = machine(*arguments)
    assert done.code == 0, done.err
    assert f"Q3_K_HIFI: made by {machine.fork}, because only these programs offer it." in done.err
    document = done.document
    assert document["engine"] == "embedded"
    planned = {level["level"]: level["bytes"] for level in document["plan"]["levels"]}
    assert {level["level"]: level["bytes"] for level in document["levels"]} == planned
    assert [level["status"] for level in document["levels"]] == ["done"] * 3
    (figures,) = document["passes"]
    assert {cost["type"] for cost in figures["types"]} == {"q4_K", "q6_K"}
    assert machine.engines() == {"Q4_K_M": "llama-cpp-python", "Q6_K": "llama-cpp-python", "Q3_K_HIFI": "llama.cpp"}
    assert str(machine.fork / "llama-quantize") in Journal(machine.workspace / "journal.json")["level-Q3_K_HIFI"].command
    machine.are_bare(tiny_model, machine.workspace / "imatrix.gguf")

    before = times(sorted(machine.workspace.glob("*.gguf")))
    again = machine(*arguments)
    assert [level["status"] for level in again.document["levels"]] == ["skipped"] * 3
    assert again.document["passes"] == []
    assert times(sorted(machine.workspace.glob("*.gguf"))) == before


@pytest.mark.parametrize("more", ["", "--one-by-one", "--verify full", "--engine embedded --llama-cpp FORK"])
def test_whichever_way_the_levels_are_made(more: str, machine: Machine, tiny_model: Path, tiny_imatrix: Path) -> None:
    options = more.replace("FORK", str(machine.fork)).split()
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", LEVELS, *options)
    done = machine(*arguments)
    assert done.code == 0, done.err
    assert len(done.document["passes"]) == (2 if "--one-by-one" in options else 1)
    assert machine.engines()["Q3_K_HIFI"] == "llama.cpp"
    machine.are_bare(tiny_model, tiny_imatrix)
    assert [level["status"] for level in machine(*arguments).document["levels"]] == ["skipped"] * 3


def test_the_forks_level_alone_needs_no_pass(machine: Machine, tiny_model: Path, tiny_imatrix: Path) -> None:
    done = machine("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "q3_k_hifi")
    assert done.code == 0, done.err
    assert done.document["passes"] == []
    assert done.document["plan"]["levels"][0]["level"] == "Q3_K_HIFI"
    machine.are_bare(tiny_model, tiny_imatrix, {"Q3_K_HIFI": "Q3_K_M"})


def test_what_the_library_offers_is_not_made_again_when_the_fork_comes_or_goes(
    machine: Machine, tiny_model: Path, tiny_imatrix: Path
) -> None:
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels")
    assert machine(*arguments, "Q4_K_M").code == 0
    with_fork = machine(*arguments, "Q4_K_M,Q3_K_HIFI")
    assert {level["level"]: level["status"] for level in with_fork.document["levels"]} == {
        "Q4_K_M": "skipped",
        "Q3_K_HIFI": "done",
    }
    machine.env["PATH"] = os.environ["PATH"]
    gone = machine(*arguments, "Q4_K_M,Q3_K_HIFI")
    assert gone.code == 2
    assert "Q3_K_HIFI" in gone.err
    assert [level["status"] for level in machine(*arguments, "Q4_K_M").document["levels"]] == ["skipped"]


def test_a_named_fork_makes_everything(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    """As before there were passes: whoever names programs wants their work."""
    offers_only = FORK.replace('if [ -z "$own" ]', "if false")
    machine = _machine(runner, tools, tmp_path, offers_only)
    done = machine("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", LEVELS, "--llama-cpp", machine.fork)
    assert done.code == 0, done.err
    assert "Engine: binaries, because --llama-cpp names the llama.cpp programs to use." in done.err
    assert (done.document["engine"], done.document["passes"]) == ("binaries", [])
    assert set(machine.engines().values()) == {"llama.cpp"}
    machine.are_bare(tiny_model, tiny_imatrix)


def test_a_fork_that_fails_costs_its_own_level_only(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    machine = _machine(runner, tools, tmp_path, FORK + 'echo "ggml_abort: no such luck"; kill -ABRT $$')
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", LEVELS)
    done = machine(*arguments)
    assert done.code == 100, done.err
    status = {level["level"]: level["status"] for level in done.document["levels"]}
    assert status == {"Q4_K_M": "done", "Q3_K_HIFI": "failed", "Q6_K": "done"}
    machine.are_bare(tiny_model, tiny_imatrix, {"Q4_K_M": "Q4_K_M", "Q6_K": "Q6_K"})
    (machine.fork / "llama-quantize").unlink()
    healed = _machine(runner, tools, tmp_path / "healed", FORK)
    machine.env["PATH"] = healed.env["PATH"]
    again = machine(*arguments)
    assert again.code == 0, again.err
    assert [level["status"] for level in again.document["levels"]] == ["skipped", "done", "skipped"]
    machine.are_bare(tiny_model, tiny_imatrix)
