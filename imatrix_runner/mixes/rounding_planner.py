"""The levels of a request whose numbers are not rounded as llama-quantize does: each is compared with llama-quantize's bytes of
the same types, and made only if it predicts surely more like the source."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from imatrix_runner.engines.cost_jobs import RoundedTensor, Trial, TrialResult
from imatrix_runner.engines.levels import Level
from imatrix_runner.engines.roundings import FEEDBACK, STOCK, rounding_of
from imatrix_runner.events import info
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.imatrix.expected import ExpectedMatrix, uncollected
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.journal import StepRecord, differences
from imatrix_runner.mixes.compare_recipes import SURE, compare, kld_per_token
from imatrix_runner.mixes.covariance_source import CovarianceSource
from imatrix_runner.mixes.measure_costs import CostMeasurement
from imatrix_runner.mixes.rounding_facts import RoundingFacts, RoundingInputs, marked
from imatrix_runner.mixes.rounding_limits import check_rounding
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.quantize.recipe import Recipe
from imatrix_runner.steps import step_id


@dataclass(frozen=True)
class RoundingPlanner:
    """The roundings of one request from one model. ``levels``: those whose rounding is not stock, as named; ``source``: where
    covariances come from, and the text that roundings are compared on. ``imatrix`` is the levels' imatrix input, ``matrix``
    None while it is still to be made."""

    planner: LevelPlanner
    levels: tuple[Level, ...]
    source: CovarianceSource
    imatrix: str
    matrix: MatrixFile | None
    expected: ExpectedMatrix | None = None

    def known(self) -> dict[str, Level]:
        """Return by its name what becomes of each level: itself, with its mark, or the stock level that was better. Those that
        were not compared yet are taken as they are named.

        Raises an error for a model or an engine with which numbers cannot be rounded otherwise."""
        self.check()
        return {level.name: self._known(level) or self._marked(level) for level in self.levels}

    def check(self) -> None:
        """Raise :class:`RunnerError` if the model, the engine or an option does not allow it."""
        check_rounding(self.planner, self.levels[0].rounding)

    def choose(self) -> dict[str, Level]:
        """Compare what was not compared yet, and return what becomes of each level. The caller holds the workspace."""
        self.check()
        todo = [level for level in self.levels if self._known(level) is None]
        if todo:
            self._compare(todo)
        return {level.name: self._known(level) or self._marked(level) for level in self.levels}

    def _marked(self, level: Level) -> Level:
        return marked(level, self.source.fingerprint if level.rounding == FEEDBACK else "")

    def _known(self, level: Level) -> Level | None:
        record = self.planner.session.journal.get(step_id("rounding", level.name))
        if record is None or (self.matrix is None and self.imatrix != "none"):
            return None
        if differences(record, self._inputs(level)):
            return None
        return _stock(level) if record.facts_as(RoundingFacts).kept_stock else self._marked(level)

    def _inputs(self, level: Level) -> dict[str, str]:
        session, request = self.planner.session, self.planner.request
        covariances = f" with covariances {self.source.fingerprint}" if level.rounding == FEEDBACK else ""
        return RoundingInputs(
            model_file=self.planner.frozen.fingerprint,
            imatrix=self.imatrix,
            rounding=f"{level.rounding}{covariances}",
            recipe=self._recipes[_stock(level).name].fingerprint,
            options=fingerprint_of(request.options.unsplit, "level"),
            text=self.source.described,
            engine=session.engine.arithmetic(),
        ).named()

    @cached_property
    def _recipes(self) -> Mapping[str, Recipe]:
        """The recipes of the same types, by the names of the stock levels."""
        stock = list({_stock(level).name: _stock(level) for level in self.levels}.values())
        return self.planner.recipes(stock, self.matrix, self.imatrix, self.expected)

    def _compare(self, levels: Sequence[Level]) -> None:
        session = self.planner.session
        began = time.monotonic()
        covered: Mapping[str, object] = {}
        folder: Path | None = None
        if any(level.rounding == FEEDBACK for level in levels):
            made = self.source.obtain()
            covered, folder = made.weights, made.folder
        possible = [level for level in levels if not self._recipes[_stock(level).name].failures]
        trials = {level: self._trial(level, covered) for level in possible}
        stocks = {level: self._trial(_stock(level), covered) for level in possible}
        every = {trial.name: trial for trial in (*stocks.values(), *trials.values())}
        results = self._measurement(folder).recipes(tuple(every.values())) if every else {}
        for level in possible:
            mine, other = results[trials[level].name], results[stocks[level].name]
            facts = _facts(level, mine, other)
            session.sink(info(_described(facts)))
            seconds = (time.monotonic() - began) / len(possible)
            record = StepRecord.now(self._inputs(level), [], "asked for", seconds, facts=facts)
            session.journal.record(step_id("rounding", level.name), record)

    def _trial(self, level: Level, covered: Mapping[str, object]) -> Trial:
        """The whole recipe of a level, rounded as it asks for; tensors that computing a text never reaches stay."""
        recipe, unreached = self._recipes[_stock(level).name], uncollected(self.planner.frozen.model)
        tensors = tuple(
            RoundedTensor(
                tensor.original,
                tensor.type,
                tensor.original not in level.exclude_weights,
                rounding_of(tensor.type, level.rounding, has_covariance=tensor.original in covered),
            )
            for tensor in recipe.tensors
            if tensor.changes and not (tensor.original.startswith("blk.") and tensor.original in unreached)
        )
        how = f" {self.source.fingerprint[:23]}" if level.rounding == FEEDBACK else ""
        return Trial(f"{level.rounding}{how} {recipe.fingerprint[:16]}", tensors)

    def _measurement(self, covariances: Path | None) -> CostMeasurement:
        planner, source = self.planner, self.source
        meter = planner.session.engine.cost_meter
        assert meter is not None
        return CostMeasurement(
            planner.frozen,
            planner.session,
            meter,
            self.matrix,
            self.imatrix,
            source.corpus,
            source.n_chunks,
            source.options,
            planner.request,
            covariances,
        )


def _stock(level: Level) -> Level:
    """The level of the same types with llama-quantize's rounding."""
    return replace(level, name=level.name.removeprefix(f"{level.rounding.upper()}-"), rounding=STOCK)


def _facts(level: Level, mine: TrialResult, other: TrialResult) -> RoundingFacts:
    found = compare(mine, other)
    return RoundingFacts(
        level.name,
        _stock(level).name,
        not found.is_better,
        kld_per_token(mine),
        kld_per_token(other),
        found.ratio,
        found.error,
        found.typical,
        found.same_top,
    )


def _described(facts: RoundingFacts) -> str:
    """What the comparison showed, in a sentence or two."""
    figures = (
        f"on the calibration text its divergence is {facts.ratio:.2f} of {facts.stock}'s (standard error {facts.error:.2f}; in "
        f"the typical chunk {facts.typical:.2f}), the same top token {100 * facts.same_top:+.1f} points"
    )
    if not facts.kept_stock:
        return f"{facts.level}: {figures}."
    taken = f"other numbers are taken where it is lower by {SURE:g} standard errors"
    return f"{facts.level}: {figures}. Stock {facts.stock} is kept: {taken}."
