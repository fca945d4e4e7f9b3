"""Sixteen thousand damaged and hostile imatrices: each is read or refused, with an error of ours, at once and in little memory.

``python test_imatrix_fuzz.py FORMAT DAMAGE SEED COUNT FOLDER`` is the child process that does it; what it prints is JSON. The
damage is to ``bytes``, or to ``values``, which then have other types than any writer gives them.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from imatrix_runner.engines.files.imatrix_weights import read_weights
from imatrix_runner.errors import InvalidDataError, RunnerError
from imatrix_runner.imatrix.coverage import examine
from imatrix_runner.imatrix.formats import Format, MatrixFile, read, write
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry, misfits, problems
from imatrix_runner.imatrix.merge import convert, merge
from imatrix_runner.imatrix.statistics import statistics
from support.imatrix_mutations import typed_imatrices
from support.in_process import CommandLine

COUNTS = {"bytes": 5000, "values": 3000}
MOST_SECONDS_EACH = 1.0
MOST_BYTES = 300 << 20
SEED = 20261122

SHAPES = {
    **{f"blk.{layer}.{name}.weight": (8, 8) for layer in range(2) for name in ("attn_q", "attn_v")},
    **{f"blk.{layer}.ffn_up_exps.weight": (8, 4, 3) for layer in range(2)},
    "token_embd.weight": (8, 16),
}
NUMBERS = (
    0,
    1,
    2,
    7,
    63,
    64,
    255,
    1 << 16,
    (1 << 24) + 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 64) - 1,
)
T = TypeVar("T")
FLOATS = (float("nan"), float("inf"), -1.0, 3.4e38, 1e-45, -3.4e38, 1e30, 9e15)
NASTY = (b"\x1b[2J", b"\x07\r\n\x08", b"\x9b31m\x00", b"\xe2\x80\xae", b"\xff\xfe\xfd")


def whole_matrix() -> Matrix:
    draw = np.random.default_rng(0)
    entries = {}
    for name, shape in SHAPES.items():
        rows = shape[2] if len(shape) > 2 else 1
        entries[name] = MatrixEntry(draw.random((rows, shape[0])) * 99, draw.integers(64, 999, rows))
    entries["blk.1.ffn_up_exps.weight"].counts[1] = 0
    return Matrix(entries, 64, 9, ("folder/text.txt", "more.txt"))


class Mutator:
    """One damage after another; everything follows from the seed."""

    def __init__(self, whole: bytes, seed: int) -> None:
        self._whole = whole
        self._random = random.Random(seed)
        # What a reader believes: names, and the numbers right before and behind them.
        self._names = [at for at in range(len(whole)) if whole.startswith((b"blk.", b"token_embd", b"imatrix."), at)]
        self._kinds: tuple[Callable[[bytearray], bytearray], ...] = (
            self._flip,
            self._cut,
            self._splice,
            self._number,
            self._length,
            self._float,
            self._rename,
            self._twice,
        )

    def __iter__(self) -> Iterator[bytes]:
        while True:
            data = bytearray(self._whole)
            for _ in range(self._random.choice((1, 1, 1, 2, 5))):
                data = self._random.choice(self._kinds)(data)
            yield bytes(data)

    def _at(self, data: bytearray, room: int = 8) -> int:
        return self._random.randrange(max(1, len(data) - room))

    def _flip(self, data: bytearray) -> bytearray:
        for _ in range(self._random.randint(1, 8)):
            if data:
                data[self._at(data, 0)] ^= 1 << self._random.randrange(8)
        return data

    def _cut(self, data: bytearray) -> bytearray:
        return data[: self._at(data, 0)]

    def _splice(self, data: bytearray) -> bytearray:
        at, length = self._at(data), self._random.randint(1, 64)
        piece = data[self._at(data) :][:length]
        return data[:at] + piece + data[at + self._random.choice((0, length)) :]

    def _number(self, data: bytearray) -> bytearray:
        """A believable or absurd number somewhere."""
        return self._put(data, self._at(data))

    def _length(self, data: bytearray) -> bytearray:
        """... and where it hurts: around a name."""
        at = self._random.choice(self._names)
        return self._put(data, at + self._random.choice((-8, -4, -12, *range(12, 64, 4))))

    def _put(self, data: bytearray, at: int) -> bytearray:
        size = self._random.choice((4, 8))
        data[max(0, at) : max(0, at) + size] = (self._random.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
        return data

    def _float(self, data: bytearray) -> bytearray:
        at = self._at(data) & ~3
        data[at : at + 4] = struct.pack("<f", self._random.choice(FLOATS))
        return data

    def _rename(self, data: bytearray) -> bytearray:
        """Control characters, or something that is no text, in a name."""
        at = self._random.choice(self._names) + self._random.randrange(8)
        nasty = self._random.choice(NASTY)
        data[at : at + len(nasty)] = nasty
        return data

    def _twice(self, data: bytearray) -> bytearray:
        """One name where another stood."""
        one, other = (self._random.choice(self._names) for _ in range(2))
        data[one : one + 12] = self._whole[other : other + 12]
        return data


def use(path: Path, good: MatrixFile, *, written: bool) -> None:
    """All that is ever done with an imatrix (it is written by few: that waits for the disk). Raises only errors of ours."""
    tried(lambda: read_weights(path).choose((), (b"attn_v",)).not_finite())  # as a worker quantises with it
    file = read(path)
    shown = [file.describe(), *file.matrix.entries, *file.matrix.datasets]
    for name in file.matrix.entries:
        entry = file.matrix.entries[name]
        assert entry.sums.shape == file.matrix.shape(name)
        assert len(entry.counts) == len(entry.sums)
    shown += problems(file.matrix) + misfits(file.matrix, SHAPES)
    shown += [finding.text for finding in examine(file.matrix, SHAPES).findings]
    assert all(text.isprintable() for text in shown), shown
    tried(lambda: statistics(file.matrix))
    tried(lambda: merge([file, good], [1000, 1]))
    made = tried(lambda: merge([good, file]))
    kinds: tuple[Format, Format] = ("gguf", "dat")
    for kind in kinds:
        values = tried(partial(convert, file, kind, None)), made
        out = path.with_name("out")
        for value in filter(None, values if written else ()):
            tried(partial(write, value.matrix, out, kind))
            if out.exists():
                read(out)  # what we write we read
                out.unlink()


def tried(action: Callable[[], T]) -> T | None:
    try:
        return action()
    except RunnerError:
        return None


def main(kind: str, damage: str, seed: int, count: int, folder: Path) -> None:
    path = folder / f"fuzz.{kind}"
    write(whole_matrix(), path, "dat" if kind == "dat" else "gguf")
    good = read(path)
    shapes = [(name.encode(), shape[0], shape[2] if len(shape) > 2 else 1) for name, shape in SHAPES.items()]
    mutations = iter(Mutator(path.read_bytes(), seed)) if damage == "bytes" else typed_imatrices(kind, shapes, seed)
    path = folder / f"mutated.{kind}"
    slowest, used, wrong = 0.0, 0, []
    for _ in range(count):
        data = next(mutations)
        path.unlink(missing_ok=True)  # a matrix may still be read lazily
        path.write_bytes(data)
        began = time.process_time()
        try:
            use(path, good, written=used % 10 == 0)
            used += 1
        except RunnerError as error:
            if not (error.what and error.why and error.todo) or not str(error).isprintable():
                wrong.append(f"an error that helps nobody: {error!r}")
        except Exception:  # noqa: BLE001 - what this is all about
            wrong.append(traceback.format_exc(limit=-4))
            (folder / f"wrong-{len(wrong)}.{kind}").write_bytes(data)
        slowest = max(slowest, time.process_time() - began)
        if len(wrong) == 5:
            break
    print(json.dumps({"used": used, "slowest": slowest, "peak": _peak(), "wrong": wrong}))


def _peak() -> int:
    """Bytes of this process at most. Linux's ru_maxrss begins with what its parent took when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("damage", COUNTS)
