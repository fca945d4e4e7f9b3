"""Collecting an imatrix in chunk ranges that add up exactly, whichever engine computes them.

llama-imatrix's own mid-run saves are torn, so a range is only ever taken from a run that ended well; each is a complete
file of its own. The final matrix is their sum in float64, in order: an interrupted collection and an undisturbed one go
through the same ranges and therefore end with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.calibration.corpus import Corpus, stage
from imatrix_runner.engines.base import ChunkRange, Collected, CollectJob, CollectOptions, Engine
from imatrix_runner.errors import InvalidDataError, NoSpaceError
from imatrix_runner.events import Event, Finished, Metric, Notice, Progress, Saved, Sink, Started, warning
from imatrix_runner.files import human_seconds, require_space, sha256, stamp, sync_file
from imatrix_runner.imatrix.formats import prepare_gguf, read
from imatrix_runner.imatrix.matrix import Matrix, add, held, problems
from imatrix_runner.journal import Journal, Output, Record, differences, outputs_intact
from imatrix_runner.workspace import Workspace

STEP = "imatrix"

# For the size of ranges only, where it must be the same in every run and so may not be measured: what starting and reading
# cost, and what machines compute, in orders of magnitude.
_START_SECONDS = 0.3
_LOAD_BYTES_PER_SECOND = 1.5e9
_CPU_FLOPS = 2e11
_GPU_FLOPS = 2e13
_RELOAD_SHARE = 0.03
_LEAST_RANGE = 10

# Files of ranges read at once; beyond that their sum so far is kept in memory.
_MOST_OPEN = 64


@dataclass(frozen=True)
class ChunkPlan:
    """The ranges to compute, in order; ``snapshots``: after how many chunks a whole intermediate file is left."""

    ranges: tuple[ChunkRange, ...]
    snapshots: tuple[int, ...]
    n_tokens: int

    @property
    def n_chunks(self) -> int:
        return sum(piece.count for piece in self.ranges)

    def describe(self) -> str:
        return ",".join(f"{piece.first}-{piece.end}" for piece in self.ranges)


def range_chunks(n_params: int, n_bytes: int, options: CollectOptions, *, gpu: bool) -> int:
    """How many chunks a range should have so that loading the model costs about 3 % of computing it.

    Depends only on the model and the options, never on a clock. ``n_params`` are those active per token.
    """
    load = _START_SECONDS + n_bytes / _LOAD_BYTES_PER_SECOND
    chunk = 2 * n_params * options.n_ctx / (_GPU_FLOPS if gpu else _CPU_FLOPS)
    at_once = max(1, options.n_batch // options.n_ctx)
    return math.ceil(max(_LEAST_RANGE, load / _RELOAD_SHARE / chunk) / at_once) * at_once


def plan_chunks(
    n_tokens: int, n_ctx: int, *, first: int = 0, limit: int | None = None, range_size: int, save_frequency: int = 0
) -> ChunkPlan:
    """Cut the text into ranges.

    ``first`` chunks are skipped, at most ``limit`` computed. llama-imatrix starts at chunk K > 0 only if
    ``(K + 2) * n_ctx < n_tokens``, so the tail joins the range before it. Raises :class:`InvalidDataError` if the text is
    too short.
    """
    in_text = n_tokens // n_ctx

    def can_start(chunk: int) -> bool:
        return chunk == 0 or (chunk + 2) * n_ctx < n_tokens

    if in_text < 2 or not can_start(first):
        skipped = f", of which {first} are to be skipped" if first else ""
        raise InvalidDataError(
            "The calibration text is too short",
            f"it has {n_tokens} tokens, {in_text} chunks of {n_ctx}{skipped}; at least 2 must remain",
            "Give a longer text with -f, a smaller context with -c, or a smaller --chunk.",
        )
    count = in_text - first if limit is None else min(limit, in_text - first)
    marks = set(range(range_size, count, range_size))
    snapshots = (
        [done for done in range(save_frequency, count, save_frequency) if can_start(first + done)] if save_frequency else []
    )
    starts = sorted({0, *(mark for mark in marks if can_start(first + mark)), *snapshots})
    ends = [*starts[1:], count]
    ranges = tuple(ChunkRange(first + begin, end - begin) for begin, end in zip(starts, ends, strict=True))
    return ChunkPlan(ranges, tuple(snapshots), n_tokens)


@dataclass(frozen=True)
class CollectRequest:
    """A matrix to make: of which model and text, how, cut how, and where it goes. ``n_bytes``: about the size of its file;
    ``check_unchanged`` raises when the model is no longer the one of ``inputs``."""

    model: Path
    corpus: Corpus
    options: CollectOptions
    plan: ChunkPlan
    out: Path
    inputs: Mapping[str, str]
    n_bytes: int
    check_unchanged: Callable[[], None]


@dataclass(frozen=True)
class CollectResult:
    """The finished matrix, and what making it measured; ``ppl`` is the perplexity of ``ppl_chunks`` of its chunks."""

    matrix: Matrix
    seconds: float
    load_seconds: float
    ppl: float | None
    ppl_chunks: int


class _RunningPerplexity:
    """Joins the perplexities of ranges: each chunk counts equally many tokens, so their logarithms average."""

    def __init__(self) -> None:
        self.chunks, self._nll = 0, 0.0

    def with_range(self, chunks: int, ppl: float | None) -> float | None:
        if ppl is None or not chunks or not ppl > 0:
            return None
        return math.exp((self._nll + chunks * math.log(ppl)) / (self.chunks + chunks))

    def close_range(self, chunks: int, ppl: float | None) -> None:
        if ppl is not None and ppl > 0:
            self.chunks += chunks
            self._nll += chunks * math.log(ppl)

    @property
    def value(self) -> float | None:
        return math.exp(self._nll / self.chunks) if self.chunks else None

    def summary(self, n_chunks: int) -> list[str]:
        """``PPL 114.4703``, and of how many chunks where that is not all of them."""
        return [_note(self.value) + (f" over {self.chunks} chunks" if self.chunks < n_chunks else "")] if self.chunks else []


def collect(request: CollectRequest, engine: Engine, workspace: Workspace, journal: Journal, sink: Sink) -> CollectResult:
    """Compute every range not yet there, verify each and sum them; writing ``request.out`` is the caller's."""
    plan = request.plan
    text = workspace.parts / "calibration.txt"
    sink(Started(STEP, f"imatrix, {plan.n_chunks} chunks", plan.n_chunks, "chunks"))
    perplexity = _RunningPerplexity()
    seconds = load_seconds = 0.0
    done = reused = 0
    parts: list[Matrix] = []
    for piece in plan.ranges:
        step = f"{STEP}-{piece.first:06d}-{piece.end:06d}"
        part = workspace.parts / f"{step}.gguf"
        kept = _kept(step, part, request, workspace, journal, piece)
        if kept is not None:
            matrix, collected = kept
            reused += piece.count
        else:
            if not text.exists() or sha256(text) != request.corpus.sha256:
                stage(request.corpus, text)
            job = CollectJob(step, request.model, text, part, piece, request.options, workspace.log(STEP))
            try:
                collected = engine.collect(job, _relay(sink, done, plan.n_chunks, perplexity))
            except NoSpaceError:
                require_space(part, request.n_bytes, "the imatrix")  # the same, with figures
                raise
            request.check_unchanged()
            matrix = _check(part, piece, request)
            _record(step, part, request, workspace, journal, collected)
        seconds += collected.seconds
        load_seconds += collected.load_seconds
        perplexity.close_range(collected.ppl_chunks, collected.ppl)
        done += piece.count
        parts.append(matrix)
        if len(parts) == _MOST_OPEN:
            parts = [held(add(parts))]
        sink(Progress(STEP, done, plan.n_chunks, _note(perplexity.value)))
        if done in plan.snapshots:
            _snapshot(_named(add(parts), request), done, request, workspace, journal, sink)
    result = _named(add(parts), request)
    _advise(plan, seconds, load_seconds, sink)
    told = [f"{plan.n_chunks} chunks", f"{len(result.entries)} entries"]
    told += [f"{reused} chunks kept"] if reused else []
    told += perplexity.summary(plan.n_chunks)
    sink(Finished(STEP, "done", ", ".join(told), seconds))
    return CollectResult(result, seconds, load_seconds, perplexity.value, perplexity.chunks)


