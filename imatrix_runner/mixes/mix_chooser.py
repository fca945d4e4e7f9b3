"""Chooses a mix: measures what rounding costs, solves for the target, and compares the candidates with stock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, Trial, TrialResult
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.imatrix.covariances import CovarianceSet
from imatrix_runner.imatrix.expected import uncollected
from imatrix_runner.mixes.compare_recipes import RecipeComparison, compare, kld_per_token
from imatrix_runner.mixes.cost_map import make_cost_map
from imatrix_runner.mixes.measure_costs import CostMeasurement
from imatrix_runner.mixes.measuring_work import HARM_CHUNKS, planned_probes, probe_of
from imatrix_runner.mixes.mix_candidates import Candidate, Candidates
from imatrix_runner.mixes.mix_problem import MixProblem
from imatrix_runner.mixes.mix_recipe import MeasuredRecipe, MixRecipe, recipe_digest
from imatrix_runner.mixes.mix_tensors import MixTensor
from imatrix_runner.mixes.naming import mix_name, nearest_preset
from imatrix_runner.mixes.offload import offload
from imatrix_runner.mixes.sensitivity import CostModel
from imatrix_runner.mixes.targets import KldTarget, LikeTarget, MemoryTarget, SpeedTarget, Target
from imatrix_runner.mixes.temper import tempered
from imatrix_runner.mixes.time_budget import TokenTimes, check_speed

_REFINEMENTS = 2
_HARM_BITS = 4.5

_SUM_TO_WHOLE = 0.55
"""Divergence of a whole recipe relative to the sum of its tensors' (1 / 1.8), where none was measured yet."""
_ROUNDS = 4
_NEAR = 0.03
"""How near to a wanted divergence, as a share of it, is near enough."""


