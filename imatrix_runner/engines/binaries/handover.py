"""Provides the imatrix in the format that a toolchain's llama-quantize reads."""

from __future__ import annotations

import re
import shutil
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from imatrix_runner.engines.files.imatrix_weights import Values, read_weights
from imatrix_runner.engines.files.imatrix_writer import write_legacy_imatrix
from imatrix_runner.errors import from_os_error
from imatrix_runner.files import Stamp, stamp
from imatrix_runner.models.gguf_file import MAGIC
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.capabilities import MatrixFormat

_LIBRARY = re.compile(r"\.(?:so(?:\.[\d.]+)?|dylib|dll)$", re.IGNORECASE)


class Handover:
    """Gives llama-quantize a file that it can read: the user's own, or a copy in the other format, made once per imatrix.

    A copy has the original's file name, because llama-quantize writes that name into a level's metadata. llama-quantize runs
    in the file's directory for the same reason, and llama.cpp loads backends from its working directory: if that holds ggml
    libraries and is not ``home``, the program's own directory, the file is linked into a folder without any.
    """

    def __init__(self, reads: MatrixFormat, home: Path) -> None:
        self._reads = reads
        self._home = home.resolve()
        self._folders = ExitStack()
        weakref.finalize(self, self._folders.close)
        self._copies: dict[tuple[Path, Stamp], Path] = {}
        self._lock = threading.Lock()

    def path(self, imatrix: Path) -> Path:
        """The file for ``--imatrix``. Raises :class:`InvalidDataError` if the imatrix is incomplete."""
        readable = self._reads == "gguf" or not _is_gguf(imatrix)
        if readable and not self._holds_other_libraries(imatrix.parent):
            return imatrix
        key = imatrix, stamp(imatrix)
        with self._lock:
            if key not in self._copies:
                copy = self._folders.enter_context(scratch_folder()) / imatrix.name
                if readable:
                    _link(imatrix, copy)
                else:
                    weights = read_weights(imatrix)
                    write_legacy(copy, weights.values, weights.dataset or b"", weights.chunks)
                self._copies[key] = copy
            return self._copies[key]

    def _holds_other_libraries(self, folder: Path) -> bool:
        return folder.resolve() != self._home and any(_LIBRARY.search(path.name) for path in folder.glob("*ggml*"))


def _link(file: Path, link: Path) -> None:
    try:
        link.symlink_to(file.absolute())
    except OSError:  # Windows allows symbolic links to few users
        try:
            shutil.copyfile(file, link)
        except OSError as error:
            raise from_os_error(error, f"copying {file.name}", link) from error


def write_legacy(path: Path, values: Mapping[bytes, Values], dataset: bytes, chunks: int) -> None:
    """Write a legacy imatrix from which readers get exactly these ``values``: each entry has one call, by which they divide."""
    entries = ((name, 1, values[name]) for name in values)
    try:
        write_legacy_imatrix(path, len(values), entries, chunks, dataset)
    except OSError as error:
        raise from_os_error(error, f"converting {path.name} to the legacy imatrix format", path) from error


def ones(count: int) -> Values:
    """Equal weights for all columns."""
    return np.ones(count, np.float32)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error
