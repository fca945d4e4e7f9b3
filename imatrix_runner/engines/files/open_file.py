"""Random access to a file that stays open, from any thread."""

from __future__ import annotations

import io
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError


class OpenFile:
    """An open file. It stays readable when another file replaces it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = io.FileIO(path)
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self.size = self._file.seek(0, io.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes. Raises :class:`InvalidDataError` if the file was truncated meanwhile."""
        return self.array(offset, size, "u1").tobytes()

    def array(self, offset: int, count: int, kind: str) -> npt.NDArray[Any]:
        """``count`` numbers of a NumPy type such as ``<f4``, in an array of their own; raises like :meth:`read`."""
        numbers = np.empty(count, kind)
        left = numbers.data.cast("B") if count else memoryview(b"")
        with self._lock:
            self._file.seek(offset)
            while left and (read := self._file.readinto(left)):
                left = left[read:]
        if left:
            why = f"it was {self.size} bytes long and now ends earlier"
            raise InvalidDataError(f"{self.path} changed while it was read", why, "Run the same command again.")
        return numbers