@dataclass(frozen=True)
class Chosen:
    """What a target led to: ``recipe``, which is None where ``stock``, the stock level of its size, was not surely worse;
    ``sizes``: bytes of every tensor of the better one; ``stock_kld``: of the stock level, on the calibration text."""

    stock: str
    stock_kld: float
    recipe: MixRecipe | None
    comparison: RecipeComparison
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class MixChooser:
    """Chooses the mixes of one problem. ``thorough``: the types near each solution are probed, too. ``cost_map``: where the map
    of costs is written. ``rounding``: of the mixes' numbers, taken where it is better; ``covariances``: what it may need;
    ``times``: for targets of a speed."""

    problem: MixProblem
    measurement: CostMeasurement
    cost_map: Path
    thorough: bool = False
    rounding: Rounding = STOCK
    covariances: CovarianceSet | None = None
    times: TokenTimes | None = None

    def choose(self, target: Target, taken: Mapping[str, str]) -> Chosen:
        """Choose the types for a target. ``taken``: names of other mixes, with the digests of their recipes."""
        budget = self._budget(target)
        chosen = self._choose(target, budget, taken)
        for _ in range(_ROUNDS):
            # What does not go to the GPU, because whole layers go there, may be more than the memory left for it.
            if not isinstance(target, MemoryTarget) or budget is None:
                break
            split = offload(chosen.sizes, target.vram, self.problem.reserve)
            if split.ram_bytes <= target.ram or not target.ram:
                break
            budget -= split.ram_bytes - target.ram
            chosen = self._choose(target, budget, taken)
        return chosen

    def _choose(self, target: Target, budget: int | None, taken: Mapping[str, str]) -> Chosen:
        if isinstance(target, KldTarget):
            candidates: tuple[Candidate, ...] = (self._reaching(target.kld),)
        else:
            assert budget is not None
            times = self.times if isinstance(target, SpeedTarget) else None
            candidates = replace(self._candidates, times=times).within(budget)
            if self.thorough:
                refined = self._refined(budget, candidates[0], times)
                candidates = (*candidates, refined) if refined.types != candidates[0].types else candidates
        near = self._near_stock(target, budget, candidates[0])
        stock = self._candidates.stock(near)
        measured = self._measure((*candidates, stock))
        compared = {each.name: compare(measured[each.name], measured[stock.name]) for each in candidates}
        best = min(candidates, key=lambda each: compared[each.name].score)
        if (without := self._candidates.without(best, self._harmed)) is not None:
            candidates = (*candidates, without)
            measured |= self._measure((without,))
            compared[without.name] = compare(measured[without.name], measured[stock.name])
        best = min(candidates, key=lambda each: compared[each.name].score)
        if self.rounding != STOCK:
            others = tuple(self._otherwise(each) for each in _distinct(best, without))
            candidates = (*candidates, *others)
            measured |= self._measure(others)
            compared |= {each.name: compare(measured[each.name], measured[stock.name]) for each in others}
            best = min((best, *others), key=lambda each: compared[each.name].score)
        rows = tuple(_row(each, measured[each.name], compared.get(each.name)) for each in (*candidates, stock))
        won = compared[best.name]
        recipe = self._recipe(best, near, rows, taken) if won.is_better else None
        stock_kld = kld_per_token(measured[stock.name])
        return Chosen(near, stock_kld, recipe, won, self.problem.sizes(best.types if won.is_better else stock.types))

    def _budget(self, target: Target) -> int | None:
        """The most bytes of a file, for a speed the most time for a token; None for a target of quality."""
        if not isinstance(target, SpeedTarget):
            return self.problem.budget(target)
        assert self.times is not None
        check_speed(target, self.times, self.problem)
        return self.times.budget(target)

    def _near_stock(self, target: Target, budget: int | None, first: Candidate) -> str:
        """The stock level to compare with: the one that is named, else the largest that is not larger, for a speed of those
        that are not slower (if all are, the fastest)."""
        if isinstance(target, LikeTarget):
            return target.level
        if not isinstance(target, SpeedTarget) or self.times is None or budget is None:
            return self.problem.stock_near(budget or first.n_bytes)
        stock = [self._candidates.stock(name) for name in self.problem.stock]
        taken = {each.name: self.times.total(self.problem, each.types) for each in stock}
        fit = [each for each in stock if taken[each.name] <= budget]
        if not fit:
            return min(stock, key=lambda each: (taken[each.name], each.name)).name
        return max(fit, key=lambda each: (each.n_bytes, each.name)).name

    def _otherwise(self, candidate: Candidate) -> Candidate:
        """The candidate with the wanted rounding."""
        made = self.covariances
        known = made.weights if made is not None else {}
        covered = {tensor.name for tensor in self.problem.tensors if tensor.original in known}
        return candidate.rounded(self.rounding, made.fingerprint if made is not None else "", covered)

    def probes(self) -> tuple[Trial, ...]:
        """The trials of single tensors from which all costs follow."""
        return planned_probes(self.problem.tensors, uncollected(self.measurement.frozen.model))

    @cached_property
    def _candidates(self) -> Candidates:
        """From the costs of every tensor and type, which are measured and written to the cost map."""
        return self._candidates_from(self.probes())

    def _refined(self, budget: int, first: Candidate, times: TokenTimes | None) -> Candidate:
        """The best within a budget by costs of which those near the solution are measured: of each tensor the chosen type and
        the next smaller and larger ones. What they change may lead to other types, so this is done twice."""
        probed = {trial.name: trial for trial in self.probes()}
        found = first
        for _ in range(_REFINEMENTS):
            probed |= {trial.name: trial for trial in self._near(found)}
            (found, *_) = replace(self._candidates_from(tuple(probed.values())), times=times).within(budget)
        return replace(found, name="mix of measured neighbours")

    def _near(self, candidate: Candidate) -> Iterator[Trial]:
        """Probes of each tensor's type, and of those next to it among the types that no other beats in size and error."""
        for tensor in self.problem.tensors:
            if tensor.original in {trial.tensors[0].name for trial in self.probes()}:
                kinds = _undominated(tensor, self._errors)
                chosen = candidate.types[tensor.name]
                place = min(range(len(kinds)), key=lambda at: abs(tensor.padded_bytes(kinds[at]) - tensor.padded_bytes(chosen)))
                for kind in {*kinds[max(0, place - 1) : place + 2], *({chosen} & {*tensor.types})}:
                    yield probe_of(tensor, kind)

    @cached_property
    def _errors(self) -> dict[RoundedTensor, RoundingError]:
        tensors = self.problem.tensors
        return self.measurement.errors([tensor.rounded(kind) for tensor in tensors for kind in tensor.types])

    def _candidates_from(self, probes: Sequence[Trial]) -> Candidates:
        measurement, errors = self.measurement, self._errors
        trials = _largest_first(probes, errors)
        results = measurement.probes(trials)
        costs = CostModel.of(errors.values(), trials, tempered(tuple(results.values())))
        document = make_cost_map(
            self.problem.tensors,
            tuple(errors.values()),
            [(trial, results[trial.name]) for trial in trials],
            costs,
            CostModel.of(errors.values(), trials, results.values()),
            model=measurement.frozen.fingerprint,
            imatrix=measurement.imatrix,
            text=measurement.corpus.name,
            text_sha256=measurement.corpus.sha256,
            n_ctx=measurement.options.n_ctx,
            engine=measurement.session.engine.arithmetic(),
        )
        document.write(self.cost_map)
        return Candidates(self.problem, costs)

    def _reaching(self, kld: float) -> Candidate:
        """The smallest candidate whose measured divergence is at most ``kld``. What single tensors cost adds up to more than
        the whole, so the sum is scaled by what was measured, until the measured divergence is near."""
        scale = _SUM_TO_WHOLE
        best: Candidate | None = None
        for _ in range(_ROUNDS):
            candidate = self._candidates.reaching(kld / scale)
            if not candidate.trial(self.problem).tensors:
                break  # nothing is rounded: the source itself
            got = kld_per_token(self._measure((candidate,))[candidate.name])
            if got <= kld and (best is None or candidate.n_bytes < best.n_bytes):
                best = candidate
            if candidate.cost <= 0 or kld * (1 - _NEAR) <= got <= kld:
                break
            scale = max(got, kld * 1e-3) / candidate.cost * (1.0 if got <= kld else 1 + _NEAR / 2)
        if best is None:
            raise InvalidDataError(
                f"No mix with a divergence of {kld:g} was found",
                "all candidates that round any tensor have more",
                "Allow a larger divergence, or larger types (q8_0 among --types).",
            )
        return best

    @cached_property
    def _harmed(self) -> frozenset[str]:
        """The tensors that are better rounded without the imatrix, as measured in a recipe of about 4.5 bits. Rounding errors
        that are weighted by the imatrix always choose it; the divergence does not."""
        least, most = self.problem.range
        budget = self.problem.header_bytes + int(_HARM_BITS * self.problem.n_elements / 8)
        (typical, *_) = self._candidates.within(min(max(budget, least), most))
        tried = self._candidates.without_imatrix(typical)
        if not tried:
            return frozenset()
        measured = self._measure((typical, *tried), HARM_CHUNKS)
        better = [each for each in tried if compare(measured[each.name], measured[typical.name]).is_better]
        return frozenset(name for each in better for name in each.unweighted)

    def _measure(self, candidates: Sequence[Candidate], most: int | None = None) -> dict[str, TrialResult]:
        """The divergence of whole recipes, by the candidates' names; on ``most`` chunks at most."""
        trials = {each.name: each.trial(self.problem) for each in candidates}
        distinct = {trial.name: trial for trial in trials.values()}
        results = self.measurement.recipes(tuple(distinct.values()), most)
        return {name: results[trial.name] for name, trial in trials.items()}

    def _recipe(self, chosen: Candidate, stock: str, rows: tuple[MeasuredRecipe, ...], taken: Mapping[str, str]) -> MixRecipe:
        bpw = self.problem.bits_per_weight(chosen.n_bytes)
        elements: Counter[str] = Counter()
        for tensor in self.problem.tensors:
            elements[chosen.types[tensor.name]] += prod(tensor.shape)
        ftype = nearest_preset(elements, bpw, tuple(self.problem.stock))
        unweighted = tuple(tensor.original for tensor in self.problem.tensors if tensor.name in chosen.unweighted)
        digest = recipe_digest(chosen.types, unweighted, chosen.rounding, chosen.covariances)
        before = f"{chosen.rounding.upper()}-" if chosen.rounding != STOCK else ""
        others = [name.removeprefix(before) for name, other in taken.items() if other != digest and name.startswith(before)]
        return MixRecipe(
            level=before + mix_name(bpw, ftype, others),
            ftype=ftype,
            types=dict(chosen.types),
            unweighted=unweighted,
            n_bytes=chosen.n_bytes - (self.problem.mark_bytes if chosen.rounding == STOCK else 0),
            bits_per_weight=bpw,
            predicted_kld=chosen.cost,
            measured=rows,
            stock=stock,
            rounding=chosen.rounding,
            covariances=chosen.covariances,
            taken=chosen.name,
        )


