"""Seconds per token of a file in place of its bytes: what mixes for a speed are solved for. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.mixes.mix_problem import MixProblem
from imatrix_runner.mixes.mix_tensors import MixTensor
from imatrix_runner.mixes.targets import SpeedTarget

_UNIT = 1e-12
"""Times are whole picoseconds, so that their sums are exact."""
_EXPERTS = re.compile(r"_exps\.weight$")
_LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight")


@dataclass(frozen=True)
class TokenTimes:
    """``seconds``: for a weight of each type; ``used``: weights of each tensor of the problem, by name, that a token is
    multiplied with; ``fixed``: seconds of everything else, measured as what the source takes besides its weights."""

    seconds: Mapping[str, float]
    used: Mapping[str, float]
    fixed: float

    @classmethod
    def of(
        cls, problem: MixProblem, seconds: Mapping[str, float], source_seconds: float, experts: tuple[int, int]
    ) -> TokenTimes:
        """``source_seconds``: what the source takes for a token; ``experts``: how many a token uses, and of how many."""
        used = {tensor.name: _used(tensor, problem, experts) for tensor in problem.tensors}
        weights = sum(used[tensor.name] * seconds[tensor.source_type] for tensor in problem.tensors)
        return cls(seconds, used, max(0.0, source_seconds - weights))

    def load(self, tensor: MixTensor, kind: str) -> int:
        """Time of a tensor as a type, in :data:`_UNIT`."""
        return round(self.used[tensor.name] * self.seconds[kind] / _UNIT)

    @property
    def fixed_load(self) -> int:
        return round(self.fixed / _UNIT)

    def budget(self, target: SpeedTarget) -> int:
        return int(1 / target.tokens_per_second / _UNIT)

    def total(self, problem: MixProblem, types: Mapping[str, str]) -> int:
        """The time for a token of a file with these types."""
        return self.fixed_load + sum(self.load(tensor, types[tensor.name]) for tensor in problem.tensors)

    def rate(self, load: int) -> float:
        """Tokens per second."""
        return 1 / (load * _UNIT)


def check_speed(target: SpeedTarget, times: TokenTimes, problem: MixProblem) -> None:
    """Raise :class:`InvalidDataError` for a speed that no mix reaches, or that the source itself has."""
    least = times.fixed_load + sum(min(times.load(tensor, kind) for kind in tensor.choices) for tensor in problem.tensors)
    fastest = times.rate(least)
    source = times.rate(times.total(problem, {tensor.name: tensor.source_type for tensor in problem.tensors}))
    why = f"the source generates {source:.3g} tokens/s here, and its fastest mix {fastest:.3g}, as times of types predict"
    if target.tokens_per_second > fastest:
        raise InvalidDataError(
            f"{target.spelling} cannot be reached", why, "Ask for less, use a GPU with -ngl, or more threads with -t."
        )
    if target.tokens_per_second <= source:
        raise InvalidDataError(f"{target.spelling} leaves nothing to choose", why, "Ask for more, or use the model as it is.")


def _used(tensor: MixTensor, problem: MixProblem, experts: tuple[int, int]) -> float:
    used, there = experts
    if tensor.original in _LOOKED_UP:
        names = {each.original for each in problem.tensors} | problem.others.keys()
        tied = tensor.original == "token_embd.weight" and "output.weight" not in names
        return prod(tensor.shape) if tied else 0.0
    share = used / there if there and _EXPERTS.search(tensor.original) else 1.0
    return prod(tensor.shape) * share
