"""Jobs that collect covariances, and the activations themselves, caught by another callback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.covariance_jobs import CovarianceJob
from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.covariance_file import StoredCovariance, stored_covariances
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.protocol import encode_job
from imatrix_runner.events import Sink, ignore
from imatrix_runner.imatrix.covariances import wanted_weights
from imatrix_runner.models.model import open_gguf
from support.command_line import clean_environment

PRINT = "fingerprint"

OPTIONS = CollectOptions(n_ctx=128, n_batch=256, threads=2, ppl=False)

RANGES = (ChunkRange(4, 3), ChunkRange(0, 2))

PLENTY = 1 << 30

_CAPTURE = """
import sys
from collections import defaultdict
import numpy as np
from imatrix_runner.engines.protocol import decode_job
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.batching import batches
from imatrix_runner.engines.worker.collect.chunk_feed import ChunkFeed, text_tokens
from imatrix_runner.engines.worker.collect.graph_watch import GraphWatch
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.llama_context import load_context
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.engines.worker.tensor_layout import Tensor

job, rows = decode_job(open(sys.argv[1]).read()), defaultdict(list)

class Capture(GraphWatch):
    def _wants(self, product):
        return self.weight_name(product.src[0]) in job.weights

    def _take(self, product):
        name, address = self.weight_name(product.src[0]), product.src[1]
        if product.op == self._operations.mul_mat:
            values = self._reader.floats(address, Tensor.from_address(address))
            rows[name, 0].append(values.reshape(-1, values.shape[-1]).copy())
            return
        experts = self._reader.experts(product.src[2], Tensor.from_address(product.src[2]))
        values = self._reader.floats(address, Tensor.from_address(address))[0]
        for token, used in enumerate(experts):
            for slot, expert in enumerate(used):
                rows[name, int(expert)].append(values[token, slot % values.shape[1]][None].copy())

    def _learned(self, graph): ...
    def _take_last_input(self, product, address, values): ...

library = load()
watch = Capture(library, check(library))
with load_context(library, job.model, job.options, watch.callback) as context:
    feed = ChunkFeed(job.model, job.options, context, watch, text_tokens(context, job.text, job.options, 1), StdinStop())
    for chunks in job.ranges:
        for batch in batches(chunks.first, chunks.count, job.options):
            list(feed.compute(batch))
np.savez(sys.argv[2], **{f"{name} {expert}": np.concatenate(some) for (name, expert), some in rows.items()})
"""


def covariance_job(model: Path, text: Path, folder: Path, options: CollectOptions = OPTIONS) -> CovarianceJob:
    """Five chunks of 128 tokens, two at once, in another order than in the text."""
    weights = wanted_weights(open_gguf(model, allow_requantize=False), process_output=options.process_output)
    log = folder.with_suffix(".log")
    return CovarianceJob("covariances", model, text, RANGES, folder, options, weights, PRINT, PLENTY, log)


def collected_set(engine: EmbeddedEngine, job: CovarianceJob, sink: Sink = ignore) -> dict[str, StoredCovariance]:
    engine.collect_covariances(job, sink)
    found = stored_covariances(job.folder, job.fingerprint)
    assert found
    assert [path.name for path in job.folder.iterdir() if not path.name.endswith((".covariance", ".json"))] == []
    return found


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def captured(job: CovarianceJob, directory: Path, library: Path) -> Mapping[str, npt.NDArray[np.float32]]:
    """``weight expert`` -> float32 [n_tokens, n_columns]: the inputs of a job's weights, in the order of computation."""
    request, out = directory / "capture.json", directory / "captured.npz"
    request.write_bytes(encode_job(job))
    reading, writing = os.pipe()  # a worker stops when its stdin ends
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CAPTURE, request, out],
            stdin=reading,
            env=clean_environment({LIBRARY_VARIABLE: str(library)}),
            capture_output=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0, done.stderr.decode()
    return dict(np.load(out))
