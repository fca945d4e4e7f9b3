"""The imatrix of a run: choose one, and generate it if needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen, hash_files
from imatrix_runner.context.requests import MODES, ImatrixRequest
from imatrix_runner.documents.corpus import Corpus, open_corpus, raw_warnings
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Saved, Sink, info, no_effect, warning
from imatrix_runner.files import sha256, stamp
from imatrix_runner.imatrix.chunks import (
    describe_ranges,
)
from imatrix_runner.imatrix.collect import CollectRequest, CollectResult, clean_parts, collect
from imatrix_runner.imatrix.collection_facts import CalibrationFacts, CollectedFacts, ImatrixInputs, SourceShare
from imatrix_runner.imatrix.coverage import examine
from imatrix_runner.imatrix.expected import ExpectedMatrix, expect
from imatrix_runner.imatrix.formats import MatrixFile, prepare_gguf, read
from imatrix_runner.imatrix.matrix import misfits, problems
from imatrix_runner.imatrix.plan_generation import as_built, imatrix_inputs, matrix_bytes, plan_generation
from imatrix_runner.imatrix.published.fetch_matrix import obtain_published
from imatrix_runner.imatrix.repeat_command import repeat_command
from imatrix_runner.imatrix.step import ImatrixStep
from imatrix_runner.journal import StepOutput, StepRecord, describe_changes, differences
from imatrix_runner.models.kind import require_calibratable
from imatrix_runner.models.model import HubId, Model, Source
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.steps import MODEL_INPUT, WITHOUT_IMATRIX, imatrix_input, step_id
from imatrix_runner.untrusted import whole_number
from imatrix_runner.workspace import Workspace

CALIBRATION = "imatrix_runner.calibration"
PROCESSORS = "imatrix_runner.processors"
"""The key under which an imatrix names the manifest of the text it was made from."""


@dataclass(frozen=True)
class ImatrixChoice:
    """The decision: the step for the plan; for one to generate, the request, the expected entries, and the ``command`` that
    repeats it; for an existing one, the file."""

    step: ImatrixStep
    request: CollectRequest | None = None
    file: MatrixFile | None = None
    expected: ExpectedMatrix | None = None
    command: tuple[str, ...] = ()


def choose(request: ImatrixRequest, source: Source, frozen: Frozen, session: Session) -> ImatrixChoice:
    """Decide where the imatrix comes from. A published one is fetched here, because the plan needs its entries.

    Raises :class:`InvalidDataError` for one that cannot be used with the model.
    """
    chosen = _choose(request, source, frozen, session)
    if request.typed and chosen.step.action in ("none", "use", "fetch"):
        which = "no imatrix is used" if chosen.step.path is None else f"{chosen.step.path.name} is used as it is"
        make = ". To make a new one: --imatrix generate" if request.mode in ("auto", "there") else ""
        session.sink(warning(no_effect(request.typed, f"{which} ({chosen.step.reason}){make}")))
    if chosen.step.action == "use" and chosen.step.path is not None:
        record = session.journal.get(_step(chosen.step.path, session.workspace))
        changed = record is not None and record.inputs.get(MODEL_INPUT) != frozen.fingerprint
        if changed and session.journal.still_there(_step(chosen.step.path, session.workspace), save=False):
            text = f"{chosen.step.path.name} was collected from another version of {frozen.model.name}"
            session.sink(warning(f"{text}. To make a new one: imatrix-runner run MODEL --imatrix generate"))
    return chosen


def _choose(request: ImatrixRequest, source: Source, frozen: Frozen, session: Session) -> ImatrixChoice:
    if request.mode == "none":
        return ImatrixChoice(ImatrixStep("none", None, "not wanted (--imatrix none)"))
    if request.mode not in MODES:
        return _use(Path(request.mode), frozen.model, session.sink, "given with --imatrix")
    here = session.workspace.find_imatrix() if request.mode != "generate" else None
    if request.mode == "there":
        if here is not None:
            return _use(here, frozen.model, session.sink, "found in the workspace")
        return ImatrixChoice(ImatrixStep("none", None, "there is none in the workspace"))
    if request.mode == "published":
        return _published(source, frozen, session, here)
    if request.mode == "auto" and here is None and _worth_searching(request, source, session):
        obtained = obtain_published(session.workspace, frozen.model, source, sink=session.sink, stop=session.stop)
        if obtained.file is not None:
            return _use(obtained.file.path, frozen.model, session.sink, obtained.reason)
        session.sink(info(f"No published imatrix is used: {obtained.reason}. One is generated."))
    return _made_here(request, frozen, session, here)


def _worth_searching(request: ImatrixRequest, source: Source, session: Session) -> bool:
    """Whether to search: only for a model of a hub, if no text was given and no unfinished generation exists."""
    return isinstance(source, HubId) and request.text is None and not session.workspace.parts.is_dir() and not session.dry_run


def _published(source: Source, frozen: Frozen, session: Session, here: Path | None) -> ImatrixChoice:
    if here is not None:
        return _use(here, frozen.model, session.sink, "found in the workspace")
    if session.dry_run:
        return ImatrixChoice(ImatrixStep("fetch", session.workspace.imatrix, "published ones are looked for"))
    obtained = obtain_published(session.workspace, frozen.model, source, sink=session.sink, stop=session.stop, guess=True)
    if obtained.error is not None:
        raise obtained.error
    assert obtained.file is not None
    return _use(obtained.file.path, frozen.model, session.sink, obtained.reason)


def _made_here(request: ImatrixRequest, frozen: Frozen, session: Session, found: Path | None) -> ImatrixChoice:
    """Use the imatrix in the workspace (``found``), else one generated there, now or before."""
    workspace, journal, sink = session.workspace, session.journal, session.sink
    out = request.out or workspace.imatrix
    record = journal.get(_step(out, workspace))
    there = journal.still_there(_step(out, workspace), save=not session.dry_run)
    ours = record is not None and record.output.name == workspace.name_of(out) and there
    if found is not None and not (ours and found == out):
        return _use(found, frozen.model, sink, "found in the workspace")
    corpus = open_corpus(request.text or resource(CALIBRATION_TEXT))
    named = replace(corpus, path=request.part_of or corpus.path)
    for text in raw_warnings(named, frozen.model.path, has_template=frozen.model.has_chat_template):
        sink(warning(text))
    request = as_built(request, corpus, sink)
    inputs = imatrix_inputs(request, corpus, frozen, session.engine)
    if record is not None and ours and not differences(record, inputs):
        if not session.dry_run:
            clean_parts(workspace)
        return _use(out, frozen.model, sink, "made before from the same inputs", action="up-to-date")
    if out.exists() and not ours:
        raise InvalidDataError(
            f"{out} is in the way",
            "it was not made here (or was changed since), and your files are never overwritten",
            f"Use it with --imatrix {out}, or move it away.",
        )
    reason = "there is none yet"
    if record is not None and ours:
        changed = "; ".join(describe_changes(record.inputs, inputs))
        reason = f"changed: {changed} (to keep the old one: --imatrix {out})"
    require_calibratable(frozen.model)
    step, plan = plan_generation(request, corpus, frozen.model, out, reason, session)
    expected = expect(
        frozen.model,
        process_output=request.options.process_output,
        file_name=out.name,
        dataset=corpus.name,
        chunks=plan.n_chunks,
    )
    collected = CollectRequest(
        frozen.model.path,
        corpus,
        request.options,
        plan,
        out,
        inputs,
        n_bytes=matrix_bytes(frozen.model),
        check_unchanged=frozen.check_unchanged,
        tolerance=request.until_converged,
        least_tokens=request.min_expert_tokens,
        expected=frozenset(expected.sizes),
    )
    command = repeat_command(request, frozen.model.path, corpus, out)
    return ImatrixChoice(step, collected, expected=expected, command=command)


def generate(chosen: ImatrixChoice, session: Session) -> MatrixFile:
    """Compute the chosen matrix, record it, and remove temporary files."""
    assert chosen.request is not None
    request, workspace, journal = chosen.request, session.workspace, session.journal
    result = collect(request, session.engine, workspace, journal, session.sink)
    part = prepare_gguf(result.matrix, request.out, facts={**provenance(request.corpus), **_unlike_processors(result)})
    output = StepOutput(workspace.name_of(request.out), stamp(part), sha256(part))
    facts = _facts(result, request)
    reason, commands = chosen.step.reason, [chosen.command]
    record = StepRecord.now(request.inputs, [output], reason, result.seconds, commands=commands, facts=facts)
    journal.conclude(_step(request.out, workspace), record, [(part, request.out)])
    del result  # it reads from the checkpoint
    clean_parts(workspace)
    session.sink(Saved(str(request.out), "imatrix", output.stamp.size))
    return read(request.out)


def provenance(corpus: Corpus) -> dict[str, str]:
    """Return the metadata about a built text for a matrix's file: enough to find its manifest, without any folder names."""
    return {CALIBRATION: corpus.built.fingerprint} if corpus.built is not None else {}


