"""``advise``: before hours are spent, which levels fit this machine, what an imatrix brings them, and how long it takes.

Nothing is written but into a temporary folder; every figure is llama.cpp's own dry run, a formula that names its source, a
measurement made now, or somebody's published one and told as such.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from imatrix_runner.calibration.corpus import Corpus, open_corpus, raw_warnings
from imatrix_runner.calibration.judgements import Judgement
from imatrix_runner.engines.base import CollectOptions, Engine
from imatrix_runner.engines.embedded.find import Unusable
from imatrix_runner.errors import UsageError
from imatrix_runner.events import warning
from imatrix_runner.files import free_bytes, stamp
from imatrix_runner.imatrix.expected import ExpectedMatrix, expect
from imatrix_runner.journal import Journal
from imatrix_runner.models.kind import no_next_token, require_vocabulary
from imatrix_runner.models.sources import HubId, LocalDirectory, Model, Source, parse_source
from imatrix_runner.quantize.benefit import Benefit, benefit, computing_types
from imatrix_runner.quantize.levels import Level
from imatrix_runner.quantize.memory import Budget, ContextMemory, Fit, context_memory, fit
from imatrix_runner.resources import CALIBRATION_TEXT, HELD_OUT_TEXT, resource
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.hardware import Gpu, gpus, parse_gpus
from imatrix_runner.workflow.adequacy import Suitability, Use, suits
from imatrix_runner.workflow.calibration_inspect import Inspected, InspectRequest, inspect
from imatrix_runner.workflow.choice import Choice, Needs
from imatrix_runner.workflow.context import Context, Session, settle
from imatrix_runner.workflow.imatrix import matrix_bytes
from imatrix_runner.workflow.levels import LevelPlanner
from imatrix_runner.workflow.measured import measured
from imatrix_runner.workflow.ownership import find_workspace
from imatrix_runner.workflow.plan import LevelStep
from imatrix_runner.workflow.probe import Timing, probe
from imatrix_runner.workflow.recommend import Candidate, Recommendation, recommend
from imatrix_runner.workflow.request import EnvironmentRequest, LevelsRequest, SourceRequest
from imatrix_runner.workflow.run import choose_levels
from imatrix_runner.workflow.source import Frozen, open_source
from imatrix_runner.workspace import Workspace

USUAL_CONTEXT = 4096

_TRAINED = frozenset(("Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4"))
"""Levels for models that were trained in these types; others lose nearly everything, so they are judged only when named."""


@dataclass(frozen=True)
class AdviseRequest:
    """``text`` None: the shipped calibration text. ``options``: how its chunks are computed; ``n_ctx``: the context a level is
    to run with (None: 4,096, or what the model is made for if that is less). ``ram`` and ``vram``: bytes of another machine."""

    source: SourceRequest
    environment: EnvironmentRequest
    levels: LevelsRequest = field(default_factory=LevelsRequest)
    text: Path | None = None
    options: CollectOptions = field(default_factory=CollectOptions)
    parse_as_built: bool = True
    use: Use = "general"
    n_ctx: int | None = None
    ram: int | None = None
    vram: int | None = None
    probe: bool = True


@dataclass(frozen=True)
class MachineFacts:
    """What there is to run on. ``planned``: another machine's memory was given. ``idle``: why the engine cannot use the GPUs;
    ``disk``: where levels will be made."""

    ram: int
    ram_free: int | None
    gpus: tuple[Gpu, ...]
    idle: str
    planned: bool
    disk: Path
    disk_free: int

    @property
    def budget(self) -> Budget:
        return Budget(self.ram, tuple(gpu.n_bytes for gpu in self.gpus if gpu.n_bytes))


@dataclass(frozen=True)
class LevelAdvice:
    """One level; ``fit`` None where its size is unknown (a fork's type). ``failure``: why it cannot be made."""

    level: str
    n_bytes: int | None
    bits_per_weight: float | None
    benefit: Benefit
    fit: Fit | None
    fallbacks: int
    fallback_share: float
    failure: str = ""


@dataclass(frozen=True)
class TextAdvice:
    """The calibration text. ``n_chunks`` of ``n_ctx`` tokens are what the engine will compute."""

    corpus: Corpus
    shipped: bool
    inspected: Inspected
    n_ctx: int
    n_tokens: int
    n_chunks: int
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True)
class Advice:
    """Everything found. ``untimed``: why there is no ``timing``; ``held_out_chunks``: of the shipped text to measure with
    (where there is a timing for it); ``measured``: levels whose own divergence the workspace knows already."""

    model: Model
    trained_context: int | None
    has_template: bool
    context: ContextMemory
    machine: MachineFacts
    engine: str
    levels: tuple[LevelAdvice, ...]
    left_out: tuple[str, ...]
    text: TextAdvice
    timing: Timing | None
    untimed: str
    held_out_chunks: int
    imatrix_bytes: int
    recommendations: tuple[Recommendation, ...]
    measured: tuple[str, ...]


