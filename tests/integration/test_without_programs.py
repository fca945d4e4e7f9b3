"""A machine that has llama-cpp-python and none of llama.cpp's programs; and machines where one of the two does not do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.extras import CONVERT
from imatrix_runner.toolchain.hardware import likes_bf16
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import Ran, RunCommand
from support.libraries import copy_libraries
from support.llama_tools import BareTools, fake_tools, leftovers, levels_in
from support.oracles import quantized
from support.tiny_models import sample_text, write_hf_directory, write_llama_gguf

LEVELS = {"Q4_K_M": "Q4_K_M", "IQ2_XS": "IQ2_XS", "Q4_K_L": "Q4_K_M"}
SHORT = ("-c", "128", "--chunks", "12")


@pytest.fixture
def bare(toolchain: Toolchain, tmp_path: Path) -> dict[str, str]:
    """Surroundings without any program: an empty cache and home, a PATH to nowhere, the libraries alone in a folder."""
    libraries = copy_libraries(toolchain, tmp_path / "lib")
    (tmp_path / "home").mkdir()
    return {
        "HOME": str(tmp_path / "home"),
        "PATH": str(tmp_path / "home"),
        "IMATRIX_RUNNER_CACHE": str(tmp_path / "cache"),
        "LLAMA_CPP_LIB_PATH": str(libraries),
    }


@pytest.fixture
def alone(runner: RunCommand, bare: dict[str, str]) -> RunCommand:
    """Run a command in those surroundings, changed by ``env``."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Ran:
        return runner(*arguments, env={**bare, **(env or {})})

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text(12_000), encoding="utf-8")
    return path