def test_mutated_files(damage: str, tmp_path: Path) -> None:
    count = COUNTS[damage]

    def one(kind: str, seed: int) -> dict[str, Any]:
        (tmp_path / kind).mkdir()
        argv = [sys.executable, "-W", "error", __file__, kind, damage, str(seed), str(count), str(tmp_path / kind)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, timeout=240, check=True)
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    with ThreadPoolExecutor(2) as pool:
        for told in pool.map(one, ("gguf", "dat"), (SEED, SEED + 1)):
            assert told["wrong"] == [], f"the inputs are kept in {tmp_path}"
            assert told["slowest"] < MOST_SECONDS_EACH
            assert told["peak"] < MOST_BYTES
            # Not everything dies at the door: the numbers behind are tried too.
            assert count // 20 < told["used"] < count


@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_behind_the_command_line(kind: str, tiny_model: Path, cli: CommandLine, tmp_path: Path) -> None:
    """Every command that reads an imatrix ends well or with exit code 6."""
    damaged = tmp_path / f"damaged.{kind}"
    good = tmp_path / "good.gguf"
    write(whole_matrix(), good, "gguf")
    shapes = [(name.encode(), shape[0], 1) for name, shape in SHAPES.items()]
    codes: set[int] = set()
    for number, data in zip(range(40), typed_imatrices(kind, shapes, SEED + 2), strict=False):
        damaged.unlink(missing_ok=True)
        damaged.write_bytes(data)
        for command in (
            ("stats", damaged),
            ("merge", damaged, good, "-o", tmp_path / f"merged-{number}.gguf"),
            ("convert", damaged, "-o", tmp_path / f"converted-{number}.{'dat' if kind == 'gguf' else 'gguf'}"),
            ("check", damaged, "--model", tiny_model, "--levels", "Q4_0"),
        ):
            done = cli("imatrix", *command)
            assert "Traceback" not in done.err, (number, command)
            assert done.code in (0, 6), (number, command, done.err)
            codes.add(done.code)
    assert {0, 6} <= codes


@pytest.mark.parametrize("nasty", [b"\x1b[2J", "\u202e".encode(), b"\n"], ids=["escape", "right to left", "newline"])
def test_no_name_commands_the_terminal(tmp_path: Path, nasty: bytes) -> None:
    """Tensor names with control characters are refused, names of texts are shown without."""
    for kind in ("gguf", "dat"):
        path = tmp_path / f"i.{kind}"
        write(whole_matrix(), path, "gguf" if kind == "gguf" else "dat")
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"attn_q.weight"[: len(nasty)], nasty, 1))
        with pytest.raises(InvalidDataError, match="control characters") as caught:
            read(path)
        assert str(caught.value).isprintable()
        path.write_bytes(whole.replace(b"more.txt", nasty.rjust(8, b"x")))
        assert "\ufffd" in read(path).matrix.datasets[-1]
        assert read(path).describe().isprintable()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
