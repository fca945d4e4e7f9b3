"""Refined searches against ggml's, on the same rows: no block may have a higher weighted error; errors and times by type.

Rows of twelve kinds with five kinds of weights, drawn anew until the blocks of all types add up to ``--blocks``. The tensors of
a model (``--gguf``; F32, F16 or BF16), weighed by ``--imatrix``, take their place. The exit code is 1 if a block of any type
has a higher error than ggml's, invalid data, or takes more than five times the time of the kernel that gives ggml's bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np

from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE, find
from imatrix_runner.engines.embedded.native_build import NoNative, compile_kernels
from imatrix_runner.engines.files.imatrix_weights import read_weights
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type
from imatrix_runner.engines.worker.quantize.native_kernels import prepare
from imatrix_runner.engines.worker.quantize.rounding.refined import RefinedKernels
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.toolchain.store import cache_dir
from support.refined_rows import TYPES, Compared, Floats, samples

GOAL = 5.0
USUAL = ("normal, lognormal weights", "heavy, lognormal weights", "model")
_LINE = "{:8} {:>11} {:>6} {:>8} {:>8} {:>8} {:>8} {:>9} {:>6}"

Sample = tuple[str, Floats, Floats | None]


def drawn(blocks: int, kind: Type) -> Iterator[Sample]:
    """Samples until at least so many blocks are drawn."""
    done = 0
    for seed in count():
        for sample, rows, weights in samples(np.random.default_rng([20261201, seed]), 37, 8192):
            if done >= blocks:
                return
            done += rows.size // kind.block
            yield sample, rows, weights


def stored(model: Path, imatrix: Path | None, kernels: Kernels, kind: Type) -> Iterator[Sample]:
    """The matrices of a model, those of experts one by one."""
    values = dict(read_weights(imatrix).values) if imatrix is not None else {}
    header = read_header(model)
    for tensor in header.tensors:
        if len(tensor.shape) < 2 or tensor.shape[0] % kind.block:
            continue
        source = kernels.type(tensor.type_name)
        raw = np.fromfile(model, np.uint8, tensor.n_bytes or 0, offset=header.data_offset + tensor.offset)
        wide = np.empty(tensor.n_elements, np.float32)
        if source.name == "f32":
            wide[:] = raw.view(np.float32)
        else:
            kernels.widen(source, raw.ctypes.data, wide.ctypes.data, wide.size)
        experts = wide.reshape(-1, tensor.shape[1], tensor.shape[0])
        given = values.get(tensor.name.encode())
        for number, rows in enumerate(experts):
            yield "model", rows, None if given is None else given.reshape(-1, tensor.shape[0])[number % len(given)].copy()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench refined", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10_000_000, help="of all types together")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--gguf", type=Path, help="a model in place of random numbers")
    parser.add_argument("--imatrix", type=Path)
    options = parser.parse_args()
    bindings = find(os.environ, cache_dir())
    if bindings.library is not None:
        os.environ[LIBRARY_VARIABLE] = str(bindings.library)
    native = compile_kernels(cache_dir(), bindings.digest)
    if isinstance(native, NoNative):
        raise SystemExit(native.why)
    kernels = Kernels(load())
    own, names = RefinedKernels(native, kernels), options.types.split(",")
    print(_LINE.format("type", "blocks", "worse", "changed", *(name.split(",")[0] for name in USUAL), "ns/weight", "times"))
    failed = False
    for name in names:
        kind = kernels.type(name)
        prepare(kernels, native, {(kind, True), (kind, False)})
        own.prepare(kind)
        compared, weights = Compared(), 0
        given = (
            stored(options.gguf, options.imatrix, kernels, kind) if options.gguf else drawn(options.blocks // len(names), kind)
        )
        for sample, rows, values in given:
            if values is None and kernels.needs_weights(kind):
                continue
            compared.add(kernels, own, kind, sample, rows, values)
            weights += rows.size
        times = compared.seconds / compared.ggml_seconds
        usual = [f"{np.mean(compared.ratios[key]):.4f}" if key in compared.ratios else "-" for key in USUAL]
        changed = f"{compared.changed / compared.blocks:.1%}"
        figures = (f"{compared.blocks:,}", compared.worse, changed, *usual, f"{1e9 * compared.seconds / weights:.1f}")
        print(_LINE.format(name, *figures, f"{times:.2f}"), flush=True)
        failed = failed or bool(compared.worse or compared.invalid) or times > GOAL
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
