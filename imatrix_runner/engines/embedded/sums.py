"""Sums on disk, exact: an imatrix GGUF whose sums are F64 and whose counts are I64, for finished and unfinished ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.engines.embedded.collector import Entry
from imatrix_runner.errors import RunnerError
from imatrix_runner.files import discard, part_path, publish
from imatrix_runner.models.gguf_file import read_header

SUMS, COUNTS = ".in_sum2", ".counts"
_FINGERPRINT, _DONE = "imatrix_runner.fingerprint", "imatrix_runner.done_chunks"
_NLL, _NLL2, _SCORED, _SECONDS = "imatrix_runner.nll", "imatrix_runner.nll2", "imatrix_runner.scored", "imatrix_runner.seconds"


@dataclass
class Range:
    """What a range has come to: chunks done, their sums, and what was measured on the way."""

    done: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    nll: float = 0.0
    nll2: float = 0.0
    scored: int = 0
    seconds: float = 0.0


def write(path: Path, work: Range, *, n_ctx: int, dataset: str, fingerprint: str) -> None:
    """Write a range, whole or not, under its name at once."""
    from gguf import GGUFWriter

    class Writer(GGUFWriter):
        def add_architecture(self) -> None:
            """An imatrix has none."""

    part = part_path(path)
    writer = Writer(part, "")
    try:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        most = max((int(entry.counts.max()) for entry in work.entries.values()), default=0)
        writer.add_uint32("imatrix.chunk_count", most // n_ctx)
        writer.add_uint32("imatrix.chunk_size", n_ctx)
        writer.add_string(_FINGERPRINT, fingerprint)
        writer.add_uint32(_DONE, work.done)
        writer.add_uint64(_SCORED, work.scored)
        for key, value in ((_NLL, work.nll), (_NLL2, work.nll2), (_SECONDS, work.seconds)):
            writer.add_float64(key, value)
        for name in sorted(work.entries):
            entry = work.entries[name]
            writer.add_tensor(name + SUMS, entry.sums)
            writer.add_tensor(name + COUNTS, entry.counts.reshape(-1, 1))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except BaseException:
        writer.close()
        discard(part)
        raise
    writer.close()
    publish(part, path)


def resume(path: Path, fingerprint: str) -> Range:
    """The unfinished range that lies there, if it is one of the same job; else an empty one."""
    try:
        header = read_header(path)
        metadata = header.metadata
        if metadata[_FINGERPRINT] != fingerprint:
            return Range()
        where = {tensor.name: tensor for tensor in header.tensors}
        with path.open("rb") as file:

            def read(name: str, kind: str) -> Any:
                tensor = where[name]
                file.seek(header.data_offset + tensor.offset)
                return np.fromfile(file, kind, tensor.n_elements).reshape(tensor.shape[::-1])

            entries = {
                name[: -len(SUMS)]: Entry(read(name, "<f8"), read(name[: -len(SUMS)] + COUNTS, "<i8").reshape(-1))
                for name in where
                if name.endswith(SUMS)
            }
        nll, nll2, seconds = (float(metadata[key]) for key in (_NLL, _NLL2, _SECONDS))
        return Range(int(metadata[_DONE]), entries, nll, nll2, int(metadata[_SCORED]), seconds)
    except (OSError, RunnerError, KeyError, ValueError, TypeError):
        return Range()  # a machine that lost power left it so: what it held is computed again
