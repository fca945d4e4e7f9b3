"""Error feedback into stock blocks: proven against the real ggml, smaller errors, the same bytes however rows are divided."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.engines.embedded import native_build
from imatrix_runner.engines.embedded.native_build import compile_kernels
from imatrix_runner.engines.jobs import Native
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import clean_environment
from support.feedback_checks import CHECKS, FEW_TABLES

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

NATIVE = Path(native_build.__file__).parent.parent / "worker" / "quantize" / "native"
TESTS = Path(__file__).parents[1]


def _run(toolchain: Toolchain, library: Path, proofs: Path, *checks: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "support.feedback_checks", library, proofs, *checks],
        env={**clean_environment(), "LLAMA_CPP_LIB_PATH": str(toolchain.directory), "PYTHONPATH": str(TESTS)},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    made = compile_kernels(tmp_path_factory.mktemp("cache"), "ggml of this test")
    assert isinstance(made, Native), made
    return made


@pytest.fixture(scope="module")
def found(native: Native, toolchain: Toolchain) -> Any:
    """What all checks found, in one process because ggml builds tables in each."""
    return _run(toolchain, native.library, native.proofs, *CHECKS)


def test_every_type_is_proven(found: Any, native: Native) -> None:
    """Random blocks have ggml's numbers to the bit, and put together again ggml's bytes."""
    assert found["proofs"] == dict.fromkeys(FEW_TABLES, True)
    stored = json.loads(native.proofs.read_text())
    assert {f"feedback_{name}" for name in FEW_TABLES} <= {*stored["proven"]}
    assert not stored["trying"]
    assert all(found["packers"].values()), found["packers"]


def test_errors_are_smaller_than_ggmls(found: Any) -> None:
    """On the covariance, and on tokens that it was not made from."""
    for name, (own, other) in found["ratios"].items():
        assert own < 0.15, name
        assert other < 0.15, name


def test_without_correlation_the_search_remains(found: Any) -> None:
    for name, ratio in found["unrelated"].items():
        assert ratio < 1.005, name


def test_codes_are_the_nearest_to_their_targets(found: Any) -> None:
    for name, steps in found["nearest"].items():
        assert 0.49 < steps < 0.5001, name


def test_slabs_and_threads_change_no_byte(found: Any) -> None:
    assert all(found["divisions"].values()), found["divisions"]


def test_unusual_rows_and_covariances(found: Any) -> None:
    assert {name: wrong for name, wrong in found["unusual"].items() if wrong} == {}


def test_the_width_of_vectors_changes_no_byte(found: Any, native: Native, toolchain: Toolchain, tmp_path: Path) -> None:
    """Compiled for the processor's own vectors, and for those that every processor of its kind has."""
    sources = [NATIVE / name for name in ("factor.c", "feedback.c")]
    flags = ("-std=gnu11", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-w")
    subprocess.run(["cc", *flags, *sources, "-o", tmp_path / "plain.so", "-lm"], check=True)
    assert _run(toolchain, tmp_path / "plain.so", tmp_path / "proofs.json", "digests")["digests"] == found["digests"]


def test_blocks_that_mean_something_else_are_refuted(toolchain: Toolchain, native: Native, tmp_path: Path) -> None:
    """A compiled library that mistakes half of the codes of Q4_K for others."""
    folder = shutil.copytree(NATIVE, tmp_path / "native")
    file = folder / "blocks.h"
    text = file.read_text(encoding="utf-8")
    wrong = text.replace(">> i % 64 / 32 * 4 & 15;", ">> 4 & 15;")
    assert wrong != text
    file.write_text(wrong, encoding="utf-8")
    library, proofs = tmp_path / "wrong.so", tmp_path / "proofs.json"
    sources = [folder / name for name in ("factor.c", "feedback.c")]
    subprocess.run(["cc", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", *sources, "-o", library, "-lm"], check=True)
    told = _run(toolchain, library, proofs, "three_proofs")["three_proofs"]
    assert told == {"q4_K": False, "q6_K": True, "q8_0": True}
    assert json.loads(proofs.read_text())["refuted"] == ["feedback_q4_K"]
    assert not _run(toolchain, library, proofs, "three_proofs")["three_proofs"]["q4_K"]


def test_a_proof_that_ended_two_processes_is_not_begun_again(toolchain: Toolchain, native: Native, tmp_path: Path) -> None:
    proofs = tmp_path / "proofs.json"
    proofs.write_text(json.dumps({"trying": ["feedback_q6_K"] * 2 + ["feedback_q4_K"]}))
    told = _run(toolchain, native.library, proofs, "three_proofs")["three_proofs"]
    assert told == {"q4_K": True, "q6_K": False, "q8_0": True}