def advise(request: AdviseRequest, context: Context) -> Advice:
    """Look at the model, the machine and the text, and time a few chunks.

    Raises :class:`UsageError` for a model that must be downloaded or converted first, and what opening, tokenising and
    computing raise.
    """
    needs = Needs(request.levels.names, (), request.options.n_gpu_layers)
    machine, choice = settle(request.environment, needs, context.sink)
    source = parse_source(request.source.model)
    workspace = find_workspace(source, request.source.model, request.environment.work_dir, context.sink, context.stop)
    runner = context.runner(request.environment)
    engine, journal = choice.make(runner), Journal(workspace.journal)
    beside = choice.make_beside(runner)
    session = Session(workspace, journal, machine, engine, runner, context.sink, dry_run=True, beside=beside)
    levels, left_out = _levels(request.levels, session)
    corpus = open_corpus(request.text.expanduser() if request.text is not None else resource(CALIBRATION_TEXT))
    model = _open(source, request, session)
    require_vocabulary(model)
    for told in raw_warnings(corpus, model.path, has_template=model.has_chat_template):
        session.sink(warning(told))
    trained = model.header.integer(f"{model.architecture}.context_length")
    n_ctx = request.n_ctx or min(USUAL_CONTEXT, trained if trained and trained > 0 else USUAL_CONTEXT)
    held = context_memory(model, n_ctx)
    facts = _machine(request, session, choice)
    text = _text(request, corpus, model, session, context)
    cannot = no_next_token(model)
    expected = expect(model, dataset=corpus.name, chunks=text.n_chunks) if not cannot else None
    judged = _judged(levels, request.levels, model, expected, held, facts.budget, session)
    untimed = cannot or _untimed(request, text)
    options = replace(request.options, parse_special=_parse_special(request, corpus))
    timing = probe(model, corpus, text.n_tokens, options, session) if not untimed else None
    return Advice(
        model=model,
        trained_context=trained,
        has_template=_has_template(model),
        context=held,
        machine=facts,
        engine=engine.name,
        levels=judged,
        left_out=left_out,
        text=text,
        timing=timing,
        untimed=untimed,
        held_out_chunks=_held_out_chunks(model, engine, request.options.n_ctx) if timing is not None else 0,
        imatrix_bytes=matrix_bytes(model),
        measured=tuple(measured(journal)),
        recommendations=recommend(_candidates(judged), facts.budget),
    )


def _levels(request: LevelsRequest, session: Session) -> tuple[tuple[Level, ...], tuple[str, ...]]:
    """What was asked for, else every level on offer but those for models trained so, which are named."""
    if request.names or request.preset:
        return choose_levels(request, session.types, session.sink), ()
    every = choose_levels(replace(request, preset="all"), session.types, session.sink)
    return (
        tuple(level for level in every if level.name not in _TRAINED),
        tuple(level.name for level in every if level.name in _TRAINED),
    )


def _open(source: Source, request: AdviseRequest, session: Session) -> Model:
    """The model, where it can be looked into without a download or a conversion."""
    allow = request.levels.options.allow_requantize
    if isinstance(source, HubId):
        raise _not_yet(source, "downloaded", session)
    try:
        return open_source(source, request.source, session, allow_requantize=allow)
    except UsageError as error:
        if not isinstance(source, LocalDirectory):
            raise
        # A dry run converts nothing, and says what its own user should do.
        raise _not_yet(source, "converted", session) from error


def _not_yet(source: Source, what: str, session: Session) -> UsageError:
    name, root = session.workspace.model, session.workspace.root
    model = str(source.path) if not isinstance(source, HubId) else str(source)
    there = [root / f"{name}-{kind}.gguf" for kind in ("BF16", "F16", "F32") if (root / f"{name}-{kind}.gguf").is_file()]
    if there:
        todo = f"It was converted before. Type: imatrix-runner advise {shlex.quote(str(there[0]))}"
    elif isinstance(source, HubId) and source.file is not None:
        fetch = ["hf", "download", source.repo, source.file, *(["--revision", source.revision] if source.revision else [])]
        todo = f"Type: {shlex.join(fetch)}   and give advise the path that it prints."
    else:
        first = f"imatrix-runner quantize {shlex.quote(model)} --imatrix none --levels Q8_0"
        todo = f"Type: {first}   and give advise the GGUF that it leaves in {root}"
    why = "the figures come from the tensors of its GGUF, and advise writes nothing"
    return UsageError(f"{model} cannot be judged before it is {what}", why, todo)