class TestTheMainJob:
    """``pip install`` alone is enough."""

    def test_there_really_are_no_programs(self, alone: RunCommand) -> None:
        ran = alone("tools", "locate")
        assert ran.code == 3
        assert "No llama.cpp binaries that run here were found" in ran.err

    def test_a_run_from_the_model_to_verified_levels(
        self, alone: RunCommand, tiny_model: Path, text: Path, tools: BareTools, tmp_path: Path
    ) -> None:
        arguments = ("run", tiny_model, "-f", text, "--levels", ",".join(LEVELS), *SHORT, "--json")
        done = alone(*arguments)
        assert done.code == 0, done.err
        document = done.document
        assert document["engine"] == "embedded"
        assert document["toolchain"].startswith("llama-cpp-python ")
        assert document["imatrix"]["chunks"] == 12
        assert "Engine:" not in done.err  # the default is not worth a line
        workspace = tmp_path / "work" / "tiny"
        written = levels_in(workspace)
        assert written.keys() == LEVELS.keys()
        assert leftovers(workspace) == []
        for level, ftype in LEVELS.items():
            eight = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0") if level.endswith("_L") else ()
            bare = quantized(tools, tiny_model, ftype, *eight, imatrix=workspace / "imatrix.gguf")
            assert [written[level]] == bare.digests
        again = alone(*arguments)
        assert [level["status"] for level in again.document["levels"]] == ["skipped"] * 3

    def test_plans_and_checks(self, alone: RunCommand, tiny_model: Path, tiny_imatrix: Path, text: Path) -> None:
        planned = alone("run", tiny_model, "-f", text, "--preset", "k-quants", "--dry-run", "--json")
        assert planned.code == 0, planned.err
        assert len(planned.document["plan"]["levels"]) == 9
        assert alone("quantize", tiny_model, "--levels", "Q4_0", "--dry-run").code == 0
        checked = alone("imatrix", "check", tiny_imatrix, "--model", tiny_model, "--json")
        assert checked.code == 0, checked.err
        assert alone("demo", "--dry-run", "--levels", "Q4_0").code == 0

    def test_the_default_is_told_to_who_asks(self, alone: RunCommand, tiny_model: Path) -> None:
        told = alone("quantize", tiny_model, "--levels", "Q8_0", "-v").err
        assert "Engine: embedded, llama-cpp-python" in told
        assert "(LLAMA_CPP_LIB_PATH)" in told

    def test_doctor_is_content(self, alone: RunCommand) -> None:
        ran = alone("doctor", "--offline", "--json")
        assert ran.code == 0
        checks = {check["name"]: check for check in ran.document["checks"]}
        assert checks["Engine"]["verdict"] == checks["llama.cpp"]["verdict"] == "ok"
        assert checks["Engine"]["detail"] == "embedded: llama-cpp-python works here"
        assert "--engine binaries" in checks["llama.cpp"]["detail"]
        assert "tools build" in checks["Conversion"]["do"]
        assert "LLAMA_CPP_LIB_PATH" in ran.document["variables"]

    def test_the_journal_says_how_to_get_the_file_with_programs(
        self, alone: RunCommand, tiny_model: Path, tmp_path: Path
    ) -> None:
        assert alone("quantize", tiny_model, "--levels", "Q8_0").code == 0
        assert "llama-quantize" in (tmp_path / "work" / "tiny" / "journal.json").read_text()

    def test_a_model_to_convert_needs_the_programs(self, alone: RunCommand, tmp_path: Path) -> None:
        write_hf_directory(tmp_path / "tiny-hf")
        ran = alone("run", "tiny-hf", "--levels", "Q4_0")
        assert ran.code == 3
        assert "Error: The converter convert_hf_to_gguf.py is missing." in ran.err
        assert "llama-cpp-python does not bring it" in ran.err
        assert "tools build" in ran.err

    @pytest.mark.convert
    @pytest.mark.skipif(bool(CONVERT.missing()), reason="the convert extra is not installed")
    def test_what_was_converted_before_is_used(self, runner: RunCommand, alone: RunCommand, tmp_path: Path) -> None:
        """The programs were there once: the GGUF they made is as good as before."""
        write_hf_directory(tmp_path / "tiny-hf")
        assert runner("quantize", "tiny-hf", "--levels", "Q4_0", "--engine", "embedded").code == 0
        again = alone("quantize", "tiny-hf", "--levels", "Q4_0", "--json")
        assert again.code == 0, again.err
        assert [level["status"] for level in again.document["levels"]] == ["skipped"]

    def test_layers_for_a_gpu_that_is_not_there(self, alone: RunCommand, tiny_model: Path, bare: dict[str, str]) -> None:
        if find({**os.environ, **bare}, Path(bare["IMATRIX_RUNNER_CACHE"])).devices:
            pytest.skip("there is a GPU")
        told = alone("quantize", tiny_model, "--levels", "Q8_0", "--dry-run").err
        assert "no effect" not in told
        told = alone("run", tiny_model, "--levels", "Q8_0", "-ngl", "99", "--dry-run").err
        assert "-ngl 99 has no effect: llama-cpp-python sees no GPU" in told

    @pytest.mark.parametrize("dtype", ["F16", "BF16"])
    def test_a_type_that_computes_faster_is_advised(
        self, alone: RunCommand, bare: dict[str, str], tmp_path: Path, text: Path, dtype: str
    ) -> None:
        found = find({**os.environ, **bare}, Path(bare["IMATRIX_RUNNER_CACHE"]))
        model = write_llama_gguf(tmp_path / f"model-{dtype}.gguf", layers=1, dtype=dtype.lower())  # type: ignore[arg-type]
        useful = dtype == "F16" and likes_bf16(found.features) and not found.devices
        advice = f"The model is {dtype}; this processor computes BF16 about 1.4x faster"
        assert (advice in alone("run", model, "-f", text, "--levels", "Q4_0", "--dry-run").err) is useful
        assert advice not in alone("quantize", model, "--levels", "Q8_0", "--dry-run").err


