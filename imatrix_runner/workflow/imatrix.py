"""The imatrix of a run: which one, and making it if need be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.calibration.corpus import FEW_CHUNKS, Corpus, open_corpus, raw_warnings
from imatrix_runner.engines.base import Engine
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.events import Saved, Sink, info, no_effect, warning
from imatrix_runner.files import sha256, stamp
from imatrix_runner.imatrix.chunks import (
    ChunkPlan,
    describe_ranges,
    plan_chunks,
    range_chunks,
    require_rows,
    watched_chunks,
    whole_batches,
)
from imatrix_runner.imatrix.collect import CollectRequest, CollectResult, clean_parts, collect
from imatrix_runner.imatrix.coverage import examine
from imatrix_runner.imatrix.expected import ExpectedMatrix, expect
from imatrix_runner.imatrix.formats import MatrixFile, prepare_gguf, read
from imatrix_runner.imatrix.matrix import misfits, problems
from imatrix_runner.journal import Output, Record, describe_changes, differences
from imatrix_runner.models.bounded import printable
from imatrix_runner.models.kind import is_recurrent, require_calibratable
from imatrix_runner.models.sources import HubId, Model, Source
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.workflow.choice import EMBEDDED
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.ineffective import ineffective_collection
from imatrix_runner.workflow.plan import ImatrixStep
from imatrix_runner.workflow.published import obtain_published
from imatrix_runner.workflow.request import MODES, ImatrixRequest
from imatrix_runner.workflow.source import Frozen, hash_files
from imatrix_runner.workspace import Workspace

STEP = "imatrix"

CALIBRATION = "imatrix_runner.calibration"
"""The key under which an imatrix names the manifest of the text it was made from."""

_WORTH_SAYING = 0.15


@dataclass(frozen=True)
class Chosen:
    """The decision: the step for the plan; the request to compute if it is to be generated, and what that will give; the file
    if it is there."""

    step: ImatrixStep
    request: CollectRequest | None = None
    file: MatrixFile | None = None
    expected: ExpectedMatrix | None = None


def choose(request: ImatrixRequest, source: Source, frozen: Frozen, session: Session) -> Chosen:
    """Decide where the imatrix comes from; a published one is fetched here, for the plan is made with what is in it.

    Raises :class:`InvalidDataError` for one that cannot be used with the model.
    """
    chosen = _choose(request, source, frozen, session)
    if request.typed and chosen.step.action in ("none", "use", "fetch"):
        which = "no imatrix is used" if chosen.step.path is None else f"{chosen.step.path.name} is used as it is"
        make = ". To make a new one: --imatrix generate" if request.mode in ("auto", "there") else ""
        session.sink(warning(no_effect(request.typed, f"{which} ({chosen.step.reason}){make}")))
    if chosen.step.action == "use" and chosen.step.path is not None:
        record = session.journal.get(_step(chosen.step.path, session.workspace))
        changed = record is not None and record.inputs.get("model file") != frozen.fingerprint
        if changed and session.journal.still_there(_step(chosen.step.path, session.workspace), save=False):
            told = f"{chosen.step.path.name} was collected from another version of {frozen.model.name}"
            session.sink(warning(f"{told}. To make a new one: imatrix-runner run MODEL --imatrix generate"))
    return chosen


def _choose(request: ImatrixRequest, source: Source, frozen: Frozen, session: Session) -> Chosen:
    if request.mode == "none":
        return Chosen(ImatrixStep("none", None, "not wanted (--imatrix none)"))
    if request.mode not in MODES:
        return _use(Path(request.mode), frozen.model, session.sink, "given with --imatrix")
    here = session.workspace.find_imatrix() if request.mode != "generate" else None
    if request.mode == "there":
        if here is not None:
            return _use(here, frozen.model, session.sink, "found in the workspace")
        return Chosen(ImatrixStep("none", None, "there is none in the workspace"))
    if request.mode == "published":
        return _published(source, frozen, session, here)
    if request.mode == "auto" and here is None and _worth_searching(request, source, session):
        obtained = obtain_published(session.workspace, frozen.model, source, sink=session.sink, stop=session.stop)
        if obtained.file is not None:
            return _use(obtained.file.path, frozen.model, session.sink, obtained.reason)
        session.sink(info(f"No published imatrix is used: {obtained.reason}. One is generated."))
    return _made_here(request, frozen, session, here)


def _worth_searching(request: ImatrixRequest, source: Source, session: Session) -> bool:
    """Only a hub's model is looked up unasked; not when a text was given, nor when a generation waits to go on."""
    return isinstance(source, HubId) and request.text is None and not session.workspace.parts.is_dir() and not session.dry_run


