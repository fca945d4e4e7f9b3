"""Candidates for a mix: solved for a size or a divergence, or taken from stock. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, log
from statistics import median

from imatrix_runner.engines.cost_jobs import Trial
from imatrix_runner.engines.roundings import FEEDBACK, STOCK, Rounding, rounding_of
from imatrix_runner.mixes.mix_problem import MixProblem
from imatrix_runner.mixes.mix_recipe import recipe_digest
from imatrix_runner.mixes.mix_tensors import MixTensor
from imatrix_runner.mixes.sensitivity import CostModel
from imatrix_runner.mixes.solve import Choice, Item, Solution, Solver
from imatrix_runner.mixes.time_budget import TokenTimes
from imatrix_runner.models.tensor_patterns import component
from imatrix_runner.quantize.resolve import bits

HALF_SMOOTHED = "mix of smoothed costs"

WITH_FLOOR = "mix with at least 5 bits for what every token needs"

_FLOOR = bits("Q5_K")
_EXPERTS = re.compile(r"_(ch)?exps$")
_STATE = re.compile(r"^ssm_")


@dataclass(frozen=True)
class Candidate:
    """Types for every tensor of the problem, by its name in the output; ``cost``: the sum of its tensors' costs, in nats;
    ``unweighted``: the tensors that are rounded without the imatrix; ``rounding``: how, with the fingerprint of the
    ``covariances`` that it uses; ``others``: how each of those is rounded that llama-quantize rounds otherwise."""

    name: str
    types: Mapping[str, str]
    n_bytes: int
    cost: float
    unweighted: frozenset[str] = frozenset()
    rounding: Rounding = STOCK
    covariances: str = ""
    others: Mapping[str, Rounding] = field(default_factory=dict)

    def trial(self, problem: MixProblem) -> Trial:
        """The trial that rounds the whole model so, as far as computing a text reaches it."""
        rounded = tuple(
            replace(
                tensor.rounded(kind),
                weighted=tensor.name not in self.unweighted,
                rounding=self.others.get(tensor.name, STOCK),
            )
            for tensor in problem.tensors
            if tensor.reached and (kind := self.types[tensor.name]) != tensor.source_type
        )
        digest = recipe_digest(self.types, [*self.unweighted], self.rounding, self.covariances)
        return Trial(f"recipe {digest[:16]}", rounded)

    def rounded(self, rounding: Rounding, covariances: str, covered: Collection[str]) -> Candidate:
        """The same types, rounded otherwise, but for tensors that the imatrix harms. ``covered``: the weights whose inputs have
        a covariance, by their names in the output."""
        others = {
            name: rounding_of(kind, rounding, has_covariance=name in covered)
            for name, kind in self.types.items()
            if name not in self.unweighted
        }
        return replace(
            self,
            name=f"{self.name}, {rounding}",
            rounding=rounding,
            covariances=covariances if rounding == FEEDBACK else "",
            others={name: each for name, each in others.items() if each != STOCK},
        )


@dataclass(frozen=True)
class Candidates:
    """Makes the candidates of a problem from what rounding its tensors costs."""

    problem: MixProblem
    costs: CostModel
    times: TokenTimes | None = None

    def within(self, budget: int) -> tuple[Candidate, ...]:
        """The best of at most ``budget`` bytes, or with ``times`` of at most this time for a token: by the costs as measured,
        and by costs that are smoothed, half and wholly; with a floor where tensors are active for every token and others are
        not, if it fits. Each recipe once."""
        found: dict[str, Candidate] = {}
        for name, solver in self._solvers.items():
            if solver.range()[0] > budget and name == WITH_FLOOR:
                continue
            candidate = self._candidate(name, solver, solver.within(min(budget, solver.range()[1])))
            found.setdefault(recipe_digest(candidate.types), candidate)
        return tuple(found.values())

    def reaching(self, cost: float) -> Candidate:
        """The smallest of at most this cost."""
        solver = self._solvers[HALF_SMOOTHED]
        solution = solver.reaching(cost)
        return self._candidate(f"mix of {solution.n_bytes} bytes", solver, solution)

    def stock(self, name: str) -> Candidate:
        recipe = self.problem.stock[name]
        mine = {tensor.name for tensor in self.problem.tensors}
        types = {tensor.name: tensor.type for tensor in recipe.tensors if tensor.name in mine}
        return Candidate(name, types, recipe.file_bytes or 0, 0.0)

    def without_imatrix(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """The candidate with some of its tensors rounded without the imatrix: those of one kind together, and those of the
        first block, which see the text itself, apart from the others."""
        groups: dict[str, frozenset[str]] = {}
        for tensor in self.problem.tensors:
            if self.problem.may_leave_out(tensor, candidate.types[tensor.name]):
                where = "first block" if tensor.original.startswith("blk.0.") else "other blocks"
                name = f"{candidate.name}, {component(tensor.original)} of the {where} without imatrix"
                groups[name] = groups.get(name, frozenset()) | {tensor.name}
        return tuple(replace(candidate, name=name, unweighted=group) for name, group in groups.items())

    def without(self, candidate: Candidate, harmed: frozenset[str]) -> Candidate | None:
        """The candidate with those of the ``harmed`` tensors rounded without the imatrix whose types allow it; None without
        any."""
        left_out = frozenset(
            tensor.name
            for tensor in self.problem.tensors
            if tensor.name in harmed and self.problem.may_leave_out(tensor, candidate.types[tensor.name])
        )
        name = f"{candidate.name}, {len(left_out)} tensors without imatrix"
        return replace(candidate, name=name, unweighted=left_out) if left_out else None

    @cached_property
    def _solvers(self) -> dict[str, Solver]:
        """By the name of their candidates: with costs as measured, and moved half way and wholly to what is usual for their
        kind of tensor, against noise of the probes. Which is best depends on the model, so all are compared."""
        levels = {tensor.name: log(self.costs.sensitivity(tensor.original).kld.value) for tensor in self.problem.tensors}
        kinds: dict[str, list[float]] = {}
        for name, level in levels.items():
            kinds.setdefault(component(name), []).append(level)
        away = {name: median(kinds[component(name)]) - level for name, level in levels.items()}
        shares = {"mix": 0.0, HALF_SMOOTHED: 0.5, "mix of the same costs in all layers": 1.0}
        found = {
            title: self._solver({name: exp(share * distance) for name, distance in away.items()})
            for title, share in shares.items()
        }
        if floored := always_active(self.problem.tensors):
            found[WITH_FLOOR] = self._solver({}, floored)
        return found

    def _solver(self, factors: Mapping[str, float], floored: frozenset[str] = frozenset()) -> Solver:
        """``factors``: of the costs of each tensor, 1 where it has none; ``floored``: names of tensors that get no type below
        the floor if any other is allowed."""

        def choices(tensor: MixTensor) -> tuple[Choice, ...]:
            factor = factors.get(tensor.name, 1.0)

            def cost(kind: str) -> float:
                return factor * self.costs.cost(tensor.rounded(kind)) if kind in tensor.types else 0.0

            kinds = [kind for kind in tensor.choices if tensor.name not in floored or bits(kind) >= _FLOOR]
            return tuple(Choice(kind, self._load(tensor, kind), cost(kind)) for kind in kinds or tensor.choices)

        fixed = self.problem.fixed_bytes if self.times is None else self.times.fixed_load
        return Solver.of([Item((tensor.name,), choices(tensor)) for tensor in self.problem.tensors], fixed)

    def _load(self, tensor: MixTensor, kind: str) -> int:
        return tensor.padded_bytes(kind) if self.times is None else self.times.load(tensor, kind)

    def _candidate(self, name: str, solver: Solver, solution: Solution) -> Candidate:
        types = {
            tensor: item.choices[pick].type
            for item, pick in zip(solver.items, solution.picks, strict=True)
            for tensor in item.names
        }
        return Candidate(name, types, self.problem.file_bytes(types), solution.cost)


def always_active(tensors: Sequence[MixTensor]) -> frozenset[str]:
    """The tensors in the blocks that every token needs, where others are needed by some only: attention and shared experts of a
    model with experts; and those of a recurrent state, whose errors last longer than a probe's chunk. Probes may find them too
    cheap; they are small, so that a floor for them costs little."""
    blocks = [tensor for tensor in tensors if tensor.original.startswith("blk.")]
    kinds = {tensor.name: component(tensor.original) for tensor in blocks}
    experts = {name for name, kind in kinds.items() if _EXPERTS.search(kind)}
    return frozenset(kinds.keys() - experts if experts else {name for name, kind in kinds.items() if _STATE.match(kind)})
