"""What generating an imatrix takes: the inputs that it depends on, its chunks and ranges, its size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from msgspec import UNSET

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.context.requests import ImatrixRequest
from imatrix_runner.documents.corpus import FEW_CHUNKS, Corpus
from imatrix_runner.engines.contract import Engine
from imatrix_runner.errors import UsageError
from imatrix_runner.events import Sink, info, warning
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.imatrix.chunks import (
    ChunkPlan,
    plan_chunks,
    range_chunks,
    require_rows,
    watched_chunks,
    whole_batches,
)
from imatrix_runner.imatrix.collection_facts import ImatrixInputs
from imatrix_runner.imatrix.ineffective_collection import ineffective_collection
from imatrix_runner.imatrix.step import ImatrixStep
from imatrix_runner.models.kind import is_recurrent
from imatrix_runner.models.model import Model
from imatrix_runner.safe_text import printable

_WORTH_SAYING = 0.15


def imatrix_inputs(request: ImatrixRequest, corpus: Corpus, frozen: Frozen, engine: Engine) -> dict[str, str]:
    """Return the named inputs that a generated matrix depends on."""
    options = request.options
    limit = request.chunks if request.chunks is not None else "all"
    chunks = [f"{limit} from {request.first_chunk}", fingerprint_of(request, "imatrix")]
    how = [fingerprint_of(options, "imatrix"), f"name {corpus.name}"]
    inputs = ImatrixInputs(
        model_file=frozen.fingerprint,
        calibration_text=f"sha256:{corpus.sha256}",
        calibration_manifest=corpus.built.fingerprint if corpus.built is not None else UNSET,
        context=str(options.n_ctx),
        chunks=" ".join(filter(None, chunks)),
        options=" ".join(how),
        engine=engine.arithmetic(),
    )
    return inputs.named()


def as_built(request: ImatrixRequest, corpus: Corpus, sink: Sink) -> ImatrixRequest:
    """Return the request with special tokens parsed if the text was built that way and the user did not say otherwise."""
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


def plan_generation(
    request: ImatrixRequest, corpus: Corpus, model: Model, out: Path, reason: str, session: Session
) -> tuple[ImatrixStep, ChunkPlan]:
    options = request.options
    require_rows(options, recurrent=is_recurrent(model))
    n_tokens = session.engine.count_tokens(
        model.path, corpus.path, parse_special=options.parse_special, log=session.log("tokenize")
    )
    if corpus.marked and not options.parse_special:
        _warn_unparsed(n_tokens, corpus, model, session)
    plan = planned_chunks(request, model, n_tokens, session.engine)
    for text in ineffective_collection(request, plan, model):
        session.sink(warning(text))
    _report_rounding(request, plan, session.sink)
    share = projection_share(model) if options.ppl and session.engine.capabilities.skips_projection else 0.0
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


def planned_chunks(request: ImatrixRequest, model: Model, n_tokens: int, engine: Engine) -> ChunkPlan:
    """Return the ranges of a text of ``n_tokens`` tokens."""
    return plan_chunks(
        n_tokens,
        request.options,
        first=request.first_chunk,
        limit=request.chunks,
        range_size=_range_size(request, model, n_tokens, engine),
        save_frequency=request.save_frequency,
        spread=request.until_converged is not None,
        beyond=request.min_expert_tokens > 0,
    )


def _warn_unparsed(n_tokens: int, corpus: Corpus, model: Model, session: Session) -> None:
    """Warn of written-out control tokens that are tokenised letter by letter: the model never sees such text in use."""
    parsed = session.engine.count_tokens(model.path, corpus.path, parse_special=True, log=session.log("tokenize"))
    if parsed < n_tokens:
        session.sink(
            warning(
                f"{corpus.name} holds this model's special tokens written out, and they are tokenised letter by letter "
                f"({n_tokens} tokens instead of {parsed}). For chat transcripts add --parse-special."
            )
        )


def _range_size(request: ImatrixRequest, model: Model, n_tokens: int, engine: Engine) -> int:
    """Return the chunks from one checkpoint to the next: as requested, else few enough for decisions, with a small overhead."""
    if request.min_expert_tokens and not engine.counts_experts:
        raise UsageError(
            "--min-expert-tokens does not work with these programs",
            f"the llama-imatrix in use ({engine.identity()}) does not count the tokens that each expert saw",
            "Leave it out, or use --engine embedded.",
        )
    if request.output_frequency:
        return request.output_frequency
    options = request.options
    if model.n_experts and not engine.counts_experts:
        # One range only: a tensor is lost from any range in which one of its experts saw no token.
        return max(1, n_tokens // options.n_ctx)
    gpu = bool(engine.devices) and options.n_gpu_layers != "0"
    weights, matrix = active_params(model), matrix_bytes(model)
    to_load = model.n_bytes if engine.capabilities.loads_each_range else None
    if request.until_converged is None and not request.min_expert_tokens:
        return range_chunks(weights, to_load, matrix, options, gpu=gpu)
    cheap = range_chunks(weights, to_load, matrix, options, gpu=gpu, least=1)
    return watched_chunks(cheap, n_tokens, options)


def _report_rounding(request: ImatrixRequest, plan: ChunkPlan, sink: Sink) -> None:
    """Report numbers of chunks between files that were rounded to whole batches, in one line for both kinds."""
    phrases: list[str] = []
    size = request.output_frequency
    if size and plan.ranges[0].count != min(size, plan.n_chunks):
        phrases.append(f"saved every {whole_batches(size, request.options)} chunks")
    if any(done % request.save_frequency for done in plan.snapshots):
        some = ", ".join(map(str, plan.snapshots[:3])) + (", …" if len(plan.snapshots) > 3 else "")
        phrases.append(f"snapshots are left after {some} chunks")
    if phrases:
        sink(
            info(
                f"{request.options.chunks_at_once} chunks are computed at once, so the imatrix is "
                + " and ".join(phrases)
                + "."
            )
        )


def matrix_bytes(model: Model) -> int:
    """Return the approximate size of the model's imatrix: a float32 per column of each weight (and expert), a count, and the
    names."""
    blocks = [(*tensor.shape, 1) for tensor in model.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    return sum(4 * (shape[0] + 1) * shape[2] + 256 for shape in blocks)


def projection_share(model: Model) -> float:
    """Return the share, 0 to 1, of the output projection in computing a chunk, by weights active per token. Only the perplexity
    needs it."""
    sizes = {tensor.name: tensor.n_elements for tensor in model.tensors}
    embeddings = sizes.get("token_embd.weight", 0)
    projection = sizes.get("output.weight", embeddings)  # tied: the embeddings once more
    whole = active_params(model) - embeddings - sizes.get("output.weight", 0) + projection
    return projection / whole if whole else 0.0


def active_params(model: Model) -> int:
    """Return the weights active per token: of a mixture's expert tensors only the experts in use."""
    used = model.header.integer(f"{model.architecture}.expert_used_count") or 0
    if not model.n_experts or not 0 < used <= model.n_experts:
        return model.n_params
    experts = sum(tensor.n_elements for tensor in model.tensors if "_exps" in tensor.name)
    return model.n_params - experts + experts * used // model.n_experts
