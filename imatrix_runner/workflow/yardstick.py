"""What levels are measured with: a text nothing was calibrated with, so many chunks of it, and the engine that computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.calibration.corpus import Corpus, open_corpus, raw_warnings
from imatrix_runner.calibration.overlap import overlap_files, verdict
from imatrix_runner.engines.base import CollectOptions
from imatrix_runner.engines.binaries.perplexity import require_enough
from imatrix_runner.engines.logits_file import first_wild_chunk, read_head, read_tokens
from imatrix_runner.engines.plausible import no_language_model
from imatrix_runner.errors import InvalidDataError, NoSpaceError, UsageError, from_os_error
from imatrix_runner.evaluate.passes import Extent, Fit, disk_limit, fit
from imatrix_runner.events import Finished, Sink, Started, warning
from imatrix_runner.files import free_bytes, human_bytes, sha256
from imatrix_runner.models.kind import require_measurable, vocabulary_size
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.workflow.choice import EMBEDDED
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.imatrix import STEP as IMATRIX_STEP
from imatrix_runner.workflow.plan import MeasureStep, Plan
from imatrix_runner.workflow.request import MeasureRequest
from imatrix_runner.workflow.set_aside import measuring_text
from imatrix_runner.workflow.source import Frozen, hash_files

REFERENCE = "reference.logits"
"""The source's log-probabilities, beside the scored tokens while levels are compared with them."""

_LEAST_CHUNKS = 2


@dataclass(frozen=True)
class Yardstick:
    """``text`` is None where a file of log-probabilities, ``base``, is compared with. ``overlap``: share of the text that
    stands in the calibration text too, None where that is not known. ``inputs``: the named fingerprints of every figure."""

    name: str
    sha256: str
    text: Corpus | None
    base: Path | None
    options: CollectOptions
    extent: Extent
    fit: Fit
    overlap: float | None
    inputs: dict[str, str]


def foresee(request: MeasureRequest, frozen: Frozen, plan: Plan, session: Session) -> MeasureStep:
    """Return what measuring the levels of a plan will take, before any of them is made.

    Raises what :func:`choose_yardstick` raises; room is what the levels will leave.
    """
    levels = [step for step in plan.levels if step.state != "fails"]
    with_twins = request.twins and plan.imatrix.present
    twins = [step.facts.n_bytes or 0 for step in levels if with_twins and not step.facts.needs_imatrix]
    try:
        stick = choose_yardstick(request, frozen, len(levels), twins, session, to_write=plan.new_bytes)
    except NoSpaceError as error:
        less = _limit(request, session, plan.new_bytes) < _limit(request, session, 0)
        first = f"the levels to be made take {human_bytes(plan.new_bytes)} first; then " if less else ""
        raise NoSpaceError(error.what, first + error.why, error.todo) from error
    extent = stick.extent
    return MeasureStep(stick.name, extent.n_chunks, extent.n_ctx, stick.fit.n_passes, stick.fit.n_bytes, bool(twins))


def choose_yardstick(
    request: MeasureRequest,
    frozen: Frozen,
    n_subjects: int,
    twins: Sequence[int],
    session: Session,
    *,
    to_write: int | None = None,
) -> Yardstick:
    """Choose the text and how much of it. ``to_write``: bytes of levels that are still to be made; None: they are
    there, and the text is also compared with what the imatrix was collected from.

    Raises :class:`InvalidDataError` for a text that is too short, or that the model was calibrated with.
    """
    require_measurable(frozen.model)
    options = replace(request.options, parse_special=False)
    if request.base is not None:
        return _given(request.base, request, options, frozen, n_subjects, twins, session, to_write or 0)
    corpus = open_corpus(request.text or measuring_text(session), role="held-out text", option="--text")
    told = raw_warnings(corpus, frozen.model.path, has_template=frozen.model.has_chat_template)
    for each in told if to_write is None else ():
        session.sink(warning(each))
    share = overlap(corpus, _calibrations(session), session.sink) if to_write is None else None
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
        n_levels=n_subjects + len(twins),
        further_bytes=corpus.n_bytes,
    )
    whole = session.engine.name != EMBEDDED
    if whole:
        require_enough(n_chunks, options.n_ctx)
    space = fit(extent, _limit(request, session, to_write or 0), twins, whole=whole)
    if whole and space.chunks < n_chunks:
        session.sink(
            warning(
                f"{space.chunks} of {n_chunks} chunks are measured: more do not fit into --max-disk, and llama-perplexity "
                "cannot go on in a second pass. The embedded engine can."
            )
        )
        extent = replace(extent, n_chunks=space.chunks)
    named = {"text": f"sha256:{corpus.sha256}", "context": str(options.n_ctx)}
    return Yardstick(
        corpus.name, corpus.sha256, corpus, None, options, extent, space, share, _inputs(named, options, frozen, session)
    )


