"""Collecting an imatrix in chunk ranges that add up exactly, whichever engine computes them.

The engine gives a complete file for every range; each is checked here and added, in float64 and in order, to the one
checkpoint, which alone decides what comes next. So an interrupted and an uninterrupted collection go through the same ranges,
add the same numbers in the same order, stop at the same chunk, and end with the same bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.documents.corpus import Corpus, stage
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, CollectJob, CollectOptions, Perplexity
from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError
from imatrix_runner.events import Event, Finished, Metric, Notice, Progress, Saved, Sink, Started, info, warning
from imatrix_runner.files import human_seconds, publish, require_space, sha256, stamp
from imatrix_runner.imatrix import checkpoint as checkpoints
from imatrix_runner.imatrix.checkpoint import Checkpoint
from imatrix_runner.imatrix.chunks import RELOAD_SHARE, ChunkPlan, count_chunks, counted_tokens
from imatrix_runner.imatrix.convergence import Point, Uncovered, converged, estimate, point, uncovered
from imatrix_runner.imatrix.formats import prepare_gguf, read
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry, add, as_collected, entry_problem
from imatrix_runner.journal import Journal, StepOutput, StepRecord, differences, outputs_intact
from imatrix_runner.steps import step_id
from imatrix_runner.workspace import Workspace

STEP = "imatrix"

_TEXT = "calibration.txt"
_CHECKPOINT = "checkpoint.gguf"

CHEAP_CURVE_BYTES = 256 << 20
"""Up to this size of a matrix the convergence curve is recorded even if it was not requested."""

_MOST_SHOWN = 5


@dataclass(frozen=True)
class CollectRequest:
    """A matrix to collect: the model, the text, the options, the plan of chunks, and the output path.

    ``inputs`` name everything it depends on; ``n_bytes`` is about the size of its file; ``check_unchanged`` raises when the
    model is no longer the one of ``inputs``. ``tolerance`` ends it before the plan's chunks once the matrix no longer moves by
    more; with ``least_tokens`` it then continues until every expert saw that many tokens, or the text ends. ``expected``: the
    entries that the plan of the levels assumes.
    """

    model: Path
    corpus: Corpus
    options: CollectOptions
    plan: ChunkPlan
    out: Path
    inputs: Mapping[str, str]
    n_bytes: int
    check_unchanged: Callable[[], None]
    tolerance: float | None = None
    least_tokens: int = 0
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CollectResult:
    """The finished matrix, and what was measured while collecting it. ``stopped`` is why it ended: ``chunks`` (all requested
    ones are done), ``converged``, ``covered`` (after that every expert was reached) or ``text`` (the text ended before
    that). ``processors``: as in :class:`~imatrix_runner.imatrix.checkpoint.Checkpoint`."""

    matrix: Matrix
    ranges: tuple[ChunkRange, ...]
    stopped: str
    seconds: float
    load_seconds: float
    perplexity: Perplexity
    curve: tuple[Point, ...]
    processors: tuple[str, ...] = ()

    @property
    def chunks(self) -> int:
        return count_chunks(self.ranges)


def collect(request: CollectRequest, engine: Engine, workspace: Workspace, journal: Journal, sink: Sink) -> CollectResult:
    """Compute every range that is not in the checkpoint yet. The caller writes ``request.out``.

    The entries of the result are read from the checkpoint, so it must stay until they were written.
    """
    n_chunks = request.plan.n_chunks
    sink(Started(STEP, f"imatrix, {n_chunks} chunks", n_chunks, "chunks"))
    work = _Collection(request, workspace, journal, sink)
    kept = work.checkpoint.chunks
    if not work.over:
        work.compute(engine)
    state = work.checkpoint
    assert state.matrix is not None
    if engine.capabilities.loads_each_range:
        _advise(state, sink)
    work.warn_uncovered()
    result = CollectResult(
        work.named(state.matrix),
        state.done,
        work.stopped,
        state.seconds,
        state.load_seconds,
        state.perplexity,
        state.curve,
        state.processors,
    )
    sink(Finished(STEP, "done", ", ".join(_summary(result, request, kept)), state.seconds))
    return result


def clean_parts(workspace: Workspace) -> None:
    """Remove the checkpoint and the ranges, which are not needed once the final file is recorded."""
    if workspace.parts.is_dir():
        shutil.rmtree(workspace.parts)


class _Collection:
    """A collection in progress: the checkpoint as it is on the disk, and what follows from it."""

    def __init__(self, request: CollectRequest, workspace: Workspace, journal: Journal, sink: Sink) -> None:
        self._request, self._workspace, self._journal, self._sink = request, workspace, journal, sink
        self._path = workspace.parts / _CHECKPOINT
        self._inputs = dict(request.inputs)
        if request.plan.snapshots:
            # Snapshots are written on the way, next to the output: a collection that began for another path wrote them there.
            self._inputs["snapshots"] = workspace.name_of(request.out)
        self.checkpoint, trouble = checkpoints.resume(self._path, self._inputs, request.plan.ranges)
        if trouble:
            sink(info(f"The unfinished imatrix in the workspace cannot be continued and starts again ({trouble})"))
        self._tidy(everything=bool(trouble))
        if self.checkpoint.done:
            self._leave_snapshot()  # a kill may have come between the checkpoint and the snapshot

    def _tidy(self, *, everything: bool) -> None:
        """Remove the ranges that are in the checkpoint; with ``everything``, all files of another collection."""
        if everything:
            clean_parts(self._workspace)
        for chunks in self.checkpoint.done:
            (self._workspace.parts / chunks.file_name).unlink(missing_ok=True)

    @property
    def over(self) -> bool:
        return bool(self.stopped)

    @property
    def stopped(self) -> str:
        """Why the collection is over (see :class:`CollectResult`); empty while it is not. Follows from the checkpoint."""
        plan, state = self._request.plan, self.checkpoint
        tolerance = self._request.tolerance
        chunks = converged(state.curve, tolerance) if tolerance is not None else None
        enough = plan.n_chunks if chunks is None else min(chunks, plan.n_chunks)
        if state.chunks < enough:
            return ""
        if self.uncovered():
            return "text" if len(state.done) == len(plan.ranges) else ""
        if state.chunks > enough:
            return "covered"
        return "chunks" if chunks is None else "converged"

    def uncovered(self) -> list[Uncovered]:
        matrix, least = self.checkpoint.matrix, self._request.least_tokens
        return uncovered(matrix, least) if matrix is not None and least else []

    def compute(self, engine: Engine) -> None:
        """Have the engine compute the remaining ranges until the collection is over."""
        request, parts = self._request, self._workspace.parts
        text = parts / _TEXT
        if not text.exists() or sha256(text) != request.corpus.sha256:
            stage(request.corpus, text)
        left = request.plan.ranges[len(self.checkpoint.done) :]
        fingerprint = checkpoints.fingerprint(self._inputs)
        log = self._workspace.log(STEP)
        job = CollectJob(STEP, request.model, text, left, parts, request.options, fingerprint, log)
        try:
            engine.collect(job, self._relay(), self._take)
        except NoSpaceError:
            require_space(self._path, 2 * request.n_bytes, "the imatrix")  # the same, with figures
            raise
        if not self.over:
            raise EngineError(
                f"The {engine.name} engine ended early",
                f"{self.checkpoint.chunks} of {request.plan.n_chunks} chunks are done",
                f"Run the same command again: it continues. Full log: {log}",
            )

    def _take(self, finished: CollectedRange) -> bool:
        """Check a finished range and add it to the checkpoint; return whether to continue."""
        request = self._request
        request.check_unchanged()
        expected = request.plan.ranges[len(self.checkpoint.done)]
        if finished.chunks != expected:
            raise EngineError(
                "The engine returned ranges in the wrong order",
                f"chunks {finished.chunks.first} to {finished.chunks.end - 1} came where {expected.first} should have begun",
                "Run the same command again: it continues.",
            )
        self._include(finished)
        finished.path.unlink(missing_ok=True)
        chunks, total = self.checkpoint.chunks, request.plan.n_chunks
        self._sink(Progress(STEP, chunks, max(chunks, total), _note(self.checkpoint.perplexity)))
        self._leave_snapshot()
        return not self.over

    def _include(self, finished: CollectedRange) -> None:
        """Replace the old checkpoint with the next one. Neither stays open, as Windows requires."""
        matrix, errors = self._examine(finished)
        if not self.checkpoint.done:
            self._warn_missing(matrix)
        chunks = self.checkpoint.chunks + finished.chunks.count
        following = self.checkpoint.with_range(finished, matrix, point(chunks, errors))
        part = checkpoints.prepare(following, self._path)
        self.checkpoint = replace(following, matrix=None)
        del following, matrix
        publish(part, self._path)
        self.checkpoint = replace(self.checkpoint, matrix=read(self._path, exact=True).matrix)

    def _examine(self, finished: CollectedRange) -> tuple[Matrix, list[tuple[str, float]]]:
        """Check that a range's file is complete: llama-imatrix ignores write errors and still exits with 0.

        The same pass over its entries returns the estimated errors of the sum with it
        (:mod:`imatrix_runner.imatrix.convergence`).
        """
        request, before = self._request, self.checkpoint.matrix
        watched = before is not None and (request.tolerance is not None or request.n_bytes <= CHEAP_CURVE_BYTES)
        chunks = self.checkpoint.chunks + finished.chunks.count
        bad: list[str] = []
        errors: list[tuple[str, float]] = []
        matrix: Matrix | None = None
        try:
            file = read(finished.path, exact=True)
            matrix = as_collected(file.matrix, finished.chunks.count, request.options.n_ctx)
            # A legacy file counts no tokens: the program's output shows that all chunks were computed.
            foreign = _miscounted(matrix, finished.chunks, request.options) if file.format == "gguf" else []
            if before is not None and not foreign:
                add([before, matrix])  # raises if they cannot be added
            for name in matrix.entries:
                entry = matrix.entries[name]
                if problem := entry_problem(name, entry):
                    bad.append(problem)
                elif watched and not foreign and before is not None and name in before.entries:
                    old = before.entries[name]
                    new = MatrixEntry(old.sums + entry.sums, old.counts + entry.counts)
                    errors.append((name, estimate(old, new, chunks, finished.chunks.count)))
            bad += foreign
        except InvalidDataError as error:
            bad.append(error.why)
        if bad or matrix is None:
            require_space(finished.path, request.n_bytes, "the imatrix")
            finished.path.unlink(missing_ok=True)
            raise InvalidDataError(
                f"The imatrix of chunks {finished.chunks.first} to {finished.chunks.end - 1} is not usable",
                "; ".join(bad[:3]),
                "If it holds NaN, the model overflows: try its BF16 file. Otherwise check the disk and run the same command "
                "again.",
            )
        return matrix, errors

    def _warn_missing(self, matrix: Matrix) -> None:
        """Warn, after the first range, of tensors that unexpectedly get no data: the model's header does not show it."""
        missing = sorted(self._request.expected - matrix.entries.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            self._sink(
                warning(
                    f"llama.cpp computes this model without {missing[0]}{more}, so the imatrix will have no data there: levels "
                    "whose types need it (Q2_K_S, IQ3_XXS and smaller) will fail. To avoid that, press Ctrl-C and run the "
                    "command again with --uncovered q4_k; what is collected is kept."
                )
            )

    def _leave_snapshot(self) -> None:
        """Write the whole matrix so far next to the final file, where the plan has a snapshot. Only an own snapshot is
        replaced."""
        request, state = self._request, self.checkpoint
        if state.chunks not in request.plan.snapshots or state.matrix is None:
            return
        final = request.out.with_name(f"{request.out.name}.at_{state.chunks}")
        step = step_id("snapshot", str(final))
        record = self._journal.get(step)
        root = self._workspace.root
        if record is not None and not differences(record, request.inputs) and outputs_intact(record, root):
            return
        part = prepare_gguf(self.named(state.matrix), final)
        output = StepOutput(self._workspace.name_of(final), stamp(part))
        reason = f"a snapshot after {state.chunks} chunks"
        self._journal.conclude(step, StepRecord.now(request.inputs, [output], reason, 0.0), [(part, final)])
        self._sink(Saved(str(final), f"imatrix of the first {state.chunks} chunks", output.stamp.size))

    def named(self, matrix: Matrix) -> Matrix:
        """Return the matrix with the text's own name: ranges were read from a staged copy, and the user's folders stay
        private."""
        return replace(matrix, datasets=(self._request.corpus.name,))

    def _relay(self) -> Sink:
        """Return a sink that turns the job's events into those of the whole collection, which may have begun earlier."""
        base, before = self.checkpoint.chunks, self.checkpoint.perplexity
        total, n_tokens = self._request.plan.n_chunks, self._request.options.scored_tokens
        ppl = Perplexity()
        last: float | None = None

        def relay(event: Event) -> None:
            nonlocal last, ppl
            if isinstance(event, Metric) and event.name == "ppl":
                last = event.value
            elif isinstance(event, Progress):
                if last is not None:
                    ppl = before + _as_sums(last, int(event.done) * n_tokens)
                done = base + event.done
                note = ", ".join(filter(None, (_note(ppl), event.note)))
                self._sink(Progress(STEP, done, max(done, total), note))
            elif isinstance(event, (Notice, Saved)):
                self._sink(event)

        return relay

    def warn_uncovered(self) -> None:
        """Warn of experts that the text was too short for."""
        found = self.uncovered()
        if not found:
            return
        # The tensors of one layer's experts are routed together: the first one stands for all equal ones.
        alike = {(item.tensor.rpartition(".")[0], item.experts, item.tokens): item for item in reversed(found)}
        shown = sorted(alike.values(), key=lambda item: found.index(item))
        more = f"; and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
        self._sink(
            warning(
                f"The text ended before every expert saw {self._request.least_tokens} tokens: "
                + "; ".join(item.describe() for item in shown[:_MOST_SHOWN])
                + more
            )
        )


def _miscounted(matrix: Matrix, chunks: ChunkRange, options: CollectOptions) -> list[str]:
    """Return why a range's file does not match its chunks; empty if it does."""
    if matrix.chunk_size != options.n_ctx:
        return [f"its chunks have {matrix.chunk_size} tokens instead of {options.n_ctx}"]
    # Experts see what is routed to them; every token goes through the others.
    dense = [int(matrix.counts(name)[0]) for name in matrix.entries if matrix.counts(name).size == 1]
    expected = counted_tokens(chunks.count, options)
    if dense and not any(max(dense) and max(dense) % tokens == 0 for tokens in expected):
        return [f"it counted {max(dense)} tokens instead of {max(expected, default=0)}"]
    return [] if matrix.entries else ["it has no entries"]


def _as_sums(ppl: float, tokens: int) -> Perplexity:
    return Perplexity(math.log(ppl) * tokens, None, tokens) if 0 < ppl < math.inf else Perplexity()


def _note(perplexity: Perplexity) -> str:
    return f"PPL {perplexity.value:.4f}" if perplexity.value is not None else ""


def _summary(result: CollectResult, request: CollectRequest, kept: int) -> list[str]:
    """Return the phrases of the line that reports the end of the collection."""
    phrases = [f"{result.chunks} chunks", f"{len(result.matrix.entries)} entries"]
    phrases += [f"{kept} chunks kept"] if kept else []
    phrases += _perplexity(result.perplexity, result.chunks, request.options)
    if request.tolerance is not None:
        chunks = converged(result.curve, request.tolerance)
        how = f"converged after {chunks} of {request.plan.n_chunks} chunks" if chunks is not None else "not converged"
        for last in [item for item in result.curve if chunks is None or item.chunks == chunks][-1:]:
            how += f": worst {last.worst:.3f} ({last.tensor}), median {last.median:.3f}"
        phrases.append(how)
    if request.least_tokens and result.stopped != "text":
        phrases.append(f"every expert saw at least {request.least_tokens} tokens")
    return phrases


def _perplexity(perplexity: Perplexity, n_chunks: int, options: CollectOptions) -> list[str]:
    """Return ``PPL 10.5300 +/- 0.0123``, with the number of chunks if it is not of all of them."""
    if perplexity.value is None:
        return []
    error = f" +/- {perplexity.error:.4f}" if perplexity.error is not None else ""
    chunks = perplexity.tokens // options.scored_tokens
    return [_note(perplexity) + error + (f" over {chunks} chunks" if chunks < n_chunks else "")]


def _advise(state: Checkpoint, sink: Sink) -> None:
    if len(state.done) > 1 and state.seconds > 60 and state.load_seconds > RELOAD_SHARE * state.seconds:
        share = 100 * state.load_seconds / state.seconds
        sink(
            warning(
                f"Loading the model for each of {len(state.done)} ranges took {human_seconds(state.load_seconds)}, "
                f"{share:.0f} % of the time; a larger --output-frequency saves most of it, but loses more when "
                "interrupted."
            )
        )
