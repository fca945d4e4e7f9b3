"""The mixes of a request: which are chosen already, which are still to be chosen, and their levels."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

from imatrix_runner.engines.abilities import CostMeter
from imatrix_runner.engines.files.cost_files import remove_references
from imatrix_runner.engines.levels import Level, offered
from imatrix_runner.engines.roundings import FEEDBACK, STOCK
from imatrix_runner.errors import InvalidDataError, ToolchainError, UsageError
from imatrix_runner.events import info, warning
from imatrix_runner.files import atomic_writer, human_bytes, sha256, stamp
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.imatrix.expected import ExpectedMatrix
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.journal import StepOutput, StepRecord, differences
from imatrix_runner.mixes.compare_recipes import SURE, RecipeComparison
from imatrix_runner.mixes.covariance_source import CovarianceSource
from imatrix_runner.mixes.measure_costs import CostMeasurement
from imatrix_runner.mixes.measuring_work import describe_work, measuring_step
from imatrix_runner.mixes.mix_chooser import MixChooser
from imatrix_runner.mixes.mix_facts import MixFacts, MixInputs, digests_of_mixes
from imatrix_runner.mixes.mix_limits import check_targets, unrounded
from imatrix_runner.mixes.mix_problem import MixProblem, make_problem
from imatrix_runner.mixes.mix_recipe import MixRecipe, as_json, as_tensor_types, read_recipe, write_new
from imatrix_runner.mixes.offload import offload
from imatrix_runner.mixes.rounding_limits import check_rounding
from imatrix_runner.mixes.rounding_speed import rounding_speed
from imatrix_runner.mixes.targets import MemoryTarget, SpeedTarget, Target
from imatrix_runner.mixes.time_budget import TokenTimes
from imatrix_runner.mixes.type_times import compute_words, seconds_per_token, type_times
from imatrix_runner.quantize.level_facts import LevelFacts
from imatrix_runner.quantize.plan import LevelStep, MixingStep
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.steps import step_id
from imatrix_runner.toolchain.store import cache_dir


@dataclass(frozen=True)
class PendingMix:
    """A mix whose types are still to be measured and chosen. ``n_bytes``: the most its file will take; None where the target
    is not a size. ``n_probes``: trials of single tensors that the cost map still needs."""

    target: Target
    n_bytes: int | None
    n_probes: int


def pending_step(mix: PendingMix) -> LevelStep:
    """A row of the plan for a mix whose types are not chosen yet."""
    level = Level(mix.target.spelling, "")
    facts = LevelFacts(mix.n_bytes, None, needs_imatrix=False, fallbacks=(), fallback_share=0.0, weightless=())
    probes = f"after {mix.n_probes} probes of tensors" if mix.n_probes else "from the measured costs"
    reason = f"its types are chosen {probes}"
    return LevelStep(level, "todo", reason, (), {}, facts)


@dataclass(frozen=True)
class MixPlanner:
    """The mixes of one request from one model. ``source``: the text that costs are measured on, how it is computed, and where
    covariances come from for a rounding that needs them. ``imatrix`` is the levels' imatrix input, ``matrix`` None while it is
    still to be made; ``expected`` are then its entries. ``reserve``: bytes that running the model takes besides its
    weights; ``tokens_per_second``: how fast the text was computed before, if it was."""

    planner: LevelPlanner
    targets: tuple[Target, ...]
    source: CovarianceSource
    imatrix: str
    matrix: MatrixFile | None
    expected: ExpectedMatrix | None = None
    reserve: int = 0
    tokens_per_second: float | None = None

    def known(self) -> tuple[dict[Target, Level], tuple[PendingMix, ...]]:
        """Return the levels of the targets whose types are chosen already, and those still to be chosen.

        Raises what :meth:`check` raises, if any is still to be chosen.
        """
        done = {target: level for target in self.targets if (level := self._chosen_before(target)) is not None}
        todo = [target for target in self.targets if target not in done]
        if not todo:
            return done, ()
        self.check()
        probes = self._measurement.missing_probes(self._chooser.probes())
        return done, tuple(PendingMix(target, self._problem.budget(target), probes) for target in todo)

    def work(self, n_pending: int) -> MixingStep | None:
        """What choosing this many mixes takes; None for none."""
        if not n_pending:
            return None
        tensors, measurement, request = self._problem.tensors, self._measurement, self.planner.request
        step = measuring_step(
            tensors,
            measurement.places,
            self.source.options.n_ctx,
            n_probes=measurement.missing_probes(self._chooser.probes()),
            n_rounded=measurement.missing_errors([tensor.rounded(kind) for tensor in tensors for kind in tensor.types]),
            n_targets=n_pending,
            thorough=request.mix.quality == "high",
            weighted=self._problem.weights is not None,
        )
        rounding = rounding_speed(cache_dir(), self.planner.session.engine.identity(), request.threads)
        return replace(step, tokens_per_second=self.tokens_per_second, weights_per_second=rounding)

    def check(self) -> None:
        """Raise an error for a model, text, engine or option with which no mix can be chosen, or a target out of range."""
        model, options = self.planner.frozen.model, self.planner.request.options
        _ = self._meter
        check_rounding(self.planner, self.planner.request.rounding)
        quantised = next((tensor for tensor in model.tensors if tensor.is_quantised), None)
        if quantised is not None:
            raise InvalidDataError(
                "A mix needs a source that is not quantised",
                f"{quantised.name} of {model.path.name} is {quantised.type_name}",
                "Start from the BF16, F16 or F32 model; stock levels can be made from this one with --allow-requantize.",
            )
        if options.prune_layers:
            raise UsageError(
                "Mixes and --prune-layers exclude each other",
                "what rounding costs is measured in the whole model",
                "Prune first (--levels COPY --prune-layers …), then mix from that file.",
            )
        _ = self._measurement.places
        check_targets(self._problem, self.targets, self.planner.request.mix.types)

    def choose(self) -> dict[Target, Level]:
        """Measure and choose what is not chosen yet, and return the level of every target. The caller holds the workspace."""
        remove_references(self.planner.session.workspace.mixes)
        done, todo = self.known()
        if todo and self.matrix is None:
            self.planner.session.sink(info("Mixes are chosen without an imatrix: types below 3 bits are left out."))
        if todo and (note := unrounded(self._problem)):
            self.planner.session.sink(warning(note))
        if (work := self.work(len(todo))) is not None:
            self.planner.session.sink(info(describe_work(work, len(todo))))
        for pending in todo:
            done[pending.target] = self._choose(pending.target)
        return {target: done[target] for target in self.targets}

    def _chosen_before(self, target: Target) -> Level | None:
        session = self.planner.session
        step = step_id("mix", target.spelling)
        record = session.journal.get(step)
        if record is None or (self.matrix is None and self.imatrix != "none"):
            return None
        if differences(record, self._inputs(target)) or not session.journal.still_there(step, save=not session.dry_run):
            return None
        facts = record.facts_as(MixFacts)
        if facts.kept_stock:
            return offered(session.engine.types).get(facts.level)
        return read_recipe(session.workspace.root / record.output.name).as_level()

    def _inputs(self, target: Target) -> dict[str, str]:
        frozen, request, session = self.planner.frozen, self.planner.request, self.planner.session
        mix = request.mix
        words = (
            f"types {mix.types or 'all'}",
            f"quality {mix.quality}",
            f"rounding {request.rounding}" if request.rounding != STOCK else "",
            f"covariances {self.source.fingerprint}" if request.rounding == FEEDBACK else "",
            fingerprint_of(request.options.unsplit, "level"),
            f"times {compute_words(self.source.options, session)}" if isinstance(target, SpeedTarget) else "",
        )
        return MixInputs(
            model_file=frozen.fingerprint,
            imatrix=self.imatrix,
            target=target.spelling,
            options=" ".join(filter(None, words)),
            text=self.source.described,
            engine=session.engine.arithmetic(),
        ).named()

    @cached_property
    def _meter(self) -> CostMeter:
        meter = self.planner.session.engine.cost_meter
        if meter is None:
            raise ToolchainError(
                "Mixes need the embedded engine",
                "llama.cpp's programs cannot round tensors of a loaded model",
                "Install llama-cpp-python and use --engine embedded, or ask for stock levels.",
            )
        return meter

    @cached_property
    def _measurement(self) -> CostMeasurement:
        planner = self.planner
        return CostMeasurement(
            planner.frozen,
            planner.session,
            self._meter,
            self.matrix,
            self.imatrix,
            self.source.corpus,
            self.source.n_chunks,
            self.source.options,
            planner.request,
        )

    @cached_property
    def _problem(self) -> MixProblem:
        return make_problem(self.planner, self.matrix, self.imatrix, self.expected, self.reserve)

    @cached_property
    def _chooser(self) -> MixChooser:
        request, cost_map = self.planner.request, self.planner.session.workspace.cost_map
        thorough = request.mix.quality == "high"
        return MixChooser(self._problem, self._measurement, cost_map, thorough, request.rounding)

    @cached_property
    def _collected(self) -> MixChooser:
        """The chooser with the covariances that it needs, which are collected here if they are not there yet."""
        if self.planner.request.rounding != FEEDBACK:
            return self._chooser
        made = self.source.obtain()
        measurement = replace(self._measurement, covariances=made.folder)
        return replace(self._chooser, measurement=measurement, covariances=made)

    @cached_property
    def _times(self) -> TokenTimes:
        """The times of types on this machine, and of what else the source takes for a token."""
        session, options, model = self.planner.session, self.source.options, self.planner.frozen.model
        meter = session.engine.speed_meter
        if meter is None:
            raise ToolchainError(
                "Mixes for a speed need the embedded engine",
                "llama.cpp's programs do not time types",
                "Use --engine embedded, or ask for a size.",
            )
        mine = {tensor.name for tensor in self._problem.tensors}
        kinds = {kind for tensor in self._problem.tensors for kind in (*tensor.choices, tensor.source_type)}
        stock = self._problem.stock.values()
        kinds |= {tensor.type for recipe in stock for tensor in recipe.tensors if tensor.name in mine}
        seconds = type_times(kinds, options, session, meter, cache_dir())
        names = (f"{model.architecture}.{key}" for key in ("expert_used_count", "expert_count"))
        used, there = (model.header.integer(name) or 0 for name in names)
        source = seconds_per_token(model.path, options, session, meter)
        return TokenTimes.of(self._problem, seconds, source, (used, there))

    def _choose(self, target: Target) -> Level:
        session = self.planner.session
        began = time.monotonic()
        chooser = replace(self._collected, times=self._times) if isinstance(target, SpeedTarget) else self._collected
        chosen = chooser.choose(target, digests_of_mixes(session.workspace))
        if isinstance(target, MemoryTarget):
            split = offload(chosen.sizes, target.vram, self.reserve)
            where = f"{human_bytes(split.vram_bytes)} on the GPU, {human_bytes(split.ram_bytes)} in memory"
            session.sink(info(f"{target.spelling}: run it with {split.command_line} ({where})"))
        if chosen.recipe is None:
            session.sink(info(f"{target.spelling}: stock {chosen.stock} is kept. {_not_better(chosen.comparison)}"))
            self._record(target, MixFacts(chosen.stock, chosen.stock, True, chosen.stock_kld), (), began)
            return offered(session.engine.types)[chosen.stock]
        session.sink(info(f"{target.spelling}: {chosen.recipe.level}. {_better(chosen.comparison, chosen.stock)}"))
        output = self._save(chosen.recipe)
        self._record(target, MixFacts(chosen.recipe.level, chosen.stock, False, chosen.stock_kld), (output,), began)
        return chosen.recipe.as_level()

    def _save(self, recipe: MixRecipe) -> StepOutput:
        """Keep the recipe, and lay the files next to the level that say how it is made; a file of the user's stays. Of two
        targets that lead to one recipe the first one's is kept, because its record names that content."""
        workspace, sink = self.planner.session.workspace, self.planner.session.sink
        kept = workspace.kept_recipe(recipe.level)
        if digests_of_mixes(workspace).get(recipe.level) != recipe.digest:
            with atomic_writer(kept) as file:
                file.write(as_json(recipe))
        level = workspace.level_file(recipe.level)
        for path, content in (
            (level.with_suffix(".recipe.json"), kept.read_bytes()),
            (level.with_suffix(".tensor-types.txt"), as_tensor_types(recipe)),
        ):
            if not write_new(path, content):
                sink(warning(f"{path.name} is there with other content, and is left as it is."))
        return StepOutput(workspace.name_of(kept), stamp(kept), sha256(kept))

    def _record(self, target: Target, facts: MixFacts, outputs: tuple[StepOutput, ...], began: float) -> None:
        seconds = time.monotonic() - began
        record = StepRecord.now(self._inputs(target), list(outputs), "asked for", seconds, facts=facts)
        self.planner.session.journal.record(step_id("mix", target.spelling), record)


def _better(won: RecipeComparison, stock: str) -> str:
    return (
        f"On the calibration text its divergence is {won.ratio:.2f} of {stock}'s (standard error {won.error:.2f}; in the "
        f"typical chunk {won.typical:.2f}), the same top token {100 * won.same_top:+.1f} points."
    )


def _not_better(lost: RecipeComparison) -> str:
    return (
        f"The best mix has {lost.ratio:.2f} of its divergence on the calibration text (standard error {lost.error:.2f}; in the "
        f"typical chunk {lost.typical:.2f}); a mix is taken where it is lower by {SURE:g} standard errors."
    )
