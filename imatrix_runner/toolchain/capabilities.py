"""What the programs of a toolchain read, write and accept beyond the names of their options: determined by tests.

No help text names the imatrix formats that llama-quantize reads: releases before mid-2025 and some forks read the legacy
``.dat`` only, so it is given a matrix of one entry in each format, for a model of two tensors. The result is remembered in the
cache for as long as the program is unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

import imatrix_runner
from imatrix_runner.files import stamp
from imatrix_runner.models.gguf_skeleton import write_zeros
from imatrix_runner.models.gguf_writer import NewTensor, float_entry, integer_entry, text_entry
from imatrix_runner.models.imatrix_layout import imatrix_entries, imatrix_tensors, legacy_begin, legacy_end, legacy_entry
from imatrix_runner.process import Command, capture
from imatrix_runner.remembered import recall, remember
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.probe import Toolchain

MatrixFormat = Literal["gguf", "dat"]

QUANTIZE, IMATRIX = "llama-quantize", "llama-imatrix"
_FOLDER = "capabilities"
_SECONDS = 20.0
_F32 = 0
_COLUMNS = 256
_ENTRY = "blk.0.attn_v.weight"
_DATASET = "probe"
_ENTRIES_KEY = b"quantize.imatrix.entries_count"
"""llama-quantize writes this key when it has used a matrix, since April 2024; older programs are not known to be in use."""


@dataclass(frozen=True)
class MatrixSupport:
    """``reads``: the imatrix format that llama-quantize takes; None if it used neither in a test. ``writes``: the one that
    llama-imatrix writes."""

    reads: MatrixFormat | None
    writes: MatrixFormat

    def __str__(self) -> str:
        reads = _NAMES[self.reads] if self.reads is not None else "neither of the known formats"
        return f"{QUANTIZE} reads {reads}, {IMATRIX} writes {_NAMES[self.writes]}"


_NAMES = {"gguf": "GGUF", "dat": "the legacy .dat"}


@dataclass(frozen=True)
class Capabilities:
    """What a toolchain's programs can do.

    ``reads``: the imatrix format that llama-quantize takes. ``plans``: it has ``--dry-run``. ``counts_experts``: llama-imatrix
    writes how many tokens each expert saw, and keeps tensors of which some experts saw none (the legacy format does neither).
    """

    reads: MatrixFormat = "gguf"
    plans: bool = True
    counts_experts: bool = True


class _Remembered(msgspec.Struct, frozen=True):
    """The result for one program; ``key`` covers its path, stamp and more."""

    key: str
    reads: MatrixFormat


def capabilities(toolchain: Toolchain, cache: Path) -> Capabilities:
    """The :class:`Capabilities` of a toolchain; llama-quantize is run unless the answer is remembered in ``cache``."""
    support = matrix_support(toolchain, cache)
    return Capabilities(
        # Neither is read: use llama.cpp's current format; the program reports the problem when a level is planned.
        reads=support.reads or "gguf",
        plans=toolchain.knows(QUANTIZE, "--dry-run"),
        counts_experts=support.writes == "gguf",
    )


def matrix_support(toolchain: Toolchain, cache: Path) -> MatrixSupport:
    """The imatrix formats of a toolchain; llama-quantize is run unless the answer is remembered in ``cache``."""
    return MatrixSupport(_reads(toolchain, cache), "dat" if toolchain.takes(IMATRIX).legacy_matrix else "gguf")


def _reads(toolchain: Toolchain, cache: Path) -> MatrixFormat | None:
    program, plans = toolchain.tool(QUANTIZE), toolchain.knows(QUANTIZE, "--dry-run")
    key = _key(toolchain, program)
    remembered = recall(cache / _FOLDER, key, _Remembered)
    if remembered is not None:
        return remembered.reads
    found = _ask(program, plans=plans)
    if found is not None:
        remember(cache / _FOLDER, _Remembered(key, found))
    return found


def _key(toolchain: Toolchain, program: Path) -> str:
    """Return one digest of everything the result depends on."""
    parts = [imatrix_runner.__version__, str(program.absolute()), str(stamp(program)), toolchain.identity()]
    real = program.resolve()
    parts += [f"{real} {stamp(real)}"]
    # In a shared build the reader of matrices is in a library next to the program.
    parts += [f"{path.name} {stamp(path)}" for path in sorted(real.parent.glob("*llama*")) if path.is_file()]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _ask(program: Path, *, plans: bool) -> MatrixFormat | None:
    """Return the first format in which llama-quantize uses a matrix; None if it uses neither. A dry run is enough where it
    exists: it reads the matrix first, and ends with an error if it cannot."""
    kinds: tuple[MatrixFormat, ...] = ("gguf", "dat")
    with scratch_folder() as folder:
        model = folder / "model.gguf"
        write_zeros(model, _tiny_llama(), [NewTensor("token_embd.weight", (_COLUMNS, 32), _F32), *_attention()])
        for kind, matrix in zip(kinds, (_matrix_gguf(folder), _matrix_dat(folder)), strict=True):
            out = folder / f"out-{kind}.gguf"
            options = ("--imatrix", str(matrix), *(["--dry-run"] if plans else []))
            argv = (str(program.absolute()), *options, str(model), str(out), "Q8_0", "1")
            try:
                answer = capture(Command(argv, cwd=folder), seconds=_SECONDS)
            except (OSError, TimeoutError):
                continue
            if answer.returncode == 0 and (plans or (out.is_file() and _ENTRIES_KEY in out.read_bytes())):
                return kind
    return None


def _tiny_llama() -> Iterator[bytes]:
    """Yield the metadata that every llama.cpp since 2023 requires of a llama model with one layer."""
    yield text_entry("general.architecture", "llama")
    yield text_entry("general.name", "probe")
    for key, value in (
        ("vocab_size", 32),
        ("context_length", 32),
        ("embedding_length", _COLUMNS),
        ("block_count", 1),
        ("feed_forward_length", _COLUMNS),
        ("rope.dimension_count", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 4),
    ):
        yield integer_entry(f"llama.{key}", value)
    yield float_entry("llama.attention.layer_norm_rms_epsilon", 1e-5)


def _attention() -> Iterator[NewTensor]:
    """Yield the weight that the matrix has data for: llama.cpp counts these, one per layer."""
    yield NewTensor(_ENTRY, (_COLUMNS, _COLUMNS), _F32)


def _matrix_gguf(folder: Path) -> Path:
    """Write a matrix in llama.cpp's current format. A reader of the legacy format finds lengths in it that end within the
    file."""
    path = folder / "matrix.gguf"
    write_zeros(path, imatrix_entries([_DATASET], 1, 512), list(imatrix_tensors(_ENTRY, 1, _COLUMNS)))
    return path


def _matrix_dat(folder: Path) -> Path:
    path = folder / "matrix.dat"
    entry = legacy_entry(_ENTRY.encode(), 1, np.ones(_COLUMNS, np.float32))
    path.write_bytes(legacy_begin(1) + entry + legacy_end(1, _DATASET.encode()))
    return path
