"""NaN and infinity in what a model computes: where they were met, and the tensor they come from where one holds them."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.engines.embedded.library import Library
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.stdin import Stop
from imatrix_runner.engines.embedded.validating import bad_tensor
from imatrix_runner.errors import RunnerError
from imatrix_runner.models.finite import no_numbers
from imatrix_runner.models.gguf_names import shard_names


class NonFiniteInputError(Exception):
    """A weight met activations with NaN or infinity; ``row``: the first such token of the batch, None if that is not known."""

    def __init__(self, weight: str, row: int | None) -> None:
        super().__init__(weight, row)
        self.weight, self.row = weight, row


def refuse(library: Library, model: Path, seen: str, threads: int | None, stop: Stop) -> Refusal:
    """The refusal of a model whose results are NaN or infinite. ``seen``: where, such as ``its logits in chunk 3``.

    Reads the whole file to name the tensor: this is the end of the job, and the name is what tells a damaged file from one
    that overflows.
    """
    files = tuple(model.with_name(name) for name in shard_names(model))
    try:
        tensor = bad_tensor(library, files, threads, stop)
    except (Refusal, RunnerError, OSError):
        tensor = ""  # a type that this library cannot check: the error is told without the name
    error = no_numbers(model, seen, tensor)
    return Refusal.invalid(error.what, error.why, error.todo)
