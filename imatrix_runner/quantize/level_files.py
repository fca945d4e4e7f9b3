"""The files of levels: which shards a level is cut into, where its files go, and the renames that a kill interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imatrix_runner.engines.jobs import LEDGER_NAME, QuantizeOptions
from imatrix_runner.engines.shards import MEGABYTE, MOST_SHARDS, shard_paths, tensors_per_shard
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.quantize.usable_imatrix import Failure
from imatrix_runner.steps import step_id
from imatrix_runner.workspace import Workspace


def plan_shards(
    names: Sequence[str], sizes: Sequence[int | None], options: QuantizeOptions
) -> tuple[tuple[int, ...], list[Failure]]:
    """Return the number of tensors in each shard of a level, and why it cannot be cut so.

    ``sizes``: bytes of each tensor, in the level's order; None where unknown. A level that is not cut, or fits into one shard,
    has none: it stays one plain file.
    """
    if not options.is_split or not names:
        return (), []
    known = [size for size in sizes if size is not None]
    if len(known) < len(names):
        name = names[sizes.index(None)]
        why = f"the size of {name} is only known to the program that makes it, so the shards cannot be planned"
        return (), [Failure(why, "Leave out --split-max-size and --split-max-tensors, and use llama-gguf-split afterwards.")]
    counts = tensors_per_shard(known, options)
    if not counts[0]:
        why = f"the first tensor, {names[0]}, takes {known[0]:,} bytes: llama-gguf-split would leave the first shard empty"
        return (), [Failure(why, f"Give at least --split-max-size {-(-(known[0] + 31) // MEGABYTE)}M.")]
    if len(counts) > MOST_SHARDS:
        why = f"it would become {len(counts)} shards, and a set has at most {MOST_SHARDS}"
        return (), [Failure(why, "Allow larger shards.")]
    return (counts if len(counts) > 1 else ()), []


def planned_files(single: Path, options: QuantizeOptions, n_shards: int, n_source_files: int) -> tuple[Path, ...]:
    """Return the final names of a level.

    ``single``: its name as one file. As many shards as the source has (``--keep-split``) lie next to each other there; those
    of ``--split-max-size`` in a folder of the level.
    """
    if options.keep_split:
        return shard_paths(single, n_source_files)
    return shard_paths(single.with_suffix("") / single.name, n_shards) if n_shards else (single,)


def stays_whole(files: Sequence[Path], options: QuantizeOptions) -> bool:
    """Whether a finished level is one file that ``options`` would not cut."""
    if len(files) != 1 or not options.is_split:
        return False
    try:
        sizes = [tensor.n_bytes for tensor in read_header(files[0]).tensors]
    except InvalidDataError:
        return False
    known = [size for size in sizes if size is not None]
    return len(known) == len(sizes) and len(tensors_per_shard(known, options)) == 1


def finished_files(workspace: Workspace, record: StepRecord) -> tuple[Path, ...]:
    """Return the files of a finished level, in order; llama.cpp is given the first. They may be gone or changed since
    (:func:`~imatrix_runner.journal.outputs_intact`)."""
    return tuple(workspace.root / output.name for output in record.outputs)


def finish_renames(journal: Journal, workspace: Workspace) -> None:
    """Give the verified files of levels their names where a kill came between their record and the last rename.

    Without this a set of shards of which some have their names would have to be made again.
    """
    for name in journal.of_kind("level"):
        folder = workspace.partial / name
        if folder.is_dir() and journal.finish_renames(step_id("level", name), folder):
            keep_ledger(workspace, name, folder)


def keep_ledger(workspace: Workspace, level: str, folder: Path) -> None:
    """Keep the record of how every tensor was made, for later levels that share some. ``folder``: where the level was made."""
    ledger, kept = folder / LEDGER_NAME, workspace.ledger(level)
    try:
        kept.unlink(missing_ok=True)
        if ledger.exists():
            kept.parent.mkdir(exist_ok=True)
            ledger.replace(kept)
    except OSError as error:
        raise from_os_error(error, f"keeping the ledger of {level}", kept) from error
