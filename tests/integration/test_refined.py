"""Refined searches: never a higher weighted error than ggml's, in any block; the same bytes however rows are divided."""

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

from imatrix_runner.engines.embedded import native_build
from imatrix_runner.engines.embedded.native_build import compile_kernels
from imatrix_runner.engines.jobs import Native
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import clean_environment
from support.refined_rows import TYPES

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

OPEN = """
import ctypes, json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.quantize import native_kernels
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels
from imatrix_runner.engines.worker.quantize.rounding.refined import RefinedKernels
from support.refined_rows import TYPES, Compared, by_ggml, refined, samples
native = Native(Path(sys.argv[1]), Path(sys.argv[2]))
kernels = Kernels(load())
own, fast = RefinedKernels(native, kernels), native_kernels.NativeKernels(native, kernels)
kinds = [kernels.type(name) for name in sys.argv[3:] or TYPES]
for kind in kinds:
    for suffix in ("", "_unweighted"):  # without their proof, which takes longer than all the rest
        function = getattr(fast._library, f"quantize_{kind.name}{suffix}", None)
        if function is not None and fast._tables(kind):
            function.argtypes, function.restype = native_kernels._SIGNATURE, ctypes.c_size_t
            kernels.replace(kind, function, weighted=not suffix)
served = {kind.name: own.prepare(kind) for kind in kinds}
"""

COMPARE = """
answers = {}
for kind in kinds:
    compared = Compared()
    for sample, rows, weights in samples(np.random.default_rng(7), 5, 768):
        if weights is not None or not kernels.needs_weights(kind):
            compared.add(kernels, own, kind, sample, rows, weights)
    usual = [np.mean(compared.ratios[f"{name}, lognormal weights"]) for name in ("normal", "heavy")]
    answers[kind.name] = compared.worse, compared.invalid, usual, compared.changed / compared.blocks
print(json.dumps(answers))
"""

DIVIDE = """
random = np.random.default_rng(3)
rows = np.float32(0.02) * random.standard_t(3, (15, 768)).astype(np.float32)
rows[5] = 0
weights = random.lognormal(0, 1, 768).astype(np.float32)
answers = {}
for kind in kinds:
    rows[9, 300] = 0 if kind.name[:3] in ("iq2", "iq3") else 1e9  # their ggml searches need tables, which take seconds
    whole = refined(own, kind, rows, weights)[64:-64]
    slabs = [rows[first : first + 4].copy() for first in range(0, 15, 4)]
    for threads in (1, 3):
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(lambda slab: refined(own, kind, slab, weights)[64:-64], slabs))
        answers[f"{kind.name}, {threads}"] = bool(np.array_equal(np.concatenate(parts), whole))
print(json.dumps(answers))
"""

WILD = """
random = np.random.default_rng(4)
answers = {}
for kind in kinds:
    normal = random.standard_normal((3, 256)).astype(np.float32)
    large = 1e9 * normal
    weights = random.lognormal(0, 1, 256).astype(np.float32)
    heavy, negative = weights.copy(), weights.copy()
    heavy[3], negative[3] = 1e13, -1
    for name, rows, given in (("large", large, weights), ("heavy", normal, heavy), ("negative", normal, negative)):
        expected = by_ggml(Kernels(load()), kind, rows, given)
        answers[f"{kind.name}, {name}"] = bool(np.array_equal(refined(own, kind, rows, given), expected))
print(json.dumps(answers))
"""

SERVED = """
print(json.dumps(served))
"""

QUICK = ("q2_K", "q3_K", "q4_K", "q6_K", "q4_0", "q5_1", "q8_0", "iq4_xs")
"""Types for which ggml's own search needs no tables, which take seconds in a process."""


def _run(script: str, toolchain: Toolchain, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", OPEN + script, *map(str, arguments)],
        env={
            **clean_environment(),
            "LLAMA_CPP_LIB_PATH": str(toolchain.directory),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    compiled = compile_kernels(tmp_path_factory.mktemp("cache"), "ggml of this test")
    assert isinstance(compiled, Native), compiled
    return compiled


def test_no_block_has_a_higher_error_than_ggmls(native: Native, toolchain: Toolchain) -> None:
    found = _run(COMPARE, toolchain, native.library, native.proofs)
    assert {*found} == {*TYPES}
    for name, (worse, invalid, usual, changed) in found.items():
        assert worse == 0, name
        assert invalid == [], name
        assert max(usual) < 0.99, name
        assert changed > 0.2, name


def test_how_rows_are_divided_changes_no_byte(native: Native, toolchain: Toolchain) -> None:
    found = _run(DIVIDE, toolchain, native.library, native.proofs)
    assert {name for name, same in found.items() if not same} == set()


SLABS = """
from imatrix_runner.engines.worker.quantize.ggml_rows import is_extreme
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceTensor
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import RowRounder
rows = np.random.default_rng(3).standard_normal((6, 512)).astype(np.float32)
rows[4, 100] = 3e8
rounder = RowRounder(kernels, native, None, 1)
rounder.prepare({(kind, "refined") for kind in kinds})
answers = {}
for kind in kinds:
    tensor, size = SourceTensor(0, 0, (512, 6), kernels.type("f32"), rows.nbytes), kind.row_bytes(512)
    made = []
    for step in (6, 4, 1):
        out = np.zeros(6 * size, np.uint8)
        for first in range(0, 6, step):
            some = range(first, min(first + step, 6))
            extreme = is_extreme(rows[some.start : some.stop])
            source, target = rows[first:].ctypes.data, out[first * size :].ctypes.data
            rounder.round("t", tensor, kind, "refined", some, source, target, None, extreme=extreme)
        made.append(out.tobytes())
    answers[kind.name] = made[0] == made[1] == made[2]
print(json.dumps(answers))
"""


def test_an_extreme_number_does_not_change_other_rows_of_its_slab(native: Native, toolchain: Toolchain) -> None:
    found = _run(SLABS, toolchain, native.library, native.proofs, "q4_K", "q3_K", "q4_0", "iq4_xs")
    assert found == {"q4_K": True, "q3_K": True, "q4_0": True, "iq4_xs": True}


def test_what_no_search_is_made_for_gets_ggmls_bytes(native: Native, toolchain: Toolchain) -> None:
    found = _run(WILD, toolchain, native.library, native.proofs, *QUICK)
    assert {name for name, same in found.items() if not same} == set()


def test_a_search_that_takes_blocks_for_others_is_not_used(toolchain: Toolchain, tmp_path: Path) -> None:
    """One bit of one code in the wrong place."""
    source = Path(native_build.__file__).parent.parent / "worker" / "quantize" / "native"
    folder = shutil.copytree(source, tmp_path / "native")
    file = folder / "blocks.h"
    text = file.read_text(encoding="utf-8")
    wrong = text.replace(
        "(parts->codes[i] & 3) << i % 128 / 32 * 2;", "(parts->codes[i] & 3) << (i == 200 ? 0 : i % 128 / 32 * 2);"
    )
    assert wrong != text
    file.write_text(wrong, encoding="utf-8")
    library, proofs = tmp_path / "wrong.so", tmp_path / "proofs.json"
    sources = sorted(folder.glob("refined*.c"))
    subprocess.run(["cc", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", *sources, "-o", library, "-lm"], check=True)
    for _ in range(2):  # the second time from what is remembered
        assert _run(SERVED, toolchain, library, proofs, "q3_K", "q4_K", "f16") == {"q3_K": False, "q4_K": True, "f16": False}
    stored = json.loads(proofs.read_text())
    assert "refine_q3_K" in stored["refuted"]
    assert "refine_q4_K" in stored["proven"]
