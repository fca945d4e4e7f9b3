"""The imatrix in the format that a toolchain's llama-quantize reads."""

from __future__ import annotations

import re
import shutil
import struct
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from imatrix_runner.engines.embedded.weights import Values, read_weights
from imatrix_runner.errors import from_os_error
from imatrix_runner.files import Stamp, stamp
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.capabilities import MatrixFormat

_LIBRARY = re.compile(r"\.(?:so(?:\.[\d.]+)?|dylib|dll)$", re.IGNORECASE)


class Handover:
    """Gives llama-quantize a file that it reads: the user's own, or a copy in the other format, made once per matrix.

    A copy has the original's file name, because llama-quantize writes that name into a level's metadata. It runs in the file's
    directory for the same reason, and llama.cpp loads backends from where it runs: where libraries lie that are not those in
    ``home``, its own directory, it is given a link elsewhere.
    """

    def __init__(self, reads: MatrixFormat, home: Path) -> None:
        self._reads = reads
        self._home = home.resolve()
        self._folders = ExitStack()
        weakref.finalize(self, self._folders.close)
        self._copies: dict[tuple[Path, Stamp], Path] = {}
        self._lock = threading.Lock()

    def path(self, imatrix: Path) -> Path:
        """The file to name with ``--imatrix``. Raises :class:`InvalidDataError` for one that is not whole."""
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
    except OSError:  # Windows permits that to few
        try:
            shutil.copyfile(file, link)
        except OSError as error:
            raise from_os_error(error, f"copying {file.name}", link) from error


def write_legacy(path: Path, values: Mapping[bytes, Values], dataset: bytes, chunks: int) -> None:
    """Write a legacy imatrix whose readers find exactly these ``values``: each stands for one call, by which they divide."""
    try:
        with path.open("wb") as out:
            out.write(struct.pack("<i", len(values)))
            for name in values:
                data = values[name]
                out.write(struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, data.size))
                out.write(data.astype("<f4", copy=False).tobytes())
            out.write(struct.pack("<ii", chunks, len(dataset)) + dataset)
    except OSError as error:
        raise from_os_error(error, f"converting {path.name} to the legacy imatrix format", path) from error


def ones(count: int) -> Values:
    """Weights that make all columns alike."""
    return np.ones(count, np.float32)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error
