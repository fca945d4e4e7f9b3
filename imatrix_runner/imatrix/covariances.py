"""Covariances of weights' inputs, for rounding with error feedback: planned, collected, and kept in the workspace.

A set belongs to one model, text, choice of chunks and way of computing. The workspace keeps one; it is used again as long as
all of these are the same.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.documents.corpus import Corpus
from imatrix_runner.engines.covariance_jobs import CovarianceJob, WeightInput, grouped
from imatrix_runner.engines.files.covariance_file import StoredCovariance, stored_covariances
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.errors import EngineError, InvalidDataError, UsageError, from_os_error
from imatrix_runner.events import Finished, Started
from imatrix_runner.files import human_bytes, human_seconds, require_space
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.imatrix.chunks import count_chunks
from imatrix_runner.imatrix.coverage import wants_weights
from imatrix_runner.imatrix.expected import uncollected
from imatrix_runner.imatrix.plan_generation import active_params
from imatrix_runner.models.model import Model

STEP = "covariances"

_METHOD = "covariances 2"
"""Part of every fingerprint; to be changed whenever the same inputs give other bytes."""

_PRODUCT_SECONDS = 1.6
"""Time of a multiplication for a covariance relative to one for a weight: 1.1 to 1.6 (docs/measurements.md)."""

_SHARED = re.compile(r"^(blk\.\d+\.)(attn_(?:qkv|q|k|v)|ffn_(?:gate|up))(_exps|_shexp)?\.weight$")
_BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class CovariancePlan:
    """What collecting takes. ``runs``: how often the text is computed; ``memory_bytes`` for sums, ``disk_bytes`` for the files
    and the unfinished sums; ``effort``: about its time, relative to collecting an imatrix over the same chunks."""

    inputs: int
    runs: int
    n_chunks: int
    n_tokens: int
    memory_bytes: int
    disk_bytes: int
    effort: float


@dataclass(frozen=True)
class CovarianceSet:
    """A finished set in ``folder``: weight -> its input's covariance."""

    folder: Path
    fingerprint: str
    weights: Mapping[str, StoredCovariance]


def wanted_weights(model: Model, *, process_output: bool) -> tuple[str, ...]:
    """Return the weights that llama.cpp multiplies by while it computes a text, and that can be quantised. ``process_output``:
    the output projection, too, which is the embeddings where a model has no other."""
    absent = uncollected(model, process_output=process_output)
    names = [tensor.name for tensor in model.tensors if wants_weights(tensor.name, tensor.shape) and tensor.name not in absent]
    if process_output:
        there = {tensor.name for tensor in model.tensors}
        names += [name for name in ("output.weight", "token_embd.weight") if name in there][:1]
    return tuple(names)


def expected_inputs(model: Model, weights: Sequence[str]) -> tuple[WeightInput, ...]:
    """Return the inputs that a model's header promises, in the order of its blocks. Only the worker sees which weights really
    share an input: where it is not certain, each counts alone, so that no memory is missing."""
    wanted, members = set(weights), defaultdict[tuple[str, int, int], list[str]](list)
    for tensor in model.tensors:
        if tensor.name in wanted:
            shape = (*tensor.shape, 1, 1)
            members[_input_name(tensor.name), shape[0], shape[2]].append(tensor.name)
    inputs = [WeightInput(tuple(names), columns, matrices) for (_, columns, matrices), names in members.items()]
    return tuple(sorted(inputs, key=lambda each: _block(each.weights[0])))


def _input_name(weight: str) -> str:
    """The same name for weights that read one input."""
    found = _SHARED.match(weight)
    if found is None:
        return weight
    block, part, kind = found.groups()
    return f"{block}{part[:4]}{'_exps' if kind == '_exps' else ''}"


def _block(weight: str) -> int:
    """The number of a weight's block; the output comes last."""
    found = _BLOCK.match(weight)
    return int(found[1]) if found else 1 << 30


def plan_covariances(
    model: Model, inputs: Sequence[WeightInput], ranges: Sequence[ChunkRange], n_ctx: int, memory_bytes: int
) -> CovariancePlan:
    """Plan the collection of ``inputs`` with at most ``memory_bytes`` for sums."""
    groups = list(grouped(inputs, memory_bytes))
    largest = max((sum(each.sum_bytes for each in group) for group in groups), default=0)
    n_chunks = count_chunks(ranges)
    blocks = 1 + max((block for each in inputs if (block := _block(each.weights[0])) < 1 << 30), default=0)
    layers = sum(min(1.0, (_block(group[-1].weights[0]) + 1) / blocks) for group in groups)
    used = model.header.integer(f"{model.architecture}.expert_used_count") or 1
    products = sum(_products(each, used) for each in inputs)
    return CovariancePlan(
        inputs=len(inputs),
        runs=len(groups),
        n_chunks=n_chunks,
        n_tokens=n_chunks * n_ctx,
        memory_bytes=largest,
        disk_bytes=sum(each.file_bytes for each in inputs) + largest,
        effort=layers + _PRODUCT_SECONDS * products / max(1, active_params(model)),
    )


