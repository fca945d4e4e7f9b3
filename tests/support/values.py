"""Small values for tests: toolchains, matrices and jobs that need no program and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.toolchain.probe import TOOLS, Toolchain
from imatrix_runner.toolchain.quant_type import QuantType

DEMO_CHUNKS, DEMO_CONTEXT = 12, 64
"""What the imatrix of the fixture ``demo_imatrix`` was made of: so many chunks of so many tokens."""

TOOLS_DIRECTORY = Path("/tools")


def fake_toolchain(**changes: Any) -> Toolchain:
    """A CPU toolchain whose llama-imatrix knows ``-fit``, with what ``changes`` say."""
    plain = Toolchain(
        directory=TOOLS_DIRECTORY,
        origin="test",
        tools={name: TOOLS_DIRECTORY / name for name in TOOLS},
        version="1.2.3",
        build="7",
        commit="abc",
        backends=("cpu",),
        devices=(),
        types=quant_types("Q4_K_M", "IQ2_XS"),
        options={
            "llama-imatrix": frozenset(("-fit", "-c", "-b", "-lv", "--chunk", "--parse-special", "--process-output")),
            "llama-tokenize": frozenset(("-m", "-f", "--ids", "--no-parse-special")),
        },
        converter=None,
    )
    return replace(plain, **changes)


def quant_types(*names: str, aliases: Mapping[str, str] | None = None) -> tuple[QuantType, ...]:
    """Types as ``llama-quantize`` would offer them; ``aliases`` maps a short name to the one it stands for."""
    plain = tuple(QuantType(name, number, f"{name} of a test") for number, name in enumerate(names))
    return (*plain, *(QuantType(name, 0, "alias", alias_of=of) for name, of in (aliases or {}).items()))


def entry(sums: Sequence[float] | Sequence[Sequence[float]], counts: int | Sequence[int]) -> MatrixEntry:
    """An entry from plain numbers; one row of sums needs no inner list."""
    return MatrixEntry(np.atleast_2d(np.asarray(sums, np.float64)), np.atleast_1d(np.asarray(counts, np.int64)))


def matrix(entries: Mapping[str, MatrixEntry] | None = None, **changes: Any) -> Matrix:
    """A matrix of one entry (or of ``entries``), 64 tokens a chunk, 2 chunks, one dataset."""
    plain = Matrix(entries or {"blk.0.attn_q.weight": entry([1, 2, 3, 4], 128)}, 64, 2, ("text.txt",))
    return replace(plain, **changes)


def same_matrix(one: Matrix, other: Matrix) -> bool:
    """Equality that looks into the arrays: same names, same numbers, same provenance."""
    return (
        (one.chunk_size, one.chunk_count, one.datasets) == (other.chunk_size, other.chunk_count, other.datasets)
        and list(one.entries) == list(other.entries)
        and all(
            np.array_equal(one.entries[name].sums, other.entries[name].sums)
            and np.array_equal(one.entries[name].counts, other.entries[name].counts)
            for name in one.entries
        )
    )
