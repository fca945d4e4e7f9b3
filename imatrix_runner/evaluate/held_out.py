"""Chooses what levels are measured on: the held-out text, the number of its chunks, and the disk that this takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.calibration.inspect.overlap import overlap_files, verdict
from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen, hash_files
from imatrix_runner.context.requests import MeasureRequest
from imatrix_runner.documents.corpus import Corpus, open_corpus, raw_warnings
from imatrix_runner.engines.files.logits import first_invalid_chunk, read_head, read_tokens
from imatrix_runner.engines.files.plausible import no_language_model
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.errors import InvalidDataError, NoSpaceError, UsageError, from_os_error
from imatrix_runner.evaluate.disk_budget import DiskFit, Extent, disk_limit, fit
from imatrix_runner.evaluate.precision import spread_chunks
from imatrix_runner.evaluate.set_aside import measuring_text
from imatrix_runner.events import Finished, Sink, Started, warning
from imatrix_runner.files import free_bytes, human_bytes, sha256
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.imatrix.collection_facts import CollectedFacts
from imatrix_runner.models.kind import require_measurable, vocabulary_size
from imatrix_runner.quantize.plan import MeasureStep, Plan
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.steps import MODEL_INPUT

REFERENCE = "reference.logits"
"""File name of the source's log-probabilities, next to the token scores while levels are compared with them."""

_LEAST_CHUNKS = 2


@dataclass(frozen=True)
class HeldOut:
    """The held-out text; ``text`` is None where levels are compared with a given file of log-probabilities, ``base``.
    ``overlap``: share of the text that also occurs in the calibration text, None if unknown. ``inputs``: fingerprints, by name,
    on which every figure depends.

    ``until``: the share of its mean below which a level's standard error ends its measurement
    (:mod:`imatrix_runner.evaluate.precision`), and ``order`` that of the text's chunks then; None and empty otherwise: all
    chunks of ``extent`` are measured, in the text's order.
    """

    name: str
    sha256: str
    text: Corpus | None
    base: Path | None
    options: CollectOptions
    extent: Extent
    fit: DiskFit
    overlap: float | None
    inputs: dict[str, str]
    until: float | None = None
    order: tuple[int, ...] = ()

    @property
    def whole_inputs(self) -> dict[str, str]:
        """What a level's figures depend on besides the level."""
        count = str(self.extent.n_chunks)
        if self.until is not None:
            count = f"until {self.until:g} of {len(self.order)}"
        return {**self.inputs, "chunks": count}

    def first(self, n_chunks: int) -> HeldOut:
        """The same with ``n_chunks`` of it only."""
        return replace(self, extent=replace(self.extent, n_chunks=n_chunks))

    def numbers(self, chunks: ChunkRange) -> tuple[int, ...]:
        """The numbers in the text of some chunks of a measurement; empty if they are the same."""
        return self.order[chunks.first : chunks.end]


def foresee(request: MeasureRequest, frozen: Frozen, plan: Plan, session: Session) -> MeasureStep:
    """Return what measuring the levels of a plan will take, before any of them is made.

    The room is what the levels will leave. Raises what :func:`choose_held_out` raises.
    """
    levels = [step for step in plan.levels if step.state != "fails"]
    with_baselines = request.baselines and plan.imatrix.present
    baselines = [step.facts.n_bytes or 0 for step in levels if with_baselines and not step.facts.needs_imatrix]
    try:
        stick = choose_held_out(request, frozen, len(levels), baselines, session, to_write=plan.new_bytes)
    except NoSpaceError as error:
        less = _limit(request, session, plan.new_bytes) < _limit(request, session, 0)
        first = f"the levels to be made take {human_bytes(plan.new_bytes)} first; then " if less else ""
        raise NoSpaceError(error.what, first + error.why, error.todo) from error
    extent = stick.extent
    return MeasureStep(stick.name, extent.n_chunks, extent.n_ctx, stick.fit.n_passes, stick.fit.n_bytes, bool(baselines))