def _distinct(best: Candidate, without: Candidate | None) -> tuple[Candidate, ...]:
    """Those to be rounded otherwise: the best, with all its tensors and without those that the imatrix harms."""
    whole = replace(best, unweighted=frozenset()) if best.unweighted else best
    return (whole, without) if without is not None else (whole,)


def _undominated(tensor: MixTensor, errors: Mapping[RoundedTensor, RoundingError]) -> tuple[str, ...]:
    """The tensor's types in order of size, without those that a type of no more bytes beats in error."""
    found: list[str] = []
    for kind in sorted(tensor.types, key=lambda kind: (tensor.padded_bytes(kind), errors[tensor.rounded(kind)].weighted)):
        if not found or errors[tensor.rounded(kind)].weighted < errors[tensor.rounded(found[-1])].weighted:
            found.append(kind)
    return tuple(found)


def _largest_first(trials: Sequence[Trial], errors: Mapping[RoundedTensor, RoundingError]) -> tuple[Trial, ...]:
    """Order probes by their relative errors: an interrupted measurement then has those that matter most."""

    def relative(trial: Trial) -> float:
        error = errors[trial.tensors[0]]
        return error.weighted / error.norm if error.norm > 0 else 0.0

    return tuple(sorted(trials, key=lambda trial: (-relative(trial), trial.name)))


def _row(candidate: Candidate, result: TrialResult, compared: RecipeComparison | None) -> MeasuredRecipe:
    kld = kld_per_token(result)
    if compared is None:
        return MeasuredRecipe(candidate.name, candidate.n_bytes, kld)
    ratio, error, typical, same_top = compared.ratio, compared.error, compared.typical, compared.same_top
    return MeasuredRecipe(candidate.name, candidate.n_bytes, kld, ratio, error, typical, same_top)