def _given(
    base: Path,
    request: MeasureRequest,
    options: CollectOptions,
    frozen: Frozen,
    n_subjects: int,
    twins: Sequence[int],
    session: Session,
    to_write: int,
) -> Yardstick:
    """Somebody's file of log-probabilities, as llama-perplexity writes it."""
    try:
        head = read_head(base)
    except InvalidDataError as error:
        raise _useless(base, error.why) from error
    n_vocab = vocabulary_size(frozen.model)
    if head.n_vocab != n_vocab:
        raise InvalidDataError(
            f"{base.name} is not of {frozen.model.name}",
            f"it is of a vocabulary of {head.n_vocab} tokens, and the model has {n_vocab}",
            "Give the one written from this model, or leave it out to have one made.",
        )
    if request.chunks is not None and session.engine.name != EMBEDDED:
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
        n_levels=n_subjects + len(twins),
        given=True,
        further_bytes=0 if session.engine.name == EMBEDDED else checked.n_bytes,  # llama-perplexity is given a part of it
    )
    space = fit(extent, _limit(request, session, to_write), twins)
    (digest,) = hash_files([base], session)
    named = {"reference": f"sha256:{digest}", "context": str(head.n_ctx)}
    inputs = _inputs(named, options, frozen, session)
    return Yardstick(base.name, digest, None, base, options, extent, space, None, inputs)


def check_content(base: Path) -> None:
    """Raise :class:`InvalidDataError` for somebody's file of log-probabilities that holds what no model computes."""
    head = read_head(base)
    tokens = read_tokens(base, head)
    if tokens.min() < 0 or tokens.max() >= head.n_vocab:
        raise _useless(base, f"its text has tokens that its vocabulary of {head.n_vocab} has not")
    wild = first_wild_chunk(base, head)
    if wild is not None:
        raise _useless(base, f"log-probabilities of its chunk {wild} are no numbers")
    if why := no_language_model(base, head):
        raise _useless(base, f"of the model that wrote it {why}")


def _useless(base: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{base} cannot be compared with",
        why,
        "Give a whole file as llama-perplexity writes it, or leave it out to have one made.",
    )


def _limit(request: MeasureRequest, session: Session, to_write: int) -> int:
    """Bytes that the measurement may use, once ``to_write`` more are written. What an unfinished one takes will be used, or
    freed."""
    workspace = session.workspace
    unfinished = [workspace.evaluation / REFERENCE, *workspace.twins.rglob("*.gguf")]
    taken = sum(path.stat().st_size for path in unfinished if path.is_file())
    return disk_limit(request.max_disk, free_bytes(workspace.root) + taken - to_write)


def _inputs(named: dict[str, str], options: CollectOptions, frozen: Frozen, session: Session) -> dict[str, str]:
    return {"model file": frozen.fingerprint, **named, "options": _how(options), "engine": session.engine.arithmetic()}


def _how(options: CollectOptions) -> str:
    """The options that may change a bit of what is computed; threads do not."""
    how = [f"-b {options.n_batch} -ub {options.n_ubatch}", f"-ngl {options.n_gpu_layers}" if options.n_gpu_layers else ""]
    how += [f"-ts {options.tensor_split}" if options.tensor_split else ""]
    how += [f"-sm {options.split_mode}" if options.split_mode else ""]
    how += [f"-mg {options.main_gpu}" if options.main_gpu is not None else ""]
    how += [f"-ot {override}" for override in options.override_tensors]
    how += [f"-fa {options.flash_attn}" if options.flash_attn else "", "" if options.repack else "--no-repack"]
    return " ".join(filter(None, how))


def check_text(request: MeasureRequest, calibration: Path | None, sink: Sink) -> None:
    """Whether there will be a text to measure on, before anything is made; ``calibration``: what the imatrix will be of, if
    that is known. Raises :class:`InvalidDataError`."""
    if request.base is None:
        corpus = open_corpus(request.text or resource(HELD_OUT_TEXT), role="held-out text", option="--text")
        overlap(corpus, [calibration] if calibration is not None else [], sink)


def overlap(corpus: Corpus, calibrations: Sequence[Path], sink: Sink) -> float | None:
    """How much of the text stands in what matrices are collected from, at most; None where that is not known. Raises for too
    much."""
    worst: float | None = None
    for calibration in calibrations:
        sink(Started("overlap", f"comparing {corpus.name} with {calibration.name}"))
        found = overlap_files(calibration, corpus.path)
        sink(Finished("overlap", "done", f"{found.share:.1%} in common"))
        judged = verdict(found)
        if judged == "void":
            raise InvalidDataError(
                f"{corpus.name} cannot say how good the levels are",
                f"{found.share:.0%} of it stands in {calibration.name}, which the imatrix was collected from: "
                "the figures would say how well that is remembered",
                "Give another --text, or leave it out to use the shipped one.",
            )
        if judged == "some":
            sink(warning(f"{found.share:.1%} of {corpus.name} stands in {calibration.name} too, for example: {found.example}"))
        worst = max(worst or 0.0, found.share)
    return worst


def _calibrations(session: Session) -> list[Path]:
    """The calibration texts of this workspace's matrices, as far as they are still where and what they were."""
    found: dict[Path, None] = {}
    for step, record in session.journal.steps().items():
        facts = record.facts.get("calibration") if step.split(" ")[0] == IMATRIX_STEP else None
        if not isinstance(facts, dict):
            continue
        path = Path(str(facts.get("path", "")))
        try:
            if path.is_file() and sha256(path) == facts.get("sha256"):
                found[path] = None
            else:
                session.sink(warning(f"{path.name} is gone or was changed: whether the text overlaps it cannot be told."))
        except OSError as error:
            raise from_os_error(error, "reading the calibration text", path) from error
    return list(found)
