"""Our own kernels: compiled once, proven against the real ggml, the same bytes; and what becomes of one that is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.engines.embedded import engine, native_build
from imatrix_runner.engines.embedded.native_build import NoNative, compile_kernels
from imatrix_runner.engines.jobs import Native
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import RunCommand, clean_environment
from support.in_process import CommandLine
from support.llama_tools import levels_in

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

INSTALL = """
import json, sys
from pathlib import Path
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels
from imatrix_runner.engines.worker.quantize.native_kernels import NativeKernels
library, proofs, *names = sys.argv[1:]
kernels = Kernels(load())
fast = NativeKernels(Native(Path(library), Path(proofs)), kernels)
answers = {}
for name in names:
    kind, _, without = name.partition("_unweighted")
    answers[name] = fast.install(kernels.type(kind), weighted=not name.endswith("_unweighted"))
print(json.dumps(answers))
"""

COMPARE = """
import ctypes, json, sys
import numpy as np
from pathlib import Path
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.quantize import native_kernels
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels
library, proofs, seed, *names = sys.argv[1:]
random = np.random.default_rng(int(seed))
differing = {}
for name in names:
    ggml, ours = Kernels(load()), Kernels(load())
    kind, weighted = ggml.type(name.removesuffix("_unweighted")), not name.endswith("_unweighted")
    own = native_kernels.NativeKernels(Native(Path(library), Path(proofs)), ours)
    assert own._tables(kind), name
    function = own._library["quantize_" + name]  # not installed: on a machine without vectors it may be slower than ggml's
    function.argtypes, function.restype = native_kernels._SIGNATURE, ctypes.c_size_t
    ours.replace(kind, function, weighted=weighted)
    ggml.prepare(kind)
    differing.setdefault(name, 0)
    for n_rows, n_blocks in ((1, 1), (3, 5), (17, 2), (1, 40), (33, 3)):
        n = 256 * n_blocks
        rows = random.standard_t(3, (n_rows, n)).astype(np.float32) * np.float32(10.0 ** random.uniform(-8, 3))
        rows[random.random(rows.shape) < random.choice([0, 0.1, 0.9])] = 0
        weights = random.lognormal(0, random.uniform(0, 4), n).astype(np.float32)
        size = n_rows * kind.row_bytes(n)
        made = []
        for kernels in (ggml, ours):
            # A canary on both sides: a kernel that writes beyond its rows would be seen.
            out = np.full(size + 128, 0xA5, np.uint8)
            given = weights.ctypes.data if weighted else None
            kernels.quantize(kind, rows.ctypes.data, out.ctypes.data + 64, n_rows, n, given)
            made.append(out)
        differing[name] += int((made[0] != made[1]).sum())