def _snapshot(matrix: Matrix, done: int, request: CollectRequest, workspace: Workspace, journal: Journal, sink: Sink) -> None:
    """Leave the whole matrix of the first ``done`` chunks beside the final file; one of ours may be replaced, no other."""
    final = request.out.with_name(f"{request.out.name}.at_{done}")
    step = f"snapshot {final}"
    record = journal.get(step)
    if record is not None and not differences(record, request.inputs) and outputs_intact(record, workspace.root):
        return
    part = prepare_gguf(matrix, final)
    output = Output(workspace.name_of(final), stamp(part))
    journal.conclude(step, Record.now(request.inputs, [output], f"a snapshot after {done} chunks", 0.0), [(part, final)])
    sink(Saved(str(final), f"imatrix of the first {done} chunks", output.stamp.size))


def clean_parts(workspace: Workspace, journal: Journal) -> None:
    """Forget the ranges once the final file is recorded: they have served."""
    for step in [name for name in journal.steps() if name.startswith(f"{STEP}-")]:
        journal.forget(step)
    if workspace.parts.is_dir():
        for path in workspace.parts.iterdir():
            path.unlink()
        workspace.parts.rmdir()


def _kept(
    step: str, part: Path, request: CollectRequest, workspace: Workspace, journal: Journal, piece: ChunkRange
) -> tuple[Matrix, Collected] | None:
    """A range that an earlier run finished, and what it measured; it took no time of this run."""
    record = journal.get(step)
    if record is None or differences(record, request.inputs) or not outputs_intact(record, workspace.root):
        return None
    ppl, chunks = record.facts.get("ppl"), record.facts.get("ppl_chunks")
    if not isinstance(ppl, float) or not isinstance(chunks, int):
        ppl, chunks = None, 0
    return _check(part, piece, request), Collected(0.0, 0.0, ppl, chunks)


