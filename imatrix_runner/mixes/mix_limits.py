"""What no mix of a model can be: the sizes out of reach, and the tensors that no type fits. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import human_bytes
from imatrix_runner.mixes.mix_problem import MixProblem
from imatrix_runner.mixes.mix_tensors import MixTensor
from imatrix_runner.mixes.targets import LikeTarget, MemoryTarget, Target

_SMALL_BLOCK = 32
"""Numbers in a block of the legacy types, Q8_0 and IQ4_NL; others have 256."""


def check_targets(problem: MixProblem, targets: Sequence[Target], types: str) -> None:
    """Raise :class:`InvalidDataError` if no tensor can be rounded, or if a target allows less than the smallest file takes, or
    as much as the largest. ``types`` as ``--types`` gave them."""
    stuck = _stuck(problem)
    if len(stuck) == len(problem.tensors):
        raise InvalidDataError(
            "No mix of this model can be made",
            _reason(stuck) if stuck else "llama.cpp quantises none of its tensors",
            _wider(stuck) or "Use the model as it is.",
        )
    least, most = problem.range
    for target in targets:
        budget = problem.budget(target)
        if budget is None:
            continue
        allows = f"it allows {human_bytes(max(0, budget))}"
        if isinstance(target, MemoryTarget):
            allows += f", because context and buffers take {human_bytes(problem.reserve)}"
        why = f"{allows}; files of this model take {human_bytes(least)} to {human_bytes(most)}"
        if budget < least:
            raise InvalidDataError(f"{target.spelling} cannot be reached", why, _smaller(problem, stuck, types))
        if budget >= most and not isinstance(target, LikeTarget):
            raise InvalidDataError(
                f"{target.spelling} leaves nothing to choose", why, "Ask for less, or use the model as it is."
            )


def unrounded(problem: MixProblem) -> str:
    """Return a note about the tensors that no allowed type fits; empty without any."""
    stuck = _stuck(problem)
    if not stuck:
        return ""
    number = "1 tensor keeps its type" if len(stuck) == 1 else f"{len(stuck)} tensors keep their types"
    return " ".join(filter(None, (f"{number}: {_reason(stuck)}.", _wider(stuck))))


def _stuck(problem: MixProblem) -> tuple[MixTensor, ...]:
    return tuple(tensor for tensor in problem.tensors if not tensor.types)


def _reason(stuck: Sequence[MixTensor]) -> str:
    return f"no type that is allowed fits {stuck[0].name} with rows of {stuck[0].shape[0]} numbers"


def _wider(stuck: Sequence[MixTensor]) -> str:
    """What may fit these tensors; empty if nothing does."""
    if any(tensor.shape[0] % _SMALL_BLOCK == 0 for tensor in stuck):
        return "Types of small blocks fit: add q4_0, q5_0, iq4_nl or q8_0 to --types."
    return ""


def _smaller(problem: MixProblem, stuck: Sequence[MixTensor], types: str) -> str:
    if stuck and (wider := _wider(stuck)):
        return f"Ask for more. {wider}"
    if problem.weights is None:
        return "Ask for more, or give an imatrix: the smallest types need one."
    return f"Ask for more, or allow smaller types with --types{'' if types else ' iq,iq1_m'}."
