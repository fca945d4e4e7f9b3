"""Errors for NaN and infinity in a model's results: where they occurred, and the tensor that holds them, if any."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.quantize.check_rows import bad_tensor
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.errors import RunnerError
from imatrix_runner.models.finite import non_finite_error
from imatrix_runner.models.gguf_names import shard_names


class NonFiniteInputError(Exception):
    """A weight's input has NaN or infinity. ``row``: the first such token of the batch, None if unknown."""

    def __init__(self, weight: str, row: int | None) -> None:
        super().__init__(weight, row)
        self.weight, self.row = weight, row


def refuse(library: Library, model: Path, seen: str, threads: int | None, stop: StdinStop) -> Refusal:
    """The refusal of a model whose results are NaN or infinite. ``seen``: where, such as ``its logits in chunk 3``.

    Reads the whole file to name the tensor: the name distinguishes a damaged file from a model that overflows.
    """
    files = tuple(model.with_name(name) for name in shard_names(model))
    try:
        tensor = bad_tensor(library, files, threads, stop)
    except (Refusal, RunnerError, OSError):
        tensor = ""  # this library cannot check the type: the error has no name
    error = non_finite_error(model, seen, tensor)
    return Refusal.invalid(error.what, error.why, error.todo)
