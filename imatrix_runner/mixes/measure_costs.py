"""Measures what rounding costs: errors of every tensor and type, probes of single tensors, trials of whole recipes.

Everything measured stays in the workspace's ``.mixes`` folder, named by what it depends on, so that further types, targets and
recipes only add to it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.context.requests import LevelsRequest
from imatrix_runner.documents.corpus import Corpus
from imatrix_runner.engines.abilities import CostMeter
from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, RoundingErrorsJob, Trial, TrialResult, TrialsJob
from imatrix_runner.engines.files.cost_files import read_costs
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.events import Finished, Started
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.mixes.rounding_speed import remember_rounding
from imatrix_runner.models.model import Model
from imatrix_runner.quantize.pass_levels import buffer_bytes
from imatrix_runner.steps import imatrix_in
from imatrix_runner.toolchain.store import cache_dir

ENOUGH = 0.1
"""A probe ends when the standard error of its mean divergence is below this share of it."""

PROBE_TOKENS = 3072
"""Tokens of a probe at most; a forward pass has 2,048. Of a model with L layers all probes together then take at most 14 L."""

SMALL, PROBE_TOKENS_OF_SMALL = 50_000_000, 8192
"""Weights up to which a model is small, and its probes may take more tokens: they are less alike from chunk to chunk there, and
the noise of shorter probes cost the demo model a fifth of what a mix of the size of IQ4_XS gains."""

_PROBE_CONTEXT = 256
"""Tokens of a probe's chunk: of few tokens, many short chunks say more about a text than few long ones."""
_RECIPE_CHUNKS = 32
_SCORED_FROM = 4
"""The first quarter of a chunk's tokens has too little context to be like a text in use."""
_FEWEST = 6


@dataclass(frozen=True)
class Places:
    """Numbers of chunks of the text for probes (chunks of ``probe_context`` tokens) and for whole recipes, none of which share
    a token; each in the order they are computed: every batch is spread over the text."""

    probes: tuple[int, ...]
    probe_context: int
    recipes: tuple[int, ...]


