"""What the programs of a toolchain read, write and take beyond the spellings of their options: found out by trying.

No help text names the imatrix formats that llama-quantize reads: releases before mid-2025 and some forks read the legacy
``.dat`` only, so it is given a matrix of one entry in each format, for a model of two tensors. What came of it is remembered
in the cache for as long as the program stays what it is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

import imatrix_runner
from imatrix_runner.files import stamp
from imatrix_runner.models.gguf_skeleton import (
    ZeroTensor,
    float_entry,
    integer_entry,
    text_entry,
    texts_entry,
    write_zeros,
)
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
_ENTRIES_KEY = b"quantize.imatrix.entries_count"
"""llama-quantize writes this key when it has used a matrix; older ones than that (April 2024) are not known to be in use."""


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
    """What was found for one program, whose path, stamp and so on are in ``key``."""

    key: str
    reads: MatrixFormat


def capabilities(toolchain: Toolchain, cache: Path) -> Capabilities:
    """The :class:`Capabilities` of a toolchain; llama-quantize is run unless the answer is remembered in ``cache``."""
    return Capabilities(
        reads=_reads(toolchain, cache),
        plans=toolchain.knows(QUANTIZE, "--dry-run"),
        counts_experts=not toolchain.takes(IMATRIX).legacy_matrix,
    )


def _reads(toolchain: Toolchain, cache: Path) -> MatrixFormat:
    program, plans = toolchain.tool(QUANTIZE), toolchain.knows(QUANTIZE, "--dry-run")
    key = _key(toolchain, program)
    remembered = recall(cache / _FOLDER, key, _Remembered)
    if remembered is not None:
        return remembered.reads
    found = _ask(program, plans=plans)
    if found is None:
        return "gguf"  # neither is read: llama.cpp's current format, and the program's own words when a level is planned
    remember(cache / _FOLDER, _Remembered(key, found))
    return found


def _key(toolchain: Toolchain, program: Path) -> str:
    """Everything the answer depends on, as one digest."""
    parts = [imatrix_runner.__version__, str(program.absolute()), str(stamp(program)), toolchain.identity()]
    real = program.resolve()
    parts += [f"{real} {stamp(real)}"]
    # A shared build's reader of matrices lies in a library next to the program.
    parts += [f"{path.name} {stamp(path)}" for path in sorted(real.parent.glob("*llama*")) if path.is_file()]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _ask(program: Path, *, plans: bool) -> MatrixFormat | None:
    """The first format of which llama-quantize uses the matrix; None if it uses neither. Where it can plan (``--dry-run``) that
    is enough: it reads the matrix first, and ends with an error if it cannot."""
    kinds: tuple[MatrixFormat, ...] = ("gguf", "dat")
    with scratch_folder() as folder:
        model = folder / "model.gguf"
        write_zeros(model, _tiny_llama(), [ZeroTensor("token_embd.weight", (_COLUMNS, 32), _F32), *_attention()])
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
    """The metadata that every llama.cpp since 2023 wants to see of a llama of one layer."""
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


def _attention() -> Iterator[ZeroTensor]:
    """The weight that the matrix is about: llama.cpp counts these, one per layer."""
    yield ZeroTensor(_ENTRY, (_COLUMNS, _COLUMNS), _F32)


def _matrix_gguf(folder: Path) -> Path:
    """A matrix in llama.cpp's current format. A reader of the legacy one finds lengths in it that end within the file."""
    path = folder / "matrix.gguf"
    keys = [text_entry("general.type", "imatrix"), texts_entry("imatrix.datasets", ["probe"])]
    keys += [integer_entry("imatrix.chunk_count", 1), integer_entry("imatrix.chunk_size", 512)]
    tensors = [ZeroTensor(f"{_ENTRY}.in_sum2", (_COLUMNS, 1), _F32), ZeroTensor(f"{_ENTRY}.counts", (1, 1), _F32)]
    write_zeros(path, keys, tensors)
    return path


def _matrix_dat(folder: Path) -> Path:
    path = folder / "matrix.dat"
    name = _ENTRY.encode()
    head = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, _COLUMNS)
    path.write_bytes(head + struct.pack(f"<{_COLUMNS}f", *[1.0] * _COLUMNS) + struct.pack("<ii", 1, 5) + b"probe")
    return path
