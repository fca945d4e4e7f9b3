"""Exact sums on disk: an imatrix GGUF with F64 sums and I64 counts, for finished and unfinished ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.engines.files.imatrix_file import read_imatrix
from imatrix_runner.engines.files.imatrix_writer import Numbers, write_gguf_imatrix
from imatrix_runner.engines.worker.collect.graph_callback import CollectedEntry
from imatrix_runner.errors import RunnerError
from imatrix_runner.files import discard, part_path, publish
from imatrix_runner.models.gguf_writer import double_entry, integer_entry, long_entry, text_entry
from imatrix_runner.models.imatrix_layout import imatrix_entries

_FINGERPRINT, _DONE = "imatrix_runner.fingerprint", "imatrix_runner.done_chunks"
_NLL, _NLL2, _SCORED, _SECONDS = "imatrix_runner.nll", "imatrix_runner.nll2", "imatrix_runner.scored", "imatrix_runner.seconds"


@dataclass
class Range:
    """A range's state: number of chunks done, their sums, negative log-likelihoods and time."""

    done: int = 0
    entries: dict[str, CollectedEntry] = field(default_factory=dict)
    nll: float = 0.0
    nll2: float = 0.0
    scored: int = 0
    seconds: float = 0.0


def write(path: Path, work: Range, *, n_ctx: int, dataset: str, fingerprint: str) -> None:
    """Write a range, finished or not; the file appears atomically under its name."""
    most = max((int(entry.counts.max()) for entry in work.entries.values()), default=0)
    entries = [
        *imatrix_entries([dataset], most // n_ctx, n_ctx),
        text_entry(_FINGERPRINT, fingerprint),
        integer_entry(_DONE, work.done),
        long_entry(_SCORED, work.scored),
        *(double_entry(key, value) for key, value in ((_NLL, work.nll), (_NLL2, work.nll2), (_SECONDS, work.seconds))),
    ]
    shapes = {name: entry.sums.shape for name, entry in work.entries.items()}

    def numbers(name: str) -> tuple[Numbers, Numbers]:
        return work.entries[name].sums, work.entries[name].counts

    part = part_path(path)
    try:
        write_gguf_imatrix(part, shapes, numbers, entries, exact=True)
    except BaseException:
        discard(part)
        raise
    publish(part, path)


def resume(path: Path, fingerprint: str) -> Range:
    """The unfinished range in a file, if it belongs to the same job; otherwise an empty one."""
    try:
        stored = read_imatrix(path, exact=True)
        metadata = stored.header.metadata if stored.header is not None else {}
        if metadata[_FINGERPRINT] != fingerprint:
            return Range()
        entries = {name.decode(): CollectedEntry(entry.sums(), entry.counts()) for name, entry in stored.entries.items()}
        nll, nll2, seconds = (float(metadata[key]) for key in (_NLL, _NLL2, _SECONDS))
        return Range(int(metadata[_DONE]), entries, nll, nll2, int(metadata[_SCORED]), seconds)
    except (OSError, RunnerError, KeyError, ValueError, TypeError):
        return Range()  # damaged, for example by a loss of power: its chunks are computed again
