"""Kernels that crash on this processor: found first, worked around where that is possible, and explained."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.embedded import bindings as find_module
from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE, Bindings, UnusableBindings, find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.journal import Journal
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.program_proof import ProgramProof, prove_programs
from imatrix_runner.toolchain.repacking import REPACKS, Repacking
from support.crashing import Where, crashes, crashing_library
from support.evaluations import held_out_text
from support.in_process import CommandLine

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD"),
]

LEVELS = "Q4_0,Q4_K_M,Q8_0"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crashing_library(tmp_path_factory.mktemp("crash"))


@pytest.fixture
def cache(tmp_path: Path, toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own: what is proven here is no other test's."""
    monkeypatch.setenv("IMATRIX_RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(LIBRARY_VARIABLE, str(toolchain.directory))
    return tmp_path / "cache"


def crash(monkeypatch: pytest.MonkeyPatch, library: Path, where: Where, number: int) -> None:
    for name, value in crashes(library, where, number).items():
        monkeypatch.setenv(name, value)


def found(toolchain: Toolchain, cache: Path, library: Path) -> Bindings:
    return find({LIBRARY_VARIABLE: str(toolchain.directory), "LD_PRELOAD": str(library)}, cache)


class TestLibrary:
    @pytest.mark.parametrize(("name", "why"), [("SIGILL", "illegal instruction"), ("SIGSEGV", "segmentation fault")])
    def test_repacked_weights_that_crash_are_done_without(
        self, name: str, why: str, toolchain: Toolchain, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crash(monkeypatch, library, "repacked", signal.Signals[name])
        repacking = found(toolchain, cache, library).repacking
        assert not repacking.works
        assert f"killed by {name} ({why}" in repacking.why

    def test_it_is_remembered_for_this_processor(
        self, toolchain: Toolchain, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crash(monkeypatch, library, "repacked", signal.SIGILL)
        first = found(toolchain, cache, library)
        monkeypatch.setenv("CRASH_WHERE", "long")  # of which the proof knows nothing
        assert found(toolchain, cache, library) == first
        monkeypatch.setattr(find_module, "cpu_features", lambda: "flags : another processor's")
        assert found(toolchain, cache, library).repacking == REPACKS

    def test_weights_that_crash_in_any_case_make_it_unusable(
        self, toolchain: Toolchain, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crash(monkeypatch, library, "quantised", signal.SIGABRT)
        with pytest.raises(UnusableBindings, match=r"killed by SIGABRT .*GGML_ASSERT\(tiles\) failed"):
            found(toolchain, cache, library)
        assert not (cache / "bindings").exists()

    def test_only_where_it_fails_figures_are_of_another_arithmetic(self, toolchain: Toolchain, cache: Path) -> None:
        bindings = find({LIBRARY_VARIABLE: str(toolchain.directory)}, cache)
        engine = EmbeddedEngine(bindings, Runner())
        assert engine.arithmetic().startswith(f"{bindings.identity()}, numpy ")
        assert "repack" not in engine.arithmetic()
        failing = EmbeddedEngine(replace(bindings, repacking=Repacking(False, "why")), Runner())
        assert failing.arithmetic() == f"{engine.arithmetic()}, --no-repack"
        assert failing.identity() == engine.identity()  # levels are quantised to the same bytes


class TestPrograms:
    def test_repacked_weights_that_crash_are_done_without(
        self, toolchain: Toolchain, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crash(monkeypatch, library, "repacked", signal.SIGSEGV)
        proof = prove_programs(toolchain, cache)
        assert not proof.repacking.works
        assert proof.repacking.why == "killed by SIGSEGV (segmentation fault)"
        monkeypatch.setenv("CRASH_WHERE", "long")
        assert prove_programs(toolchain, cache) == proof
        monkeypatch.delenv("LD_PRELOAD")
        assert prove_programs(toolchain, cache) == ProgramProof()

    def test_weights_that_crash_in_any_case_are_said(
        self, toolchain: Toolchain, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crash(monkeypatch, library, "quantised", signal.SIGABRT)
        assert "GGML_ASSERT(tiles) failed" in prove_programs(toolchain, cache).broken
        assert not (cache / "programs").exists()

    def test_programs_from_before_the_first_architecture_are_tried_with_another(
        self, toolchain: Toolchain, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from support.llama_tools import fake_tools

        crash(monkeypatch, library, "repacked", signal.SIGILL)
        old = fake_tools(toolchain, tmp_path / "old", llama_imatrix='case "$*" in *jamba*) exit 1;; esac')
        tools = replace(toolchain, tools={**toolchain.tools, "llama-imatrix": old / "llama-imatrix"})
        assert "SIGILL" in prove_programs(tools, cache).repacking.why


ENGINES = pytest.mark.parametrize("engine", ["embedded", "binaries"])


def arguments(engine: str, toolchain: Toolchain) -> tuple[str, ...]:
    programs = ("--llama-cpp", str(toolchain.directory)) if engine == "binaries" else ()
    return ("--engine", engine, *programs, "-c", "64", "-b", "256", "-ub", "256", "-t", "1")


@pytest.fixture
def made(tiny_model: Path, toolchain: Toolchain, tmp_path: Path, cli: CommandLine, cache: Path) -> tuple[str, ...]:
    """Levels of a model, and what is said after ``evaluate`` to measure them."""
    ran = cli("quantize", tiny_model, "--levels", LEVELS, "--engine", "embedded", "--kernels", "ggml")
    assert ran.code == 0, ran.err
    return (str(tiny_model), "--text", str(held_out_text(tmp_path / "held-out.txt")), "--chunks", "8")


@ENGINES
def test_levels_are_measured_without_repacking_and_that_is_said(
    engine: str,
    made: tuple[str, ...],
    toolchain: Toolchain,
    tmp_path: Path,
    cli: CommandLine,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash(monkeypatch, library, "repacked", signal.SIGILL)
    ran = cli("evaluate", *made, *arguments(engine, toolchain))
    assert ran.code == 0, ran.err
    assert ran.err.count("Repacked weights do not work here in ") == 1
    inputs = Journal(tmp_path / "work" / "tiny" / "journal.json").steps()["evaluate Q4_0"].inputs
    assert inputs["engine"].endswith(", --no-repack")
    again = cli("evaluate", *made, *arguments(engine, toolchain))
    assert "To measure: nothing" in again.err
    monkeypatch.delenv("LD_PRELOAD")
    elsewhere = cli("evaluate", *made, *arguments(engine, toolchain), "--dry-run", "--json")
    assert {level["reason"] for level in elsewhere.document["plan"]["levels"]} == {"changed: engine"}
    assert "Repacked" not in elsewhere.err
    asked = cli("evaluate", *made, *arguments(engine, toolchain), "--no-repack", "--dry-run", "--json")
    assert {level["reason"] for level in asked.document["plan"]["levels"]} == {"changed: options, engine"}


def test_answers_are_written_without_repacking_too(
    made: tuple[str, ...],
    toolchain: Toolchain,
    tmp_path: Path,
    cli: CommandLine,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash(monkeypatch, library, "repacked", signal.SIGILL)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The keeper writes"}\n', encoding="utf-8")
    computing = (*arguments("embedded", toolchain), "--levels", "Q4_0")
    ran = cli("evaluate", *made, *computing, "--domain", prompts, "--predict", "4", "--json")
    assert ran.code == 0, ran.err


@ENGINES
def test_a_matrix_of_a_quantised_model_is_collected_without_repacking(
    engine: str,
    made: tuple[str, ...],
    toolchain: Toolchain,
    tmp_path: Path,
    tiny_text: Path,
    cli: CommandLine,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash(monkeypatch, library, "repacked", signal.SIGILL)
    level = tmp_path / "work" / "tiny" / "tiny-Q4_0.gguf"
    ran = cli(
        "imatrix", "generate", level, "-f", tiny_text, "--chunks", "4", *arguments(engine, toolchain), "--work-dir", "other"
    )
    assert ran.code == 0, ran.err


@ENGINES
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SIGSEGV", "killed by SIGSEGV (segmentation fault). llama.cpp itself failed."),
        ("SIGABRT", "killed by SIGABRT (the program aborted); kernels.cpp:42: GGML_ASSERT(tiles) failed. llama.cpp itself"),
    ],
)
def test_a_crash_that_no_proof_saw_is_explained_once_for_all_levels(
    engine: str,
    name: str,
    why: str,
    made: tuple[str, ...],
    toolchain: Toolchain,
    cli: CommandLine,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash(monkeypatch, library, "long", signal.Signals[name])
    ran = cli("evaluate", *made, *arguments(engine, toolchain))
    assert ran.code == 100
    said = " ".join(ran.out.split())
    assert said.count(why) == 1
    assert said.count(name) == 1
    assert ran.err.count("for the same reason") == 2
    assert "imatrix-runner doctor" in said
    assert "GPU" not in said + ran.err
    assert "offload" not in (said + ran.err).lower()


def test_doctor_shows_what_does_not_work_and_the_remedy(
    toolchain: Toolchain, cli: CommandLine, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(monkeypatch, library, "repacked", signal.SIGILL)
    ran = cli("doctor", "--offline", "--llama-cpp", toolchain.directory, "--json")
    assert ran.code == 0
    weights = [check for check in ran.document["checks"] if check["name"] == "weights"]
    assert [check["verdict"] for check in weights] == ["warn", "warn"]
    assert all("Repacked weights" in check["detail"] for check in weights)
    assert LIBRARY_VARIABLE in weights[0]["do"]
    assert "tools build" in weights[1]["do"]
