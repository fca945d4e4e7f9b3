"""What a big imatrix costs: a mixture's matrix of about a gigabyte is checked and two are merged, each in a process of its own.

Prints seconds, the process's peak memory (resident, with Python and numpy) and its ratio to one file's size; the goal is a
ratio under 1.5. The files were just written, so they come from the page cache if it holds them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

EXPERTS = 128
TENSORS = {"ffn_gate_exps": 4096, "ffn_up_exps": 4096, "ffn_down_exps": 8192}
GOAL = 1.5


def make(path: Path, megabytes: int, seed: int) -> None:
    """A matrix of as many layers as make up the size, its tensors drawn one by one."""
    import numpy as np

    from imatrix_runner.imatrix.formats import write_gguf
    from imatrix_runner.imatrix.matrix import Counts, Entries, Matrix, MatrixEntry

    layers = max(1, megabytes * 1_000_000 // (4 * EXPERTS * sum(TENSORS.values())))
    columns = {f"blk.{layer}.{name}.weight": width for layer in range(layers) for name, width in TENSORS.items()}
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 20_000, EXPERTS)

    class Drawn(Entries):
        def __getitem__(self, name: str) -> MatrixEntry:
            return MatrixEntry(draw.random(self.shape(name), np.float32).astype(np.float64), tokens)

        def __contains__(self, name: object) -> bool:
            return name in columns

        def shape(self, name: str) -> tuple[int, int]:
            return EXPERTS, columns[name]

        def counts(self, _name: str) -> Counts:
            return tokens

        def __iter__(self) -> Iterator[str]:
            return iter(columns)

        def __len__(self) -> int:
            return len(columns)

    write_gguf(Matrix(Drawn(), 512, 300, (f"text-{seed}.txt",)), path)


def check(path: Path) -> None:
    """The preflight's reading part, against a model of fitting shapes (a model's own header is a matter of milliseconds)."""
    from imatrix_runner.imatrix.coverage import examine
    from imatrix_runner.imatrix.formats import read

    matrix = read(path).matrix
    shapes = {name: (matrix.shape(name)[1], 1024, matrix.shape(name)[0]) for name in matrix.entries}
    assert examine(matrix, shapes).usable


def measured(what: str, arguments: list[str], size: int) -> bool:
    """Run a child to its end, print its figures, and say whether it stayed below the goal."""
    began = time.monotonic()
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    assert child.returncode == 0, f"{what} failed"
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{what:8} {seconds:7.2f} s ({cpu:.2f} s of CPU)  {peak / 1e6:6.0f} MB resident  {peak / size:.2f}x the file",
        flush=True,
    )
    return peak < GOAL * size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1000, metavar="MB", help="size of each of the two matrices")
    parser.add_argument("--make", nargs=2, metavar=("FILE", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), options.size, int(options.make[1]))
        return 0
    if options.check:
        check(options.check)
        return 0
    # A child's peak counts from its fork: the work is the children's, this process stays small.
    this = [sys.executable, __file__, "--size", str(options.size)]
    with tempfile.TemporaryDirectory(prefix="imatrix-runner-bench-") as folder:
        files = [str(Path(folder) / f"{seed}.gguf") for seed in range(2)]
        for seed, file in enumerate(files):
            subprocess.run([*this, "--make", file, str(seed)], check=True)
        size = Path(files[0]).stat().st_size
        print(f"two matrices of {size / 1e6:.0f} MB, {EXPERTS} experts")
        merge = [sys.executable, "-m", "imatrix_runner", "imatrix", "merge", *files, "-o", str(Path(folder) / "sum.gguf"), "-q"]
        good = [
            measured("check", [*this, "--check", files[0]], size),
            measured("merge", merge, size),
        ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
