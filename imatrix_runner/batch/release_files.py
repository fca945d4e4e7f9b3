"""Removes what a batch downloaded or made, and nothing else: only files that its journal names and that are unchanged since."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from imatrix_runner.batch.batch_journal import BatchJournal, FileMade, FileRemoved
from imatrix_runner.errors import RunnerError
from imatrix_runner.events import Sink, warning
from imatrix_runner.files import stamp

_UNFINISHED = "*.incomplete"


def remove_files(files: Sequence[FileMade], journal: BatchJournal, downloads: Path, sink: Sink) -> int:
    """Remove files of the batch and return the bytes that became free. A file that was changed, or replaced, stays and is no
    longer the batch's; so does one that cannot be removed, with a warning."""
    freed = 0
    for file in files:
        path = Path(file.path)
        if path.is_file():
            try:
                now = stamp(path)
                if now != file.stamp:
                    sink(warning(f"{path} was changed since this batch made it, and is kept."))
                else:
                    _unlink(path, downloads)
                    freed += now.size
            except OSError as error:
                sink(
                    warning(f"{path} cannot be removed ({error.strerror}); remove it by hand to free {file.stamp.size} bytes.")
                )
                continue
        journal.append(FileRemoved(file.model, file.path))
    return freed


def _unlink(path: Path, downloads: Path) -> None:
    """Remove a file; of one in the batch's own download cache also the content that its name leads to, and empty folders."""
    content = path.resolve()
    path.unlink()
    root = downloads.resolve()
    if content != path and content.is_relative_to(root):
        content.unlink(missing_ok=True)
    with suppress(OSError):  # a folder of shards goes with the last of them; others are not empty
        path.parent.rmdir()
    for place in (path, content):
        for folder in place.parents:
            if not folder.resolve().is_relative_to(root) or folder.resolve() == root:
                break
            with suppress(OSError):  # not empty
                folder.rmdir()


def remove_unfinished(downloads: Path) -> None:
    """Remove downloads that a kill left unfinished: the hub's library never continues them. The caller holds the batch."""
    for path in downloads.glob(f"models--*/blobs/{_UNFINISHED}"):
        with suppress(OSError):
            path.unlink()


def bytes_there(files: Sequence[FileMade]) -> int:
    """Bytes of those files that are still there."""
    total = 0
    for file in files:
        with suppress(OSError, RunnerError):
            total += Path(file.path).stat().st_size
    return total