def _published(source: Source, frozen: Frozen, session: Session, here: Path | None) -> Chosen:
    if here is not None:
        return _use(here, frozen.model, session.sink, "found in the workspace")
    if session.dry_run:
        return Chosen(ImatrixStep("fetch", session.workspace.imatrix, "published ones are looked for"))
    obtained = obtain_published(session.workspace, frozen.model, source, sink=session.sink, stop=session.stop, guess=True)
    if obtained.error is not None:
        raise obtained.error
    assert obtained.file is not None
    return _use(obtained.file.path, frozen.model, session.sink, obtained.reason)


def _made_here(request: ImatrixRequest, frozen: Frozen, session: Session, found: Path | None) -> Chosen:
    """What lies in the workspace (``found``), else one generated there, now or before."""
    workspace, journal, sink = session.workspace, session.journal, session.sink
    out = request.out or workspace.imatrix
    record = journal.get(_step(out, workspace))
    there = journal.still_there(_step(out, workspace), save=not session.dry_run)
    ours = record is not None and record.output.name == workspace.name_of(out) and there
    if found is not None and not (ours and found == out):
        return _use(found, frozen.model, sink, "found in the workspace")
    corpus = open_corpus(request.text or resource(CALIBRATION_TEXT))
    for told in raw_warnings(corpus, frozen.model.path, has_template=frozen.model.has_chat_template):
        sink(warning(told))
    request = _as_built(request, corpus, sink)
    inputs = imatrix_inputs(request, corpus, frozen, session.engine)
    if record is not None and ours and not differences(record, inputs):
        if not session.dry_run:
            clean_parts(workspace)
        return _use(out, frozen.model, sink, "made before from the same inputs", action="up-to-date")
    if out.exists() and not ours:
        raise InvalidDataError(
            f"{out} is in the way",
            "it was not made here (or was changed since), and files of yours are never overwritten",
            f"Use it with --imatrix {out}, or move it away.",
        )
    reason = "there is none yet"
    if record is not None and ours:
        changed = "; ".join(describe_changes(record.inputs, inputs))
        reason = f"changed: {changed} (to keep the old one: --imatrix {out})"
    require_calibratable(frozen.model)
    step, plan = _plan_generation(request, corpus, frozen.model, out, reason, session)
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
    return Chosen(step, collected, expected=expected)


def imatrix_inputs(request: ImatrixRequest, corpus: Corpus, frozen: Frozen, engine: Engine) -> dict[str, str]:
    """What a generated matrix depends on. Perplexity is measured on the way and changes nothing; neither do threads."""
    options = request.options
    limit = request.chunks if request.chunks is not None else "all"
    how = [f"-b {options.n_batch} -ub {options.n_ubatch}", f"-ngl {options.n_gpu_layers}" if options.n_gpu_layers else ""]
    how += [f"-ts {options.tensor_split}" if options.tensor_split else ""]
    how += [f"-sm {options.split_mode}" if options.split_mode else ""]
    how += [f"-mg {options.main_gpu}" if options.main_gpu is not None else ""]
    how += [f"-ot {override}" for override in options.override_tensors]
    how += [f"-fa {options.flash_attn}" if options.flash_attn else "", "" if options.mmap else "--no-mmap"]
    how += ["" if options.repack else "--no-repack"]
    how += ["--parse-special" if options.parse_special else "", "--process-output" if options.process_output else ""]
    how += [" ".join(options.extra), f"name {corpus.name}"]
    ranges = [f"--output-frequency {request.output_frequency}" if request.output_frequency else ""]
    ranges += [f"--save-frequency {request.save_frequency}" if request.save_frequency else ""]
    ranges += [f"--until-converged {request.until_converged:g}" if request.until_converged is not None else ""]
    ranges += [f"--min-expert-tokens {request.min_expert_tokens}" if request.min_expert_tokens else ""]
    built = {"calibration manifest": corpus.built.fingerprint} if corpus.built is not None else {}
    return {
        "model file": frozen.fingerprint,
        "calibration text": f"sha256:{corpus.sha256}",
        **built,
        "context": str(options.n_ctx),
        "chunks": " ".join(filter(None, [f"{limit} from {request.first_chunk}", *ranges])),
        "options": " ".join(filter(None, how)),
        "engine": engine.arithmetic(),
    }