def places(n_chunks: int, options: CollectOptions, probe_tokens: int) -> Places:
    """Choose places in a text of ``n_chunks``. Raises :class:`InvalidDataError` for too few."""
    if n_chunks < _FEWEST:
        raise InvalidDataError(
            "The calibration text is too short to measure what rounding costs",
            f"it has {n_chunks} chunks, and at least {_FEWEST} are needed",
            "Give a longer text with -f, or a smaller -c.",
        )
    context = options.n_ctx if options.n_ctx % _PROBE_CONTEXT else _PROBE_CONTEXT
    parts = options.n_ctx // context
    n_probes = max(2, probe_tokens // context)
    count = min(n_probes + _RECIPE_CHUNKS, n_chunks)
    points = [(2 * index + 1) * n_chunks // (2 * count) for index in range(count)]
    every = max(2, count // n_probes)
    probes = [point for index, point in enumerate(points) if index % every == 0][:n_probes]
    recipes = [point for point in points if point not in probes]
    return Places(
        _spread([point * parts for point in probes], max(1, options.n_batch // context)),
        context,
        _spread(recipes, options.chunks_at_once),
    )


def places_of(model: Model, n_chunks: int, options: CollectOptions) -> Places:
    """The places in a text for a model. Raises :class:`InvalidDataError` for too few chunks."""
    small = sum(tensor.n_elements for tensor in model.tensors) <= SMALL
    return places(n_chunks, options, PROBE_TOKENS_OF_SMALL if small else PROBE_TOKENS)


def _spread(points: Sequence[int], at_once: int) -> tuple[int, ...]:
    """The points in an order in which every ``at_once`` consecutive ones are spread over all of them."""
    step = max(1, len(points) // at_once)
    return tuple(points[index] for first in range(step) for index in range(first, len(points), step))


@dataclass(frozen=True)
class CostMeasurement:
    """Measures one model with one imatrix on one text, computed with ``options``. ``imatrix`` is the input of levels made with
    it (:func:`~imatrix_runner.steps.imatrix_input`), ``n_chunks`` the number of the text's chunks. ``covariances``: the folder
    of those of the model's inputs; the names of trials that round with them say which they are."""

    frozen: Frozen
    session: Session
    meter: CostMeter
    matrix: MatrixFile | None
    imatrix: str
    corpus: Corpus
    n_chunks: int
    options: CollectOptions
    levels: LevelsRequest
    covariances: Path | None = None

    @property
    def places(self) -> Places:
        return places_of(self.frozen.model, self.n_chunks, self.options)

    def errors(self, tensors: Sequence[RoundedTensor]) -> dict[RoundedTensor, RoundingError]:
        """Round every tensor to every type, those that were rounded before excepted."""
        fingerprint = self._fingerprint("errors", self.session.engine.identity())
        out = self._file("errors", fingerprint)
        options = self.levels.options
        step = "errors"
        job = RoundingErrorsJob(
            step=step,
            sources=self.frozen.model.files,
            tensors=tuple(tensors),
            imatrix=self.matrix.path if self.matrix is not None else None,
            out=out,
            fingerprint=fingerprint,
            threads=self.levels.threads,
            buffer_bytes=buffer_bytes(options.max_buffer_size),
            log=self.session.log(step),
            include_weights=options.include_weights,
            exclude_weights=options.exclude_weights,
            native_kernels=self.levels.kernels == "auto",
        )
        found = {error.tensor: error for error in read_costs(out, fingerprint, RoundingError)}
        todo = [tensor for tensor in tensors if tensor not in found]
        if todo:
            self._make_folder()
            n_types = len({tensor.type for tensor in tensors})
            self.session.sink(Started(step, f"rounding errors of {n_types} types", None, "weights"))
            began = time.monotonic()
            self.meter.rounding_errors(job, self.session.sink)
            seconds = time.monotonic() - began
            remember_rounding(cache_dir(), self.session.engine.identity(), self.levels.threads, self._weights(todo), seconds)
            self.frozen.check_unchanged()
            found = {error.tensor: error for error in read_costs(out, fingerprint, RoundingError)}
            self.session.sink(Finished(step, "done", f"{len(found)} pairs of tensor and type"))
        return {tensor: found[tensor] for tensor in tensors}

    def missing_errors(self, tensors: Sequence[RoundedTensor]) -> int:
        """How many weights are still to be rounded for the errors of these, counted once for each type."""
        fingerprint = self._fingerprint("errors", self.session.engine.identity())
        known = {error.tensor for error in read_costs(self._file("errors", fingerprint), fingerprint, RoundingError)}
        return self._weights([tensor for tensor in tensors if tensor not in known])

    def _weights(self, tensors: Iterable[RoundedTensor]) -> int:
        sizes = {tensor.name: tensor.n_elements for tensor in self.frozen.model.tensors}
        return sum(sizes[tensor.name] for tensor in tensors)

    def probes(self, trials: Sequence[Trial]) -> dict[str, TrialResult]:
        """Measure trials of single tensors, until each is known well enough."""
        options, title = self._probe_options, f"{len(trials)} probes of tensors"
        return self._trials("probes", trials, self.places.probes, options, ENOUGH, title)

    def missing_probes(self, trials: Sequence[Trial]) -> int:
        """How many of these were not measured yet."""
        fingerprint = self._trials_fingerprint("probes", self.places.probes, self._probe_options)
        known = {result.trial for result in read_costs(self._file("probes", fingerprint), fingerprint, TrialResult)}
        return sum(trial.name not in known for trial in trials)

    @property
    def _probe_options(self) -> CollectOptions:
        return replace(self.options, n_ctx=self.places.probe_context)

    def recipes(self, trials: Sequence[Trial], most: int | None = None) -> dict[str, TrialResult]:
        """Measure trials of whole recipes, all on the same chunks (``most`` at most); none of these is a probe's."""
        chunks = self.places.recipes[:most]
        return self._trials(
            "recipes", trials, chunks, self.options, 0.0, f"{len(trials)} {'recipes' if len(trials) > 1 else 'recipe'} tried"
        )

    def _trials(
        self,
        step: str,
        trials: Sequence[Trial],
        chunks: tuple[int, ...],
        options: CollectOptions,
        enough: float,
        title: str,
    ) -> dict[str, TrialResult]:
        fingerprint = self._trials_fingerprint(step, chunks, options)
        out = self._file(step, fingerprint)
        job = TrialsJob(
            step=step,
            model=self.frozen.model.path,
            text=self.corpus.path,
            chunks=chunks,
            trials=tuple(trials),
            imatrix=self.matrix.path if self.matrix is not None else None,
            out=out,
            options=replace(options, ppl=True),
            fingerprint=fingerprint,
            log=self.session.log(step),
            first_scored=options.n_ctx // _SCORED_FROM,
            enough=enough,
            include_weights=self.levels.options.include_weights,
            exclude_weights=self.levels.options.exclude_weights,
            native_kernels=self.levels.kernels == "auto",
            covariances=self.covariances,
        )
        found = {result.trial: result for result in read_costs(out, fingerprint, TrialResult)}
        if any(trial.name not in found for trial in trials):
            self._make_folder()
            self.session.sink(Started(step, title, None, "batches"))
            self.meter.trials(job, self.session.sink)
            self.frozen.check_unchanged()
            found = {result.trial: result for result in read_costs(out, fingerprint, TrialResult)}
            self.session.sink(Finished(step, "done", f"{len(found)} measured"))
        return {trial.name: found[trial.name] for trial in trials}

    def _trials_fingerprint(self, step: str, chunks: tuple[int, ...], options: CollectOptions) -> str:
        compute, special = fingerprint_of(options, "figures"), str(options.parse_special)
        arithmetic, n_ctx = self.session.engine.arithmetic(), str(options.n_ctx)
        return self._fingerprint(step, arithmetic, self.corpus.sha256, n_ctx, compute, special, str(chunks))

    def _fingerprint(self, *further: str) -> str:
        options = self.levels.options
        _, imatrix = imatrix_in(self.imatrix)
        parts = [self.frozen.fingerprint, imatrix, *options.include_weights, "", *options.exclude_weights, "", *further]
        return "sha256:" + hashlib.sha256(msgspec.json.encode(parts)).hexdigest()

    def _make_folder(self) -> None:
        folder = self.session.workspace.mixes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, "making room for measured costs", folder) from error

    def _file(self, what: str, fingerprint: str) -> Path:
        return self.session.workspace.mixes / f"{what}-{fingerprint.removeprefix('sha256:')[:12]}.jsonl"
