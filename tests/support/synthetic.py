"""An engine that computes nothing: what a chunk adds follows from its number, so that sums can be tested to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imatrix_runner.engines.contract import EngineCapabilities, OnRange
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import (
    ChunkRange,
    CollectedRange,
    CollectJob,
    CollectOptions,
    DryRun,
    Perplexity,
    Quantized,
    QuantizeJob,
)
from imatrix_runner.events import Progress, Sink
from imatrix_runner.files import publish
from imatrix_runner.imatrix.formats import prepare_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry, add
from imatrix_runner.toolchain.quant_type import QuantType

OPTIONS = CollectOptions(n_ctx=32, n_batch=32)
DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"
N_EXPERTS = 4


def one_chunk(number: int, *, noise: float = 1.0, rare: int = 40) -> Matrix:
    """The matrix of one chunk: a dense entry, and four experts of which the last is met in every ``rare``-th chunk only."""
    random = np.random.default_rng(number)
    means = np.arange(1, 9) * 0.7
    tokens = OPTIONS.n_ctx
    dense = MatrixEntry((means * tokens * (1 + noise * random.random(8)))[None, :], np.array([tokens], np.int64))
    counts = random.multinomial(tokens, [0.5, 0.3, 0.2, 0.0])
    counts[3] = 3 if number % rare == rare - 1 else 0
    experts = MatrixEntry(random.random((N_EXPERTS, 6)) * counts[:, None], counts.astype(np.int64))
    return Matrix({DENSE: dense, EXPERTS: experts}, tokens, 1, ("staged.txt",))


def expected(ranges: Sequence[ChunkRange], **changes: float) -> Matrix:
    """What collecting ``ranges`` must give: ranges summed by the engine, then added in their order."""
    return add([_range(chunks, changes) for chunks in ranges])


def _range(chunks: ChunkRange, changes: dict[str, float]) -> Matrix:
    numbers = range(chunks.first, chunks.end)
    return add([one_chunk(number, **changes) for number in numbers])  # type: ignore[arg-type]


@dataclass
class SyntheticEngine:
    """``before`` hears of every range before it is computed (and may raise); ``exact`` writes float64 pieces, as the embedded
    engine does. ``computed`` is what was."""

    before: Callable[[ChunkRange], None] = lambda chunks: None
    damage: Callable[[Path], None] = lambda path: None
    exact: bool = True
    capabilities: EngineCapabilities = EmbeddedEngine.capabilities
    name: str = "synthetic"
    changes: dict[str, float] = field(default_factory=dict)
    computed: list[ChunkRange] = field(default_factory=list)
    jobs: list[CollectJob] = field(default_factory=list)
    types: tuple[QuantType, ...] = ()
    devices: tuple[str, ...] = ()
    one_pass: None = None
    answerer: None = None
    task_answerer: None = None
    cost_meter: None = None
    speed_meter: None = None
    covariance_collector: None = None
    range_measurer: None = None

    def identity(self) -> str:
        return "synthetic 1"

    def count_tokens(self, model: Path, text: Path, *, parse_special: bool, log: Path | None) -> int:
        raise NotImplementedError

    def collect(self, job: CollectJob, sink: Sink, on_range: OnRange) -> None:
        self.jobs.append(job)
        done, total = 0, sum(chunks.count for chunks in job.ranges)
        for chunks in job.ranges:
            self.before(chunks)
            path = job.folder / chunks.file_name
            publish(prepare_gguf(_range(chunks, self.changes), path, exact=self.exact), path)
            self.damage(path)
            self.computed.append(chunks)
            done += chunks.count
            sink(Progress(job.step, done, total))
            scored = chunks.count * job.options.scored_tokens
            if not on_range(CollectedRange(chunks, path, 1.0, 0.1, Perplexity(2.0 * scored, 5.0 * scored, scored))):
                return

    def dry_run(self, job: QuantizeJob) -> DryRun:
        raise NotImplementedError

    def quantize(self, job: QuantizeJob, sink: Sink) -> Quantized:
        raise NotImplementedError
