"""Jobs that measure what rounding costs, and the numbers of a model's tensors by another implementation (the gguf package)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, RoundingErrorsJob, Trial, TrialResult, TrialsJob
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.cost_files import read_costs
from imatrix_runner.engines.files.imatrix_weights import read_weights
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.events import Sink, ignore
from imatrix_runner.models.gguf_file import read_header

PRINT = "fingerprint"

CHUNKS = (4, 0, 1, 2, 3, 5)

OPTIONS = CollectOptions(n_ctx=128, n_batch=256, threads=2)

Numbers = npt.NDArray[np.float64]


def tensors_of(*files: Path) -> dict[str, tuple[str, Numbers]]:
    """Name -> type in lower case, and float64 [experts, rows, columns]."""
    found = {}
    for file in files:
        header = read_header(file)
        for tensor in header.tensors:
            raw = np.fromfile(file, np.uint8, tensor.n_bytes, offset=header.data_offset + tensor.offset)
            values = dequantize(raw, GGMLQuantizationType[tensor.type_name]).astype(np.float64)
            shape = (*tensor.shape, 1, 1)
            found[tensor.name] = tensor.type_name.lower(), values.reshape(shape[2], shape[1], shape[0])
    return found


def importances(imatrix: Path | None, name: str, numbers: Numbers) -> Numbers:
    """float64 [experts, 1, columns]: the imatrix's values of a tensor, ones without any."""
    given = read_weights(imatrix).values.get(name.encode()) if imatrix is not None else None
    if given is None or given.size != numbers.shape[0] * numbers.shape[2]:
        return np.ones((1, 1, 1))
    return given.astype(np.float64).reshape(numbers.shape[0], 1, numbers.shape[2])


def matrices_of(model: Path) -> list[str]:
    return [tensor.name for tensor in read_header(model).tensors if len(tensor.shape) > 1]


def errors_job(
    sources: Sequence[Path], tensors: Sequence[RoundedTensor], imatrix: Path | None, out: Path, threads: int | None = None
) -> RoundingErrorsJob:
    return RoundingErrorsJob(
        "errors", tuple(sources), tuple(tensors), imatrix, out, PRINT, threads, 1 << 30, out.with_suffix(".log")
    )


def trials_job(model: Path, text: Path, trials: Sequence[Trial], imatrix: Path | None, out: Path) -> TrialsJob:
    """Six chunks of 128 tokens, two at once, in another order than in the text."""
    log = out.with_suffix(".log")
    return TrialsJob("trials", model, text, CHUNKS, tuple(trials), imatrix, out, OPTIONS, PRINT, log)


def with_numbers(model: Path, out: Path, rounded: Mapping[str, Numbers]) -> Path:
    """A copy of a model in which tensors have other numbers, in their own types."""
    out.write_bytes(model.read_bytes())
    header = read_header(model)
    places = {tensor.name: tensor for tensor in header.tensors}
    with out.open("r+b") as handle:
        for name, numbers in rounded.items():
            data = quantize(numbers.astype(np.float32), GGMLQuantizationType[places[name].type_name]).tobytes()
            assert len(data) == places[name].n_bytes
            handle.seek(header.data_offset + places[name].offset)
            handle.write(data)
    return out


@dataclass(frozen=True)
class Costs:
    """Runs jobs of an engine."""

    engine: EmbeddedEngine

    def errors(self, job: RoundingErrorsJob, sink: Sink = ignore) -> dict[RoundedTensor, RoundingError]:
        self.engine.rounding_errors(job, sink)
        found = read_costs(job.out, job.fingerprint, RoundingError)
        assert [record.tensor for record in found] == list(job.tensors)
        return {record.tensor: record for record in found}

    def trials(self, job: TrialsJob, sink: Sink = ignore) -> dict[str, TrialResult]:
        self.engine.trials(job, sink)
        found = read_costs(job.out, job.fingerprint, TrialResult)
        assert [result.trial for result in found] == [trial.name for trial in job.trials]
        assert not list(job.out.parent.glob(".*reference*"))
        return {result.trial: result for result in found}