def _record(
    step: str, part: Path, request: CollectRequest, workspace: Workspace, journal: Journal, collected: Collected
) -> None:
    sync_file(part)
    name = str(part.relative_to(workspace.root))
    facts: dict[str, object] = {"ppl": collected.ppl, "ppl_chunks": collected.ppl_chunks}
    journal.record(
        step, Record.now(request.inputs, [Output(name, stamp(part))], "part of the imatrix", collected.seconds, facts=facts)
    )


def _check(part: Path, piece: ChunkRange, request: CollectRequest) -> Matrix:
    """A range counts only if its file is whole: the tool ignores write errors and still exits with 0."""
    try:
        matrix = read(part).matrix
        bad = problems(matrix)
    except InvalidDataError as error:
        bad = [error.why]
    # A weight used twice in one graph counts twice, so whole multiples are right too.
    if not bad and (matrix.chunk_count < piece.count or matrix.chunk_count % piece.count):
        bad = [f"it holds {matrix.chunk_count} chunks instead of {piece.count}"]
    if not bad and matrix.chunk_size != request.options.n_ctx:
        bad = [f"its chunks have {matrix.chunk_size} tokens instead of {request.options.n_ctx}"]
    if bad:
        require_space(part, request.n_bytes, "the imatrix")
        part.unlink(missing_ok=True)
        raise InvalidDataError(
            f"The imatrix of chunks {piece.first} to {piece.end - 1} is not usable",
            "; ".join(bad[:3]),
            "If it holds NaN, the model overflows: try its BF16 file. Otherwise check the disk and run the same command again.",
        )
    return matrix


def _named(matrix: Matrix, request: CollectRequest) -> Matrix:
    """With the text's own name: ranges were read from a staged copy, and a user's folders are nobody's business."""
    return Matrix(matrix.entries, matrix.chunk_size, matrix.chunk_count, (request.corpus.name,))


def _relay(sink: Sink, base: int, total: int, perplexity: _RunningPerplexity) -> Sink:
    """Turns the events of one range into those of the whole collection."""
    last: float | None = None

    def relay(event: Event) -> None:
        nonlocal last
        if isinstance(event, Metric) and event.name == "ppl":
            last = event.value
        elif isinstance(event, Progress):
            sink(Progress(STEP, base + event.done, total, _note(perplexity.with_range(int(event.done), last))))
        elif isinstance(event, (Notice, Saved)):
            sink(event)

    return relay


def _note(ppl: float | None) -> str:
    return f"PPL {ppl:.4f}" if ppl is not None else ""


def _advise(plan: ChunkPlan, seconds: float, load_seconds: float, sink: Sink) -> None:
    if len(plan.ranges) > 1 and seconds > 60 and load_seconds > _RELOAD_SHARE * seconds:
        share = 100 * load_seconds / seconds
        sink(
            warning(
                f"Loading the model for each of {len(plan.ranges)} ranges took {human_seconds(load_seconds)}, {share:.0f} % of "
                "the time; a larger --output-frequency saves most of it, at the price of losing more when interrupted."
            )
        )