def choose_held_out(
    request: MeasureRequest,
    frozen: Frozen,
    n_subjects: int,
    baselines: Sequence[int],
    session: Session,
    *,
    to_write: int | None = None,
) -> HeldOut:
    """Choose the text and how much of it to use. ``to_write``: bytes of levels that are still to be made; None if they exist,
    and then the text is also compared with the one that the imatrix was collected from.

    Raises :class:`InvalidDataError` for a text that is too short, or that the model was calibrated with.
    """
    require_measurable(frozen.model)
    options = replace(request.options, parse_special=False)
    _check_until(request, session)
    if request.base is not None:
        return _given(request.base, request, options, frozen, n_subjects, baselines, session, to_write or 0)
    corpus = open_corpus(request.text or measuring_text(session), role="held-out text", option="--text")
    warnings = raw_warnings(corpus, frozen.model.path, has_template=frozen.model.has_chat_template)
    for each in warnings if to_write is None else ():
        session.sink(warning(each))
    share = overlap(corpus, calibrations_of(session), session.sink) if to_write is None else None
    n_tokens = session.engine.count_tokens(frozen.model.path, corpus.path, parse_special=False, log=session.log("tokenize"))
    there = n_tokens // options.n_ctx
    if there < _LEAST_CHUNKS:
        raise InvalidDataError(
            f"{corpus.name} is too short to measure with",
            f"it has {n_tokens} tokens, and {_LEAST_CHUNKS} chunks of {options.n_ctx} need {_LEAST_CHUNKS * options.n_ctx}",
            "Give a longer --text, leave it out to use the shipped one, or use a smaller -c.",
        )
    n_chunks = min(there, request.chunks or there)
    if request.chunks is not None and there < request.chunks:
        session.sink(
            warning(f"{corpus.name} has only {there} chunks of {options.n_ctx} tokens, {request.chunks} were asked for.")
        )
    extent = Extent(
        n_vocab=vocabulary_size(frozen.model) or 0,
        n_ctx=options.n_ctx,
        n_chunks=n_chunks,
        at_once=options.chunks_at_once,
        n_levels=n_subjects + len(baselines),
        further_bytes=corpus.n_bytes,
    )
    session.engine.require_enough(n_chunks, options.n_ctx)
    whole = not session.engine.capabilities.scores_tokens
    space = fit(extent, _limit(request, session, to_write or 0), baselines, whole=whole)
    if whole and space.chunks < n_chunks:
        session.sink(
            warning(
                f"{space.chunks} of {n_chunks} chunks are measured: more do not fit into --max-disk, and llama-perplexity "
                "cannot continue with a second reference window. The embedded engine can."
            )
        )
        extent = replace(extent, n_chunks=space.chunks)
    named = {"text": f"sha256:{corpus.sha256}", "context": str(options.n_ctx)}
    order: tuple[int, ...] = ()
    if request.until_precise is not None:
        order = spread_chunks(n_chunks, extent.at_once)
        named["order"] = f"spread over {n_chunks} chunks, {extent.at_once} at once"
    inputs = _inputs(named, options, frozen, session)
    return HeldOut(
        corpus.name,
        corpus.sha256,
        corpus,
        None,
        options,
        extent,
        space,
        share,
        inputs,
        until=request.until_precise,
        order=order,
    )


def _check_until(request: MeasureRequest, session: Session) -> None:
    """Raise :class:`UsageError` where a measurement cannot end when it is precise."""
    if request.until_precise is not None and not session.engine.capabilities.scores_tokens:
        raise UsageError(
            "--until-precise needs the embedded engine",
            "llama-perplexity measures a text from its beginning, and keeps no scores of single tokens",
            "Leave it out, or use --engine embedded.",
        )


def _given(
    base: Path,
    request: MeasureRequest,
    options: CollectOptions,
    frozen: Frozen,
    n_subjects: int,
    baselines: Sequence[int],
    session: Session,
    to_write: int,
) -> HeldOut:
    """The user's file of log-probabilities, as llama-perplexity writes it."""
    try:
        head = read_head(base)
    except InvalidDataError as error:
        raise _useless(base, error.why) from error
    n_vocab = vocabulary_size(frozen.model)
    if head.n_vocab != n_vocab:
        raise InvalidDataError(
            f"{base.name} was not written from {frozen.model.name}",
            f"its vocabulary has {head.n_vocab} tokens, the model's {n_vocab}",
            "Give the one written from this model, or leave it out to have one made.",
        )
    takes_part = session.engine.capabilities.takes_part_of_reference
    if request.chunks is not None and not takes_part:
        raise UsageError(
            "--chunks has no effect with --kl-divergence-base here",
            "llama-perplexity compares with the whole file",
            "Leave --chunks out, or use --engine embedded.",
        )
    options = replace(options, n_ctx=head.n_ctx, n_batch=max(options.n_batch, head.n_ctx))
    checked = replace(head, n_chunks=min(head.n_chunks, options.chunks_at_once))
    extent = Extent(
        n_vocab=head.n_vocab,
        n_ctx=head.n_ctx,
        n_chunks=min(head.n_chunks, request.chunks or head.n_chunks),
        at_once=options.chunks_at_once,
        n_levels=n_subjects + len(baselines),
        given=True,
        further_bytes=0 if takes_part else checked.n_bytes,  # a copy of the part
    )
    space = fit(extent, _limit(request, session, to_write), baselines)
    (digest,) = hash_files([base], session)
    named = {"reference": f"sha256:{digest}", "context": str(head.n_ctx)}
    inputs = _inputs(named, options, frozen, session)
    return HeldOut(base.name, digest, None, base, options, extent, space, None, inputs)


