"""A few chunks through the real engine: how long a whole calibration text will take."""

from __future__ import annotations

from dataclasses import dataclass

from imatrix_runner.calibration.corpus import Corpus, stage
from imatrix_runner.engines.base import ChunkRange, CollectJob, CollectOptions, Piece
from imatrix_runner.errors import EngineError
from imatrix_runner.events import Event, Finished, Notice, Progress, Started
from imatrix_runner.files import require_space
from imatrix_runner.models.sources import Model
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.imatrix import matrix_bytes

STEP = "probe"
PAIR = 2
"""Chunks that are timed, after as many to warm up: files are read for the first time, clocks rise."""


@dataclass(frozen=True)
class Timing:
    """Seconds a chunk took: of the first pair, and of the one after it (None where the text ends before). ``load_seconds``:
    from the start of the engine to its first chunk."""

    first: float
    second: float | None
    load_seconds: float

    @property
    def seconds_per_chunk(self) -> float:
        return self.first if self.second is None else self.second

    @property
    def apart(self) -> float | None:
        """How far the two pairs differ, as a share of the second: what so short a probe may be wrong by, at least."""
        return abs(self.first - self.second) / self.second if self.second else None

    def expected(self, n_chunks: int) -> float:
        """Seconds for a job of so many chunks."""
        return self.load_seconds + n_chunks * self.seconds_per_chunk


def ranges(n_tokens: int, n_ctx: int) -> tuple[ChunkRange, ...]:
    """The pairs of chunks a text has room for. llama-imatrix starts at chunk K > 0 only if ``(K + 2) * n_ctx < n_tokens``."""
    first = (ChunkRange(0, PAIR),) if n_tokens >= PAIR * n_ctx else ()
    return (*first, ChunkRange(PAIR, PAIR)) if first and (PAIR + 2) * n_ctx < n_tokens else first


def probe(model: Model, corpus: Corpus, n_tokens: int, options: CollectOptions, session: Session) -> Timing:
    """Collect the first chunks of a text into a folder that is gone afterwards. Raises what the engine raises."""
    pairs = ranges(n_tokens, options.n_ctx)
    total = sum(pair.count for pair in pairs)
    pieces: list[Piece] = []

    def take(piece: Piece) -> bool:
        pieces.append(piece)
        piece.path.unlink()
        return len(pieces) < len(pairs)

    def tell(event: Event) -> None:
        if isinstance(event, (Progress, Notice)):
            session.sink(event)

    with scratch_folder() as folder:
        # The float64 sums of a pair, and the engine's unfinished ones beside it.
        require_space(folder, 4 * matrix_bytes(model), "timing a few chunks")
        text = folder / "calibration.txt"
        stage(corpus, text)
        session.sink(Started(STEP, f"timing {total} chunks", total, "chunks"))
        job = CollectJob(STEP, model.path, text, pairs, folder, options, STEP, None)
        session.engine.collect(job, tell, take)
    session.stop.check()
    if len(pieces) < len(pairs):
        raise EngineError(
            f"The {session.engine.name} engine ended early",
            f"{sum(piece.chunks.count for piece in pieces)} of {total} chunks were computed",
            "Try again, or leave the time out with --no-probe.",
        )
    each = [piece.seconds / piece.chunks.count for piece in pieces]
    timing = Timing(each[0], each[1] if len(each) > 1 else None, pieces[0].load_seconds)
    session.sink(Finished(STEP, "done", f"{timing.seconds_per_chunk:.2f} s a chunk", sum(piece.seconds for piece in pieces)))
    return timing