class TestTheChoice:
    """Each time the engine is not the default one, a line says why."""

    def test_broken_libraries_leave_the_work_to_the_programs(
        self, alone: RunCommand, toolchain: Toolchain, tiny_model: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "libllama.so").write_bytes(b"\x7fELF and then garbage")
        env = {"LLAMA_CPP_LIB_PATH": str(broken), "PATH": str(fake_tools(toolchain, tmp_path / "programs"))}
        ran = alone("quantize", tiny_model, "--levels", "Q8_0", "--json", env=env)
        assert ran.code == 0, ran.err
        assert ran.document["engine"] == "binaries"
        assert "Warning: Engine: binaries, because its libraries do not load" in ran.err
        assert "Unset LLAMA_CPP_LIB_PATH" in ran.err
        asked = alone("quantize", tiny_model, "--levels", "Q8_0", "--engine", "embedded", env=env)
        assert asked.code == 3
        assert "Error: The embedded engine cannot compute here." in asked.err
        doctor = alone("doctor", "--offline", "--json", env=env)
        checks = {check["name"]: check for check in doctor.document["checks"]}
        assert doctor.code == 0
        assert (checks["Engine"]["verdict"], checks["llama-cpp-python"]["verdict"]) == ("warn", "warn")
        assert checks["Engine"]["detail"].startswith("binaries, because its libraries do not load")

    def test_with_nothing_to_compute_both_ways_are_named(self, alone: RunCommand, tiny_model: Path, tmp_path: Path) -> None:
        env = {"LLAMA_CPP_LIB_PATH": str(tmp_path)}
        ran = alone("run", tiny_model, "--levels", "Q8_0", env=env)
        assert ran.code == 3
        assert "Error: No usable engine found." in ran.err
        assert "pip install llama-cpp-python" in ran.err
        assert "imatrix-runner tools build" in ran.err
        assert not (tmp_path / "work").exists()
        doctor = alone("doctor", "--offline", env=env)
        assert doctor.code == 3
        assert "The main job cannot run yet." in doctor.out

    def test_named_programs(self, alone: RunCommand, toolchain: Toolchain, tiny_model: Path) -> None:
        arguments = ("quantize", tiny_model, "--levels", "Q8_0", "--dry-run", "--json")
        for ran in (
            alone(*arguments, "--llama-cpp", toolchain.directory),
            alone(*arguments, env={"IMATRIX_RUNNER_LLAMA_CPP": str(toolchain.directory)}),
        ):
            assert ran.code == 0, ran.err
            assert ran.document["engine"] == "binaries"
            assert ran.document["toolchain"] == toolchain.identity()
            assert "Engine: binaries, because " in ran.err

    def test_options_for_llama_imatrix(self, alone: RunCommand, toolchain: Toolchain, tiny_model: Path, text: Path) -> None:
        arguments = ("imatrix", "generate", tiny_model, "-f", text, *SHORT, "--dry-run", "--", "--rope-scaling", "none")
        ran = alone(*arguments, env={"PATH": str(toolchain.directory)})
        assert ran.code == 0, ran.err
        assert "Engine: binaries, because --rope-scaling after -- is an option for llama-imatrix." in ran.err
        ran = alone(*arguments)
        assert ran.code == 3
        assert "--rope-scaling after -- is an option for llama-imatrix" in ran.err
        assert "tools build" in ran.err

    def test_a_type_of_a_fork(self, alone: RunCommand, toolchain: Toolchain, tiny_model: Path, tmp_path: Path) -> None:
        """Only with programs that offer it, and only that level through them (see test_levels_of_two_engines)."""
        script = 'case " $* " in *" --help "*) "$real" --help; echo "  77  or  Q3_K_HIFI :  3.90G"; exit 1;; esac'
        fork = fake_tools(toolchain, tmp_path / "fork", llama_quantize=script)
        env = {"PATH": f"{fork}{os.pathsep}{os.environ['PATH']}"}
        arguments = ("quantize", tiny_model, "--dry-run", "--json", "--levels")
        plain = alone(*arguments, "Q4_0", env=env)
        assert plain.document["engine"] == "embedded"
        assert "made by" not in plain.err
        ran = alone(*arguments, "Q4_0,Q3_K_HIFI", env=env)
        assert ran.document["engine"] == "embedded"
        assert f"Q3_K_HIFI: made by {fork}, because only these programs offer it." in ran.err
        assert alone(*arguments, "Q3_K_HIFI").code == 2