def _as_built(request: ImatrixRequest, corpus: Corpus, sink: Sink) -> ImatrixRequest:
    """The request with special tokens parsed if the text was built so, and whoever asks did not say otherwise."""
    manifest = corpus.manifest
    if manifest is None:
        return request
    if corpus.edited:
        sink(warning(f"{corpus.name} was changed since it was built: its manifest no longer says what is in it."))
    if not manifest.parse_special or not request.parse_as_built:
        return request
    how = (
        f"rendered with {printable(manifest.template.origin)[:200]}"
        if manifest.template is not None
        else "built with control tokens"
    )
    sink(info(f"{corpus.name} was {how}: its special tokens are parsed (--parse-special)."))
    return replace(request, options=replace(request.options, parse_special=True))


def _plan_generation(
    request: ImatrixRequest, corpus: Corpus, model: Model, out: Path, reason: str, session: Session
) -> tuple[ImatrixStep, ChunkPlan]:
    options = request.options
    require_rows(options, recurrent=is_recurrent(model))
    n_tokens = session.engine.count_tokens(
        model.path, corpus.path, parse_special=options.parse_special, log=session.log("tokenize")
    )
    if corpus.marked and not options.parse_special:
        _tell_unparsed(n_tokens, corpus, model, session)
    plan = plan_chunks(
        n_tokens,
        options,
        first=request.first_chunk,
        limit=request.chunks,
        range_size=_range_size(request, model, n_tokens, session.engine),
        save_frequency=request.save_frequency,
        spread=request.until_converged is not None,
        beyond=request.min_expert_tokens > 0,
    )
    for text in ineffective_collection(request, plan, model):
        session.sink(warning(text))
    _tell_rounding(request, plan, session.sink)
    share = projection_share(model) if options.ppl and session.engine.name == EMBEDDED else 0.0
    if share >= _WORTH_SAYING:
        session.sink(info(f"The perplexity takes about {100 * share:.0f} % of the computing; --no-ppl leaves it out."))
    if plan.n_chunks < FEW_CHUNKS:
        session.sink(
            warning(
                f"The imatrix will see {plan.n_chunks} chunks ({plan.n_chunks * options.n_ctx} tokens of {corpus.name}); "
                f"fewer than {FEW_CHUNKS} give a noisy matrix. A longer text helps."
            )
        )
    # The matrix itself, its snapshots, and in float64 a range's, the checkpoint and the one that replaces it.
    files = 1 + len(plan.snapshots) + 3 * 2
    return ImatrixStep("generate", out, reason, plan.n_chunks, n_tokens, files * matrix_bytes(model)), plan


def _tell_unparsed(n_tokens: int, corpus: Corpus, model: Model, session: Session) -> None:
    """Written-out control tokens that are read letter by letter make a matrix of something the model never sees."""
    parsed = session.engine.count_tokens(model.path, corpus.path, parse_special=True, log=session.log("tokenize"))
    if parsed < n_tokens:
        session.sink(
            warning(
                f"{corpus.name} holds this model's special tokens written out, and they are read letter by letter "
                f"({n_tokens} tokens instead of {parsed}). For chat transcripts add --parse-special."
            )
        )