def _machine(request: AdviseRequest, session: Session, choice: Choice) -> MachineFacts:
    memory = psutil.virtual_memory()
    here = parse_gpus(session.engine.devices)
    idle = ""
    if not here and session.machine.may_have_gpu:
        here = parse_gpus(gpus())
        idle = choice.no_gpu() if here else ""
    if request.vram is not None:
        here, idle = (Gpu("a GPU as given", request.vram),), ""
    elif request.options.n_gpu_layers == "0" or request.ram is not None:
        here, idle = (), ""
    planned = request.ram is not None or request.vram is not None
    free = None if request.ram is not None else memory.available
    disk = request.environment.work_dir
    return MachineFacts(request.ram or memory.total, free, here, idle, planned, disk, free_bytes(disk.expanduser()))


def _judged(
    levels: Sequence[Level],
    request: LevelsRequest,
    model: Model,
    expected: ExpectedMatrix | None,
    held: ContextMemory,
    budget: Budget,
    session: Session,
) -> tuple[LevelAdvice, ...]:
    """Every level as llama.cpp would make it with the imatrix that is ``expected`` (None: it can have none);
    largest first, whatever is in the workspace."""
    with scratch_folder() as folder:
        empty = Workspace(folder / model.name, model.name)
        scratch = replace(session, workspace=empty, journal=Journal(empty.journal))
        frozen = Frozen(model, "", tuple(stamp(path) for path in model.files))
        fingerprint = "none" if expected is None else "still to be made"
        steps = LevelPlanner(request, frozen, scratch).plan(levels, None, fingerprint, expected)
    judged = [_level(step, held, budget) for step in steps]
    return tuple(sorted(judged, key=lambda each: -(each.n_bytes or 0)))


def _level(step: LevelStep, held: ContextMemory, budget: Budget) -> LevelAdvice:
    assert step.resolved is not None
    facts, recipe, level = step.facts, step.resolved.recipe, step.level
    failure = step.reason if step.state == "fails" else ""
    types = computing_types((tensor.name, tensor.shape, tensor.type) for tensor in recipe.tensors)
    return LevelAdvice(
        level=level.name,
        n_bytes=facts.n_bytes if not failure else None,
        bits_per_weight=facts.bits_per_weight if not failure else None,
        benefit=benefit(level.name, needs_imatrix=facts.needs_imatrix, types=types),
        fit=fit(recipe.tensors, facts.n_bytes, held, budget) if facts.n_bytes is not None and not failure else None,
        fallbacks=len(facts.fallbacks),
        fallback_share=facts.fallback_share,
        failure=failure,
    )


def _candidates(levels: Sequence[LevelAdvice]) -> list[Candidate]:
    return [
        Candidate(each.level, each.n_bytes, each.fit) for each in levels if each.n_bytes is not None and each.fit is not None
    ]


def _text(request: AdviseRequest, corpus: Corpus, model: Model, session: Session, context: Context) -> TextAdvice:
    """What the calibration text is and whether it suits. Its tokens are looked at one by one where llama-cpp-python can do
    that; otherwise the engine tells how many there are."""
    tokenizer = "" if isinstance(session.machine.bindings, Unusable) else str(model.path)
    n_ctx, special = request.options.n_ctx, _parse_special(request, corpus)
    asked = request.options.parse_special
    inspected = inspect(InspectRequest(corpus.path, tokenizer, n_ctx=n_ctx, parse_special=asked), context)
    if (tokens := inspected.inspection.tokens) is not None:
        n_tokens = tokens.n_parsed if special else tokens.n_plain
    else:
        n_tokens = session.engine.count_tokens(model.path, corpus.path, parse_special=special, log=None)
    used = model.header.integer(f"{model.architecture}.expert_used_count") or 0
    suitability = Suitability(
        request.source.model,
        request.use,
        _has_template(model),
        special,
        inspected.inspection.text.languages,
        n_tokens,
        model.n_experts,
        used,
    )
    judgements = tuple(sorted((*inspected.judgements, *suits(suitability)), key=_gravity))
    return TextAdvice(corpus, request.text is None, inspected, n_ctx, n_tokens, n_tokens // n_ctx, judgements)


def _gravity(judgement: Judgement) -> int:
    return ("error", "warning", "info").index(judgement.severity)


def _has_template(model: Model) -> bool:
    return any(key.startswith("tokenizer.chat_template") for key in model.header.metadata)


def _untimed(request: AdviseRequest, text: TextAdvice) -> str:
    if not request.probe:
        return "--no-probe"
    if text.n_chunks < 2:
        return f"the text has {text.n_tokens} tokens, and an imatrix needs 2 chunks of {text.n_ctx}"
    return ""


def _parse_special(request: AdviseRequest, corpus: Corpus) -> bool:
    """As ``run`` would: as asked for, or as the text was built."""
    built = corpus.built is not None and corpus.built.parse_special and request.parse_as_built
    return request.options.parse_special or built


def _held_out_chunks(model: Model, engine: Engine, n_ctx: int) -> int:
    tokens = engine.count_tokens(model.path, resource(HELD_OUT_TEXT), parse_special=False, log=None)
    return tokens // n_ctx