def _unlike_processors(result: CollectResult) -> dict[str, str]:
    """Return the metadata about the processors that computed the sums, where they differ: the last bits of sums then depend on
    which of them computed which range."""
    return {PROCESSORS: "; ".join(result.processors)} if len(result.processors) > 1 else {}


def _facts(result: CollectResult, request: CollectRequest) -> CollectedFacts:
    """Return the facts of a collection for later steps and reports."""
    perplexity = result.perplexity
    return CollectedFacts(
        chunks=result.chunks,
        ranges=describe_ranges(result.ranges),
        tokens=request.plan.n_tokens,
        dataset=request.corpus.name,
        calibration=calibration_facts(request.corpus),
        ppl=perplexity.value,
        ppl_error=perplexity.error,
        ppl_chunks=perplexity.tokens // max(1, request.options.scored_tokens),
        load_seconds=result.load_seconds,
        stopped=result.stopped,
        curve=result.curve,
        parse_special=request.options.parse_special,
        processors=result.processors if len(result.processors) > 1 else msgspec.UNSET,
    )


def calibration_facts(corpus: Corpus) -> CalibrationFacts:
    """Return the facts of a text and, if it was built, of its sources, for the journal and reports."""
    facts = CalibrationFacts(str(corpus.path.absolute()), corpus.n_bytes, corpus.sha256)
    built = corpus.built
    if built is None:
        return facts
    return msgspec.structs.replace(
        facts,
        manifest=built.fingerprint,
        parse_special=built.parse_special,
        template=built.template.sha256 if built.template is not None else None,
        sources=tuple(SourceShare(each.name, each.sha256, each.licence, each.share) for each in built.sources),
    )


