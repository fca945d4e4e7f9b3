"""The calibration text as what costs and roundings are measured on, and where covariances of inputs come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.documents.corpus import Corpus
from imatrix_runner.engines.files.covariance_file import stored_covariances
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import human_bytes
from imatrix_runner.imatrix.covariances import (
    CovarianceSet,
    covariance_fingerprint,
    expected_inputs,
    memory_budget,
    obtain_covariances,
    plan_covariances,
    wanted_weights,
)
from imatrix_runner.mixes.measure_costs import places_of
from imatrix_runner.mixes.mix_facts import text_input

FEWEST_TOKENS = 2048
"""Tokens below which no covariance says anything."""


@dataclass(frozen=True)
class CovarianceSource:
    """``options``: how the text is computed; ``n_tokens``: how many of its tokens covariances are collected from."""

    frozen: Frozen
    session: Session
    corpus: Corpus
    options: CollectOptions
    n_tokens: int

    @cached_property
    def n_chunks(self) -> int:
        """Whole chunks of the text."""
        log, special = self.session.log("tokenize"), self.options.parse_special
        model, text = self.frozen.model.path, self.corpus.path
        return self.session.engine.count_tokens(model, text, parse_special=special, log=log) // self.options.n_ctx

    @property
    def described(self) -> str:
        """The text as an input of steps that measure on it."""
        return text_input(self.corpus.sha256, self.options.n_ctx)

    @cached_property
    def ranges(self) -> tuple[ChunkRange, ...]:
        """The chunks that covariances are collected from: :func:`spread` over the text, none of them used to compare recipes.

        Raises :class:`InvalidDataError` for a text that is too short to measure on."""
        kept = {*places_of(self.frozen.model, self.n_chunks, self.options).recipes}
        free = [chunk for chunk in range(self.n_chunks) if chunk not in kept]
        if len(free) * self.options.n_ctx < FEWEST_TOKENS:
            raise InvalidDataError(
                "The calibration text is too short for error feedback",
                f"{len(free)} chunks of {self.options.n_ctx} tokens can be learnt from, and {FEWEST_TOKENS} tokens are needed",
                "Give a longer text with -f, or use --rounding refined, which learns nothing from it.",
            )
        return spread(free, -(-self.n_tokens // self.options.n_ctx), self.options.chunks_at_once)

    @cached_property
    def fingerprint(self) -> str:
        """What covariances depend on, known before they are collected."""
        weights = wanted_weights(self.frozen.model, process_output=self.options.process_output)
        return covariance_fingerprint(self.frozen, self.session, self.corpus, self.options, self.ranges, weights)

    def work(self) -> str:
        """A sentence on what collecting will take; empty where the workspace has the covariances."""
        if stored_covariances(self.session.workspace.covariances, self.fingerprint):
            return ""
        model = self.frozen.model
        inputs = expected_inputs(model, wanted_weights(model, process_output=self.options.process_output))
        plan = plan_covariances(model, inputs, self.ranges, self.options.n_ctx, memory_budget(model))
        runs = f", the text computed {plan.runs} times" if plan.runs > 1 else ""
        return (
            f"For error feedback: covariances of {plan.inputs} inputs over {plan.n_tokens:,} tokens{runs}, about "
            f"{plan.effort:.1f} of the time of an imatrix of as many; {human_bytes(plan.memory_bytes)} of memory, "
            f"{human_bytes(plan.disk_bytes)} on the disk."
        )

    def obtain(self) -> CovarianceSet:
        """Collect what is not there yet. The caller holds the workspace."""
        return obtain_covariances(self.frozen, self.session, self.corpus, self.options, self.ranges)


def spread(free: Sequence[int], count: int, at_once: int) -> tuple[ChunkRange, ...]:
    """``count`` of the chunks ``free`` (at most all of them) in ranges that are evenly distributed among them. A range has at
    most ``at_once`` chunks, which are computed in one batch, and none that is not free."""
    runs: list[ChunkRange] = []
    for chunk in free:
        last = runs[-1] if runs else None
        if last is not None and last.end == chunk and last.count < at_once:
            runs[-1] = ChunkRange(last.first, last.count + 1)
        else:
            runs.append(ChunkRange(chunk, 1))
    total = sum(run.count for run in runs)
    count = min(count, total)
    chosen: list[ChunkRange] = []
    passed = taken = 0
    for run in runs:
        passed += run.count
        if taken * total < passed * count and taken < count:
            chosen.append(ChunkRange(run.first, min(run.count, count - taken)))
            taken += chosen[-1].count
    return tuple(chosen)
