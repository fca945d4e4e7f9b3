"""Times a few chunks with the real engine, to predict how long a whole calibration text takes."""

from __future__ import annotations

from dataclasses import dataclass

from imatrix_runner.context.context import Session
from imatrix_runner.documents.corpus import Corpus, stage
from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, CollectJob, CollectOptions
from imatrix_runner.errors import EngineError
from imatrix_runner.events import Event, Finished, Notice, Progress, Started
from imatrix_runner.files import require_space
from imatrix_runner.imatrix.plan_generation import matrix_bytes
from imatrix_runner.models.model import Model
from imatrix_runner.scratch import scratch_folder

STEP = "probe"
PAIR = 2
"""Chunks that are timed, after as many for warming up: files are read for the first time, clocks rise."""


@dataclass(frozen=True)
class Timing:
    """Seconds per chunk of the first pair and of the second (None if the text is too short). ``load_seconds``: from the start
    of the engine to its first chunk."""

    first: float
    second: float | None
    load_seconds: float

    @property
    def seconds_per_chunk(self) -> float:
        return self.first if self.second is None else self.second

    @property
    def apart(self) -> float | None:
        """Difference of the two pairs as a share of the second: the least error to expect of so short a probe."""
        return abs(self.first - self.second) / self.second if self.second else None

    def expected(self, n_chunks: int) -> float:
        """Expected seconds for a job of ``n_chunks`` chunks, including loading."""
        return self.load_seconds + n_chunks * self.seconds_per_chunk


def ranges(n_tokens: int, n_ctx: int) -> tuple[ChunkRange, ...]:
    """The pairs of chunks that fit in a text. llama-imatrix starts at chunk K > 0 only if ``(K + 2) * n_ctx < n_tokens``."""
    first = (ChunkRange(0, PAIR),) if n_tokens >= PAIR * n_ctx else ()
    return (*first, ChunkRange(PAIR, PAIR)) if first and (PAIR + 2) * n_ctx < n_tokens else first


def probe(model: Model, corpus: Corpus, n_tokens: int, options: CollectOptions, session: Session) -> Timing:
    """Collect the first chunks of a text into a temporary folder and time them. Raises what the engine raises."""
    pairs = ranges(n_tokens, options.n_ctx)
    total = sum(pair.count for pair in pairs)
    collected: list[CollectedRange] = []

    def take(done: CollectedRange) -> bool:
        collected.append(done)
        done.path.unlink()
        return len(collected) < len(pairs)

    def forward(event: Event) -> None:
        if isinstance(event, (Progress, Notice)):
            session.sink(event)

    with scratch_folder() as folder:
        # The float64 sums of a pair, and the engine's unfinished ones next to them.
        require_space(folder, 4 * matrix_bytes(model), "timing a few chunks")
        text = folder / "calibration.txt"
        stage(corpus, text)
        session.sink(Started(STEP, f"timing {total} chunks", total, "chunks"))
        job = CollectJob(STEP, model.path, text, pairs, folder, options, STEP, None)
        session.engine.collect(job, forward, take)
    session.stop.check()
    if len(collected) < len(pairs):
        raise EngineError(
            f"The {session.engine.name} engine ended early",
            f"{sum(one.chunks.count for one in collected)} of {total} chunks were computed",
            "Try again, or leave the time out with --no-probe.",
        )
    seconds = [one.seconds / one.chunks.count for one in collected]
    timing = Timing(seconds[0], seconds[1] if len(seconds) > 1 else None, collected[0].load_seconds)
    session.sink(Finished(STEP, "done", f"{timing.seconds_per_chunk:.2f} s a chunk", sum(one.seconds for one in collected)))
    return timing