def check_content(base: Path) -> None:
    """Raise :class:`InvalidDataError` for a given file of log-probabilities with contents that no model computes."""
    head = read_head(base)
    tokens = read_tokens(base, head)
    if tokens.min() < 0 or tokens.max() >= head.n_vocab:
        raise _useless(base, f"its text has tokens outside its vocabulary of {head.n_vocab}")
    wild = first_invalid_chunk(base, head)
    if wild is not None:
        raise _useless(base, f"its chunk {wild} has log-probabilities that are NaN or infinite")
    if why := no_language_model(base, head):
        raise _useless(base, f"the model that wrote it cannot be a language model: {why}")


def _useless(base: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{base} cannot be compared with",
        why,
        "Give a whole file as llama-perplexity writes it, or leave it out to have one made.",
    )


def _limit(request: MeasureRequest, session: Session, to_write: int) -> int:
    """Bytes that the measurement may use after ``to_write`` more are written. Files of an unfinished measurement count as
    free: they are used again or removed."""
    workspace = session.workspace
    unfinished = [workspace.evaluation / REFERENCE, *workspace.baselines.rglob("*.gguf")]
    taken = sum(path.stat().st_size for path in unfinished if path.is_file())
    return disk_limit(request.max_disk, free_bytes(workspace.root) + taken - to_write)


def _inputs(named: dict[str, str], options: CollectOptions, frozen: Frozen, session: Session) -> dict[str, str]:
    return {
        MODEL_INPUT: frozen.fingerprint,
        **named,
        "options": fingerprint_of(options, "figures"),
        "engine": session.engine.arithmetic(),
    }


def check_text(request: MeasureRequest, calibration: Path | None, sink: Sink) -> None:
    """Check the held-out text before anything is made; ``calibration``: the text of the imatrix, if that is known. Raises
    :class:`InvalidDataError`."""
    if request.base is None:
        corpus = open_corpus(request.text or resource(HELD_OUT_TEXT), role="held-out text", option="--text")
        overlap(corpus, [calibration] if calibration is not None else [], sink)


def overlap(corpus: Corpus, calibrations: Sequence[Path], sink: Sink) -> float | None:
    """Largest share of the text that also occurs in one of the calibration texts; None without any. Raises
    :class:`InvalidDataError` if it is too large."""
    worst: float | None = None
    for calibration in calibrations:
        sink(Started("overlap", f"comparing {corpus.name} with {calibration.name}"))
        found = overlap_files(calibration, corpus.path)
        sink(Finished("overlap", "done", f"{found.share:.1%} in common"))
        how_much = verdict(found)
        if how_much == "void":
            raise InvalidDataError(
                f"{corpus.name} cannot say how good the levels are",
                f"{found.share:.0%} of it also occurs in {calibration.name}, from which the imatrix was collected, "
                "so the figures would flatter the levels",
                "Give another --text, or leave it out to use the shipped one.",
            )
        if how_much == "some":
            sink(warning(f"{found.share:.1%} of {corpus.name} also occurs in {calibration.name}, for example: {found.example}"))
        worst = max(worst or 0.0, found.share)
    return worst


def calibrations_of(session: Session) -> list[Path]:
    """The calibration texts of this workspace's matrices, those that are still there and unchanged."""
    found: dict[Path, None] = {}
    for record in session.journal.of_kind("imatrix").values():
        calibration = record.facts_as(CollectedFacts).calibration
        if calibration is None:
            continue
        path = Path(calibration.path)
        try:
            if path.is_file() and sha256(path) == calibration.sha256:
                found[path] = None
            else:
                session.sink(warning(f"{path.name} is gone or was changed, so its overlap with the held-out text is unknown."))
        except OSError as error:
            raise from_os_error(error, "reading the calibration text", path) from error
    return list(found)