def collected_facts(file: MatrixFile | None, session: Session) -> CollectedFacts | None:
    """Return the journal's facts on how a matrix was collected; None for one that was not made here."""
    if file is None:
        return None
    record = session.journal.get(_step(file.path, session.workspace))
    made = session.journal.still_there(_step(file.path, session.workspace), save=not session.dry_run)
    return record.facts_as(CollectedFacts) if record is not None and made else None


def collecting_speed(file: MatrixFile | None, session: Session) -> float | None:
    """Return the tokens per second at which a matrix was collected; None for one that was not made here with this engine."""
    record = session.journal.get(_step(file.path, session.workspace)) if file is not None else None
    facts = collected_facts(file, session)
    if record is None or facts is None:
        return None
    inputs, n_chunks = record.inputs_as(ImatrixInputs), facts.chunks
    n_ctx = whole_number(inputs.context)
    if inputs.engine != session.engine.arithmetic() or not isinstance(n_chunks, int) or n_ctx is None or record.seconds <= 0:
        return None
    return n_chunks * n_ctx / record.seconds


def _use(path: Path, model: Model, sink: Sink, how: str, *, action: str = "use") -> ImatrixChoice:
    file = read(path.expanduser().absolute())
    bad = problems(file.matrix)
    if bad:
        raise InvalidDataError(
            f"The imatrix {path} cannot be used",
            "; ".join(bad[:3]),
            "Give another one, or generate one with --imatrix generate.",
        )
    bad = misfits(file.matrix, {tensor.name: tensor.shape for tensor in model.tensors})
    if bad:
        raise InvalidDataError(
            f"The imatrix {path} does not belong to {model.name}",
            "; ".join(bad[:3]),
            "Give the one made from this model, or generate one with --imatrix generate.",
        )
    sink(info(f"Imatrix {path} ({how}): {file.describe()}"))
    warn_of_findings(file, model, sink)
    step = ImatrixStep("up-to-date" if action == "up-to-date" else "use", file.path, how, file.matrix.chunk_count)
    return ImatrixChoice(step, file=file)


def warn_of_findings(file: MatrixFile, model: Model, sink: Sink) -> None:
    """Show the warnings that ``imatrix check`` would give."""
    for finding in examine(file.matrix, {tensor.name: tensor.shape for tensor in model.tensors}).findings:
        if finding.severity == "warning":
            sink(warning(f"{file.path.name}: {finding.text}"))


def fingerprint(file: MatrixFile | None, session: Session) -> str:
    """Return the imatrix as an input of levels: its name (which goes into their metadata) and content."""
    if file is None:
        return WITHOUT_IMATRIX
    return imatrix_input(file.path.name, hash_files([file.path], session)[0])


def _step(out: Path, workspace: Workspace) -> str:
    """Return the step id for an output path. Each path has its own record, so that another ``-o`` does not orphan the first
    file."""
    return step_id("imatrix", "" if out == workspace.imatrix else str(out))