print(json.dumps(differing))
"""


def _run(script: str, toolchain: Toolchain, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**clean_environment(), "LLAMA_CPP_LIB_PATH": str(toolchain.directory)},
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


def _kernels(native: Native) -> list[str]:
    """Every kernel the library has: ``q4_K``, ``q4_K_unweighted``, …"""
    told = subprocess.run(["nm", "-D", "--defined-only", native.library], capture_output=True, check=True, text=True).stdout
    names = [line.split()[-1] for line in told.splitlines()]
    return sorted(name.removeprefix("quantize_") for name in names if name.startswith("quantize_"))


def test_every_kernel_gives_ggmls_bytes(native: Native, toolchain: Toolchain) -> None:
    """Other numbers than those of the proof at start-up, and shapes that are no whole number of lanes."""
    names = _kernels(native)
    weighted = {"q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"}
    assert weighted <= {*names}
    # Three times in one process, as ggml's tables take seconds in each.
    assert _run(COMPARE, toolchain, native.library, native.proofs, 0, *3 * names) == dict.fromkeys(names, 0)


def test_a_proof_is_remembered(native: Native, toolchain: Toolchain, tmp_path: Path) -> None:
    proofs = tmp_path / "proofs.json"
    assert _run(INSTALL, toolchain, native.library, proofs, "q4_K") == {"q4_K": True}
    assert json.loads(proofs.read_text()) == {"proven": ["quantize_q4_K"], "refuted": [], "trying": []}
    proofs.write_text('{"proven": [], "refuted": ["quantize_q4_K"]}')
    assert _run(INSTALL, toolchain, native.library, proofs, "q4_K") == {"q4_K": False}
    proofs.write_text('{"prov')  # a dying machine left it so
    assert _run(INSTALL, toolchain, native.library, proofs, "q4_K") == {"q4_K": True}


def test_a_kernel_with_other_bytes_gives_way_to_ggmls(toolchain: Toolchain, tmp_path: Path) -> None:
    """One bit of one block in ten thousand."""
    source = Path(native_build.__file__).parent.parent / "worker" / "quantize" / "native"
    folder = shutil.copytree(source, tmp_path / "native")
    file = folder / "kquants.c"
    text = file.read_text(encoding="utf-8")
    wrong = text.replace(
        "fit->l[i] = select_int(kept, fit->l[i], near);",
        "fit->l[i] = select_int(kept, fit->l[i], near ^ (i == 77 & near == 2));",
    )
    assert wrong != text
    file.write_text(wrong, encoding="utf-8")
    library = tmp_path / "wrong.so"
    sources = sorted(folder.glob("*.c"))
    subprocess.run(["cc", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-w", *sources, "-o", library, "-lm"], check=True)
    proofs = tmp_path / "proofs.json"
    assert _run(INSTALL, toolchain, library, proofs, "q4_K", "q6_K") == {"q4_K": False, "q6_K": True}
    assert json.loads(proofs.read_text()) == {"proven": ["quantize_q6_K"], "refuted": ["quantize_q4_K"], "trying": []}


TRAPS = """
unsigned long quantize_q4_K(void) { __builtin_trap(); }
unsigned long quantize_q4_K_unweighted(void) { __builtin_trap(); }
unsigned long quantize_q6_K(void) { return 0; }
"""


@pytest.fixture
def crashing(tmp_path: Path) -> Native:
    """Kernels that the compiler built wrongly for this processor."""
    (tmp_path / "crash.c").write_text(TRAPS, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "crash.c", "-o", tmp_path / "crash.so"], check=True)
    return Native(tmp_path / "crash.so", tmp_path / "proofs.json")


def test_a_kernel_that_ends_the_process_is_tried_twice(crashing: Native, toolchain: Toolchain) -> None:
    """The others are still proven."""
    for deaths in (1, 2):
        with pytest.raises(AssertionError):
            _run(INSTALL, toolchain, crashing.library, crashing.proofs, "q4_K")
        assert json.loads(crashing.proofs.read_text())["trying"] == ["quantize_q4_K"] * deaths
    assert _run(INSTALL, toolchain, crashing.library, crashing.proofs, "q4_K", "q6_K") == {"q4_K": False, "q6_K": False}


def test_a_pass_whose_kernel_crashes_ends_with_ggmls(
    crashing: Native, tiny_model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("quantize", tiny_model, "--levels", "Q4_K_M", "--engine", "embedded")
    assert cli(*arguments, "--work-dir", "plain").code == 0
    monkeypatch.setattr(engine, "compile_kernels", lambda *_: crashing)
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert json.loads(crashing.proofs.read_text())["trying"]
    assert levels_in(tmp_path / "work" / "tiny") == levels_in(tmp_path / "plain" / "tiny")


def test_compiled_once_and_again_for_another_compiler(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    compiler = tmp_path / "counting-cc"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec cc "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    env = {**os.environ, "CC": str(compiler)}
    first = compile_kernels(tmp_path / "cache", "one", env)
    second = compile_kernels(tmp_path / "cache", "two", env)
    assert isinstance(first, Native)
    assert isinstance(second, Native)
    assert first.library == second.library
    assert first.proofs != second.proofs  # what was proven against one ggml says nothing of another
    compilations = [line for line in calls.read_text().splitlines() if "-shared" in line]
    assert len(compilations) == 1
    other = compile_kernels(tmp_path / "cache", "one", {**os.environ, "CC": "cc"})
    assert isinstance(other, Native)
    assert other.library != first.library


@pytest.mark.parametrize(
    ("script", "why"),
    [("echo 'x.c:1: error: it is broken' >&2; exit 1", "it is broken"), ("exit 3", "it failed without output")],
)
def test_a_compiler_that_fails_leaves_ggmls_kernels(script: str, why: str, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n', encoding="utf-8")
    compiler.chmod(0o755)
    made = compile_kernels(tmp_path / "cache", "one", {**os.environ, "CC": str(compiler)})
    assert isinstance(made, NoNative)
    assert why in made.why
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_without_a_compiler(tmp_path: Path) -> None:
    made = compile_kernels(tmp_path, "one", {**os.environ, "CC": "no-such-compiler"})
    assert made == NoNative("no C compiler found (no-such-compiler)")


def test_levels_are_the_same_with_and_without(tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--preset", "k-quants", "--work-dir")
    assert runner(*arguments, "auto").code == 0
    without = runner(*arguments, "ggml", "--kernels", "ggml")
    assert without.code == 0, without.err
    missing = runner(*arguments, "missing", env={"CC": "no-such-compiler"})
    assert missing.code == 0, missing.err
    levels = levels_in(tmp_path / "auto" / "tiny")
    assert len(levels) == 9
    assert levels == levels_in(tmp_path / "ggml" / "tiny") == levels_in(tmp_path / "missing" / "tiny")
