"""``advise``: which levels fit this machine, how much they gain from an imatrix, and how long the imatrix takes.

Writes only to a temporary folder. Every figure comes from llama.cpp's own dry run, from a formula that names its source, from a
measurement made now, or from a published measurement, which is labelled as such.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from imatrix_runner.advise.cluster_advice import ClusterAdvice, ClusterRoom, advise_cluster
from imatrix_runner.advise.memory import Budget, ContextMemory, MemoryFit, context_memory, fit
from imatrix_runner.advise.recommend import LevelCandidate, Recommendation, recommend
from imatrix_runner.advise.text_suitability import Suitability, Use, suits
from imatrix_runner.advise.timing_probe import PAIR, Timing, probe
from imatrix_runner.app.calibration_inspect import Inspected, InspectRequest, inspect
from imatrix_runner.app.run_levels import choose_levels
from imatrix_runner.calibration.inspect.findings import TextFinding
from imatrix_runner.cluster.node_facts import share_of_processors
from imatrix_runner.cluster.ray_session import connected
from imatrix_runner.context.context import Context, Session, settle
from imatrix_runner.context.engine_choice import EngineChoice, EngineNeeds
from imatrix_runner.context.open_model import Frozen, freeze, open_source
from imatrix_runner.context.ownership import find_workspace
from imatrix_runner.context.requests import EnvironmentRequest, ImatrixRequest, LevelsRequest, SourceRequest
from imatrix_runner.documents.corpus import Corpus, open_corpus, raw_warnings
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.evaluate.measurements import measured
from imatrix_runner.evaluate.predict_levels import predict_levels
from imatrix_runner.events import info, warning
from imatrix_runner.extras import CALIBRATION
from imatrix_runner.files import free_bytes, stamp
from imatrix_runner.imatrix.expected import ExpectedMatrix, expect
from imatrix_runner.imatrix.formats import read as read_matrix
from imatrix_runner.imatrix.obtain import fingerprint as imatrix_fingerprint
from imatrix_runner.imatrix.plan_generation import matrix_bytes, planned_chunks
from imatrix_runner.journal import Journal
from imatrix_runner.mixes.targets import require_stock
from imatrix_runner.models.kind import no_next_token, require_vocabulary
from imatrix_runner.models.model import HubId, LocalDirectory, Model, Source, parse_source
from imatrix_runner.quantize.imatrix_benefit import Benefit, benefit, computing_types
from imatrix_runner.quantize.plan import LevelStep, PredictedKld
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.resources import CALIBRATION_TEXT, HELD_OUT_TEXT, resource
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.hardware import Gpu, gpus, parse_gpus
from imatrix_runner.workspace import Workspace

USUAL_CONTEXT = 4096

_TRAINED = frozenset(("Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4"))
"""Levels for models that were trained in these types. Other models lose nearly everything: assessed only when named."""


@dataclass(frozen=True)
class AdviseRequest:
    """``text`` None: the shipped calibration text. ``options``: how its chunks are computed; ``n_ctx``: the context a level is
    to run with (None: 4,096, or the model's trained context if less). ``ram`` and ``vram``: bytes of another machine."""

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
    """The machine to run on. ``planned``: another machine's memory was given. ``idle``: why the engine cannot use the GPUs;
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
    """One level; ``fit`` None where its size is unknown (a fork's type). ``failure``: why it cannot be made; ``predicted``: its
    KLD, where a cost map of the model is in the workspace."""

    level: str
    n_bytes: int | None
    bits_per_weight: float | None
    benefit: Benefit
    fit: MemoryFit | None
    fallbacks: int
    fallback_share: float
    failure: str = ""
    predicted: PredictedKld | None = None


@dataclass(frozen=True)
class TextAdvice:
    """The calibration text. ``n_chunks`` of ``n_ctx`` tokens are what the engine will compute."""

    corpus: Corpus
    shipped: bool
    inspected: Inspected
    n_ctx: int
    n_tokens: int
    n_chunks: int
    findings: tuple[TextFinding, ...]


@dataclass(frozen=True)
class Advice:
    """The result of ``advise``. ``untimed``: why there is no ``timing``; ``held_out_chunks``: number of chunks of the shipped
    held-out text (0 without a timing); ``measured``: levels whose divergence is already in the workspace. ``cluster``: the
    imatrix on the cluster that was named."""

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
    cluster: ClusterAdvice | None = None


def advise(request: AdviseRequest, context: Context) -> Advice:
    """Look at the model, the machine and the text, and time a few chunks.

    Raises :class:`UsageError` for a model that must be downloaded or converted first, and what opening, tokenising and
    computing raise.
    """
    require_stock(
        request.levels.names,
        "cannot be assessed",
        "its types are chosen by measurements, and advise computes none",
        f"Plan it with: imatrix-runner run {shlex.quote(request.source.model)} --levels … --dry-run",
    )
    needs = EngineNeeds(request.levels.names, (), request.options.n_gpu_layers)
    machine, choice = settle(request.environment, needs, context.sink)
    source = parse_source(request.source.model)
    workspace = find_workspace(source, request.source.model, request.environment.work_dir, context.sink, context.stop)
    runner = context.runner(request.environment)
    engine, journal = choice.make(runner), Journal(workspace.journal)
    additional = choice.make_additional(runner)
    session = Session(workspace, journal, machine, engine, runner, context.sink, dry_run=True, additional=additional)
    levels, left_out = _levels(request.levels, session)
    corpus = open_corpus(request.text.expanduser() if request.text is not None else resource(CALIBRATION_TEXT))
    model = _open(source, request, session)
    require_vocabulary(model)
    for text_warning in raw_warnings(corpus, model.path, has_template=model.has_chat_template):
        session.sink(warning(text_warning))
    trained = model.header.integer(f"{model.architecture}.context_length")
    n_ctx = request.n_ctx or min(USUAL_CONTEXT, trained if trained and trained > 0 else USUAL_CONTEXT)
    held = context_memory(model, n_ctx)
    facts = _machine(request, session, choice)
    cannot = no_next_token(model)
    # How many chunks an imatrix saw changes no size, so a model that llama.cpp refuses is noticed before the text is read.
    expected = expect(model, dataset=corpus.name, chunks=1) if not cannot else None
    assessed = _assessed(levels, request.levels, model, expected, held, facts.budget, session)
    predicted = _predicted(levels, request.levels, model, session)
    assessed = tuple(replace(each, predicted=predicted.get(each.level)) for each in assessed)
    text = _text(request, corpus, model, session, context)
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
        levels=assessed,
        left_out=left_out,
        text=text,
        timing=timing,
        untimed=untimed,
        held_out_chunks=_held_out_chunks(model, engine, request.options.n_ctx) if timing is not None else 0,
        imatrix_bytes=matrix_bytes(model),
        measured=tuple(measured(journal)),
        recommendations=recommend(_candidates(assessed), facts.budget),
        cluster=_cluster(request, model, text, options, timing, session, context) if not cannot else None,
    )


def _cluster(
    request: AdviseRequest,
    model: Model,
    text: TextAdvice,
    options: CollectOptions,
    timing: Timing | None,
    session: Session,
    context: Context,
) -> ClusterAdvice | None:
    """What the imatrix takes on the cluster, if one is named, and the text has chunks for one. Raises what a connection to it
    raises."""
    cluster = request.environment.cluster
    if cluster is None or text.n_chunks < PAIR:
        return None
    if cluster.local_workers is not None:
        threads = (cluster.cpus_per_worker or share_of_processors(cluster.local_workers),) * cluster.local_workers
    else:
        with connected(cluster, context.sink, context.stop) as workers:
            threads = workers.room()
    room = ClusterRoom(threads, cluster.local_workers is not None)
    plan = planned_chunks(ImatrixRequest(options=options), model, text.n_tokens, session.engine)
    return advise_cluster(model, plan, options, room, timing, options.threads or psutil.cpu_count() or 1)


def _levels(request: LevelsRequest, session: Session) -> tuple[tuple[Level, ...], tuple[str, ...]]:
    """Return the levels to assess (those requested, else all but :data:`_TRAINED`), and the names of those left out."""
    if request.names or request.preset:
        return choose_levels(request, session.types, session.sink), ()
    every = choose_levels(replace(request, preset="all"), session.types, session.sink)
    return (
        tuple(level for level in every if level.name not in _TRAINED),
        tuple(level.name for level in every if level.name in _TRAINED),
    )


def _open(source: Source, request: AdviseRequest, session: Session) -> Model:
    """Open the model; raise :class:`UsageError` if that would need a download or a conversion."""
    allow = request.levels.options.allow_requantize
    if isinstance(source, HubId):
        raise _not_yet(source, "downloaded", session)
    try:
        return open_source(source, request.source, session, allow_requantize=allow)
    except UsageError as error:
        if not isinstance(source, LocalDirectory):
            raise
        # A dry run converts nothing, and its own remedy is meant for users of ``run``.
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
    return UsageError(f"{model} cannot be assessed before it is {what}", why, todo)


def _machine(request: AdviseRequest, session: Session, choice: EngineChoice) -> MachineFacts:
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


def _assessed(
    levels: Sequence[Level],
    request: LevelsRequest,
    model: Model,
    expected: ExpectedMatrix | None,
    held: ContextMemory,
    budget: Budget,
    session: Session,
) -> tuple[LevelAdvice, ...]:
    """Assess every level as llama.cpp would make it with the ``expected`` imatrix (None: the model cannot have one).
    Ordered from the largest; what is in the workspace does not matter."""
    with scratch_folder() as folder:
        empty = Workspace(folder / model.name, model.name)
        scratch = replace(session, workspace=empty, journal=Journal(empty.journal))
        frozen = Frozen(model, "", tuple(stamp(path) for path in model.files))
        fingerprint = "none" if expected is None else "still to be made"
        steps = LevelPlanner(request, frozen, scratch).plan(levels, None, fingerprint, expected)
    _require_plannable(steps, model)
    assessed = [_level(step, held, budget) for step in steps]
    return tuple(sorted(assessed, key=lambda each: -(each.n_bytes or 0)))


def _predicted(levels: Sequence[Level], request: LevelsRequest, model: Model, session: Session) -> Mapping[str, PredictedKld]:
    """Predict the KLD of the levels made with the workspace's imatrix; empty without one, or without a cost map."""
    here = session.workspace.find_imatrix()
    if here is None or not session.workspace.cost_map.is_file():
        return {}
    matrix = read_matrix(here)
    planner = LevelPlanner(request, freeze(model, session), session)
    return predict_levels(planner, levels, matrix, imatrix_fingerprint(matrix, session))


def _require_plannable(steps: Sequence[LevelStep], model: Model) -> None:
    """Raise :class:`InvalidDataError` if llama.cpp refuses every level for the same reason: then the model is the cause."""
    refusals = {(step.reason, step.remedy) for step in steps if step.resolved is not None and not step.resolved.recipe.tensors}
    refused = all(step.resolved is not None and not step.resolved.recipe.tensors for step in steps)
    if refused and len(refusals) == 1:
        why, todo = refusals.pop()
        raise InvalidDataError(f"llama.cpp can make no level of {model.path.name}", why, todo)


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


def _candidates(levels: Sequence[LevelAdvice]) -> list[LevelCandidate]:
    return [
        LevelCandidate(each.level, each.n_bytes, each.fit)
        for each in levels
        if each.n_bytes is not None and each.fit is not None
    ]


def _text(request: AdviseRequest, corpus: Corpus, model: Model, session: Session, context: Context) -> TextAdvice:
    """Inspect the calibration text and assess whether it suits the model. Token by token if llama-cpp-python is available;
    otherwise the engine only counts the tokens."""
    tokenizer = str(model.path) if session.machine.tokenises else ""
    n_ctx, special = request.options.n_ctx, _parse_special(request, corpus)
    asked = request.options.parse_special
    if missing := CALIBRATION.missing():
        left_out = "Languages, scripts and near-duplicates of the text are not checked"
        context.sink(info(f"{left_out}: {', '.join(missing)} not installed. {CALIBRATION.install}"))
    inspected = inspect(InspectRequest(corpus.path, tokenizer, n_ctx=n_ctx, parse_special=asked, thorough=not missing), context)
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
    findings = tuple(sorted((*inspected.findings, *suits(suitability)), key=_gravity))
    return TextAdvice(corpus, request.text is None, inspected, n_ctx, n_tokens, n_tokens // n_ctx, findings)


def _gravity(finding: TextFinding) -> int:
    return ("error", "warning", "info").index(finding.severity)


def _has_template(model: Model) -> bool:
    return any(key.startswith("tokenizer.chat_template") for key in model.header.metadata)


def _untimed(request: AdviseRequest, text: TextAdvice) -> str:
    if not request.probe:
        return "--no-probe"
    if text.n_chunks < 2:
        return f"the text has {text.n_tokens} tokens, and an imatrix needs 2 chunks of {text.n_ctx}"
    return ""


def _parse_special(request: AdviseRequest, corpus: Corpus) -> bool:
    """Whether ``run`` would parse special tokens: as requested, or as the text was built."""
    built = corpus.built is not None and corpus.built.parse_special and request.parse_as_built
    return request.options.parse_special or built


def _held_out_chunks(model: Model, engine: Engine, n_ctx: int) -> int:
    tokens = engine.count_tokens(model.path, resource(HELD_OUT_TEXT), parse_special=False, log=None)
    return tokens // n_ctx