def _products(each: WeightInput, used: int) -> int:
    """Multiplications for a token: of a mixture's matrices those of the experts in use."""
    by_expert = each.matrices > 1 and "_exps" in each.weights[0]
    return each.elements // each.matrices * (min(used, each.matrices) if by_expert else each.matrices)


def memory_budget(model: Model) -> int:
    """Return the memory for sums: half of what is available next to the model's weights, and at least an eighth of all that is
    available."""
    available: int = psutil.virtual_memory().available
    return max((available - model.n_bytes) // 2, available // 8)


def covariance_fingerprint(
    frozen: Frozen,
    session: Session,
    corpus: Corpus,
    options: CollectOptions,
    ranges: Sequence[ChunkRange],
    weights: Sequence[str],
) -> str:
    """Return the text that says what a set depends on."""
    chunks = [(chunks.first, chunks.count) for chunks in ranges]
    how = (str(options.n_ctx), fingerprint_of(options, "imatrix"), session.engine.arithmetic())
    parts = [_METHOD, frozen.fingerprint, corpus.sha256, *how, chunks, sorted(weights)]
    return "sha256:" + hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def obtain_covariances(
    frozen: Frozen,
    session: Session,
    corpus: Corpus,
    options: CollectOptions,
    ranges: Sequence[ChunkRange],
    *,
    weights: Sequence[str] | None = None,
    memory_bytes: int | None = None,
) -> CovarianceSet:
    """Collect the covariances of the inputs of ``weights`` (default: all that can be quantised) over ``ranges`` of the text's
    chunks, unless the workspace has them. ``memory_bytes`` bounds the sums (default: :func:`memory_budget`).

    Raises :class:`UsageError` for an engine that cannot, :class:`InvalidDataError` for a text that is too short,
    :class:`NoSpaceError` where the disk is too small.
    """
    collector, folder = session.engine.covariance_collector, session.workspace.covariances
    if collector is None:
        raise UsageError(
            "Error feedback does not work with these programs",
            f"{session.engine.name} cannot collect covariances of activations",
            "Use --engine embedded, or --rounding refined.",
        )
    wanted = tuple(weights) if weights is not None else wanted_weights(frozen.model, process_output=options.process_output)
    fingerprint = covariance_fingerprint(frozen, session, corpus, options, ranges, wanted)
    if found := stored_covariances(folder, fingerprint):
        return CovarianceSet(folder, fingerprint, found)
    _require_text(frozen.model, session, corpus, options, ranges)
    memory = memory_bytes if memory_bytes is not None else memory_budget(frozen.model)
    plan = plan_covariances(frozen.model, expected_inputs(frozen.model, wanted), ranges, options.n_ctx, memory)
    _make_room(folder, plan)
    runs = f", the text computed {plan.runs} times" if plan.runs > 1 else ""
    title = f"covariances of {plan.inputs} inputs, {plan.n_tokens} tokens{runs}"
    session.sink(Started(STEP, title, plan.runs * plan.n_chunks, "chunks"))
    began = time.monotonic()
    job = CovarianceJob(
        step=STEP,
        model=frozen.model.path,
        text=corpus.path,
        ranges=tuple(ranges),
        folder=folder,
        options=options,
        weights=wanted,
        fingerprint=fingerprint,
        memory_bytes=memory,
        log=session.log(STEP),
    )
    collector.collect_covariances(job, session.sink)
    frozen.check_unchanged()
    found = stored_covariances(folder, fingerprint)
    if not found:
        raise EngineError("The covariances are not complete", f"files in {folder} are missing", "Run the same command again.")
    seconds = time.monotonic() - began
    size = sum({each.path: each.path.stat().st_size for each in found.values()}.values())
    session.sink(Finished(STEP, "done", f"{human_bytes(size)} in {human_seconds(seconds)}", seconds))
    return CovarianceSet(folder, fingerprint, found)


def _require_text(
    model: Model, session: Session, corpus: Corpus, options: CollectOptions, ranges: Sequence[ChunkRange]
) -> None:
    """Raise :class:`InvalidDataError` if the text has not all chunks."""
    log = session.log("tokenize")
    n_tokens = session.engine.count_tokens(model.path, corpus.path, parse_special=options.parse_special, log=log)
    last = max((chunks.end for chunks in ranges), default=0)
    if not count_chunks(ranges) or last * options.n_ctx > n_tokens:
        raise InvalidDataError(
            "The calibration text is too short for covariances",
            f"it has {n_tokens} tokens, {n_tokens // options.n_ctx} chunks of {options.n_ctx}; chunk {max(1, last)} is needed",
            "Give a longer text with -f or a smaller context with -c, or use --rounding refined, which needs no covariances.",
        )


def _make_room(folder: Path, plan: CovariancePlan) -> None:
    """Make the folder. Raises :class:`NoSpaceError` if the disk has not the room, next to what an earlier run left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        left = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise from_os_error(error, "making room for covariances", folder) from error
    require_space(folder, max(0, plan.disk_bytes - left), f"covariances of {plan.inputs} inputs")