def _range_size(request: ImatrixRequest, model: Model, n_tokens: int, engine: Engine) -> int:
    """Chunks from one checkpoint to the next: as asked for, else what makes its cost small, and short enough to decide by."""
    if request.min_expert_tokens and not engine.counts_experts:
        raise UsageError(
            "--min-expert-tokens cannot be kept with these programs",
            f"the llama-imatrix in use ({engine.identity()}) does not count the tokens that each expert saw",
            "Leave it out, or use --engine embedded.",
        )
    if request.output_frequency:
        return request.output_frequency
    options = request.options
    if model.n_experts and not engine.counts_experts:
        return max(1, n_tokens // options.n_ctx)  # of a range in which one expert saw nothing, its tensor would be lost
    gpu = bool(engine.devices) and options.n_gpu_layers != "0"
    weights, matrix = active_params(model), matrix_bytes(model)
    if request.until_converged is None and not request.min_expert_tokens:
        return range_chunks(engine.name, weights, model.n_bytes, matrix, options, gpu=gpu)
    cheap = range_chunks(engine.name, weights, model.n_bytes, matrix, options, gpu=gpu, least=1)
    return watched_chunks(cheap, n_tokens, options)


def _tell_rounding(request: ImatrixRequest, plan: ChunkPlan, sink: Sink) -> None:
    """Where files are left after other numbers of chunks than asked for, once for both kinds."""
    told: list[str] = []
    size = request.output_frequency
    if size and plan.ranges[0].count != min(size, plan.n_chunks):
        told.append(f"saved every {whole_batches(size, request.options)} chunks")
    if any(done % request.save_frequency for done in plan.snapshots):
        some = ", ".join(map(str, plan.snapshots[:3])) + (", …" if len(plan.snapshots) > 3 else "")
        told.append(f"snapshots are left after {some} chunks")
    if told:
        sink(
            info(f"{request.options.chunks_at_once} chunks are computed at once, so the imatrix is " + " and ".join(told) + ".")
        )


def matrix_bytes(model: Model) -> int:
    """About the size of the model's imatrix: a float32 per column of each weight (and expert), a count, and the names."""
    blocks = [(*tensor.shape, 1) for tensor in model.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    return sum(4 * (shape[0] + 1) * shape[2] + 256 for shape in blocks)


def projection_share(model: Model) -> float:
    """How much of computing a chunk is the output projection, which only the perplexity needs: weights that a token meets,
    0 to 1."""
    sizes = {tensor.name: tensor.n_elements for tensor in model.tensors}
    embeddings = sizes.get("token_embd.weight", 0)
    projection = sizes.get("output.weight", embeddings)  # tied: the embeddings once more
    whole = active_params(model) - embeddings - sizes.get("output.weight", 0) + projection
    return projection / whole if whole else 0.0


def active_params(model: Model) -> int:
    """Weights that one token meets: of a mixture's expert tensors only the experts in use."""
    used = model.header.integer(f"{model.architecture}.expert_used_count") or 0
    if not model.n_experts or not 0 < used <= model.n_experts:
        return model.n_params
    experts = sum(tensor.n_elements for tensor in model.tensors if "_exps" in tensor.name)
    return model.n_params - experts + experts * used // model.n_experts


def generate(chosen: Chosen, session: Session) -> MatrixFile:
    """Compute the chosen matrix, record it, tidy up."""
    assert chosen.request is not None
    request, workspace, journal = chosen.request, session.workspace, session.journal
    result = collect(request, session.engine, workspace, journal, session.sink)
    part = prepare_gguf(result.matrix, request.out, facts=provenance(request.corpus))
    output = Output(workspace.name_of(request.out), stamp(part), sha256(part))
    facts = _facts(result, request)
    record = Record.now(request.inputs, [output], chosen.step.reason, result.seconds, facts=facts)
    journal.conclude(_step(request.out, workspace), record, [(part, request.out)])
    del result  # it reads from the checkpoint
    clean_parts(workspace)
    session.sink(Saved(str(request.out), "imatrix", output.stamp.size))
    return read(request.out)


def provenance(corpus: Corpus) -> dict[str, str]:
    """What a matrix's file says of a text that was built: enough to find its manifest, nobody's folders."""
    return {CALIBRATION: corpus.built.fingerprint} if corpus.built is not None else {}


def _facts(result: CollectResult, request: CollectRequest) -> dict[str, object]:
    """What later steps and reports want to know of a collection; JSON values only."""
    perplexity = result.perplexity
    return {
        "chunks": result.chunks,
        "ranges": describe_ranges(result.ranges),
        "tokens": request.plan.n_tokens,
        "dataset": request.corpus.name,
        "calibration": calibration_facts(request.corpus),
        "ppl": perplexity.value,
        "ppl_error": perplexity.error,
        "ppl_chunks": perplexity.tokens // max(1, request.options.scored_tokens),
        "load_seconds": result.load_seconds,
        "stopped": result.stopped,
        "curve": [vars(point) for point in result.curve],
    }


def calibration_facts(corpus: Corpus) -> dict[str, object]:
    """A text and, if it was built, what from: for the journal and for reports."""
    facts: dict[str, object] = {"path": str(corpus.path.absolute()), "bytes": corpus.n_bytes, "sha256": corpus.sha256}
    built = corpus.built
    if built is not None:
        template = built.template.sha256 if built.template is not None else None
        facts |= {"manifest": built.fingerprint, "parse_special": built.parse_special, "template": template}
        facts["sources"] = [
            {"name": each.name, "sha256": each.sha256, "licence": each.licence, "share": each.share} for each in built.sources
        ]
    return facts


def collected_facts(file: MatrixFile | None, session: Session) -> Mapping[str, object] | None:
    """What the journal knows of how a matrix was collected; None for one that was not made here."""
    if file is None:
        return None
    record = session.journal.get(_step(file.path, session.workspace))
    made = session.journal.still_there(_step(file.path, session.workspace), save=not session.dry_run)
    return dict(record.facts) if record is not None and made else None


def _use(path: Path, model: Model, sink: Sink, how: str, *, action: str = "use") -> Chosen:
    file = read(path.expanduser().absolute())
    bad = problems(file.matrix)
    if bad:
        raise InvalidDataError(
            f"The imatrix {path} cannot be used",
            "; ".join(bad[:3]),
            "Give another one, or have one made with --imatrix generate.",
        )
    bad = misfits(file.matrix, {tensor.name: tensor.shape for tensor in model.tensors})
    if bad:
        raise InvalidDataError(
            f"The imatrix {path} does not belong to {model.name}",
            "; ".join(bad[:3]),
            "Give the one made from this model, or have one made with --imatrix generate.",
        )
    sink(info(f"Imatrix {path} ({how}): {file.describe()}"))
    tell_weaknesses(file, model, sink)
    step = ImatrixStep("up-to-date" if action == "up-to-date" else "use", file.path, how, file.matrix.chunk_count)
    return Chosen(step, file=file)


def tell_weaknesses(file: MatrixFile, model: Model, sink: Sink) -> None:
    """What ``imatrix check`` would warn of."""
    for finding in examine(file.matrix, {tensor.name: tensor.shape for tensor in model.tensors}).findings:
        if finding.severity == "warning":
            sink(warning(f"{file.path.name}: {finding.text}"))


def fingerprint(file: MatrixFile | None, session: Session) -> str:
    """The imatrix as an input of levels: its name (which goes into their metadata) and content."""
    if file is None:
        return "none"
    return f"{file.path.name} sha256:{hash_files([file.path], session)[0]}"


def _step(out: Path, workspace: Workspace) -> str:
    """One record for each place an imatrix was written to: another ``-o`` does not make the first file a stranger."""
    return STEP if out == workspace.imatrix else f"{STEP} {out}"
