"""Notes of a plan about its levels before they are made: equal tensors, larger than the source, a large loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imatrix_runner.files import human_bytes
from imatrix_runner.models.model import Model
from imatrix_runner.models.trained_types import TRAINED_TYPES, holds_few_values
from imatrix_runner.quantize.imatrix_benefit import KLD_SOURCE, closeness
from imatrix_runner.quantize.level_facts import LevelFacts
from imatrix_runner.quantize.plan import LevelStep
from imatrix_runner.steps import MODEL_INPUT

_ONE_BIT = ("IQ1_S", "IQ1_M")
_SAME = (MODEL_INPUT, "imatrix", "engine")
"""Inputs that two levels must share, besides their recipe, to hold the same tensors."""


def same_tensors(levels: Mapping[str, tuple[Mapping[str, str], LevelFacts]]) -> dict[str, str]:
    """For each level whose file holds the same tensors as an earlier one's, that one's name.

    ``levels``: inputs and facts by name. Their recipes are equal tensor by tensor, and so are the model, the imatrix and the
    engine: only ``general.file_type`` in the metadata differs.
    """
    first: dict[tuple[str, ...], str] = {}
    found: dict[str, str] = {}
    for name, (inputs, facts) in levels.items():
        if facts.recipe:
            other = first.setdefault((facts.recipe, *(inputs.get(key, "") for key in _SAME)), name)
            if other != name:
                found[name] = other
    return found


def plan_notes(steps: Sequence[LevelStep], model: Model) -> tuple[str, ...]:
    """Return sentences about the levels that can be made; each names its levels."""
    possible = [step for step in steps if step.state != "fails"]
    notes: list[str] = []
    if possible and model.is_quantised:
        seen = model.source.dequantised or model.quantised_part
        notes.append(
            f"The source is quantised ({seen}): every level keeps its error and adds to it, and figures against it are "
            "distances from it, not from the original."
        )
    same = same_tensors({step.level.name: (step.inputs, step.facts) for step in possible})
    for name in dict.fromkeys(same.values()):
        others = [other for other, of in same.items() if of == name]
        verb = "hold" if len(others) > 1 else "holds"
        notes.append(
            f"{', '.join(others)} {verb} the same tensors as {name}: computed once, measured once, shown as one level."
        )
    copies = [step.level.name for step in possible if step.facts.is_source]
    if copies:
        notes.append(f"{', '.join(copies)}: no tensor changes its type, so this is the source again.")
    larger = [step for step in possible if (step.facts.n_bytes or 0) > model.n_bytes and not step.facts.is_source]
    if larger:
        sizes = ", ".join(f"{step.level.name} ({human_bytes(step.facts.n_bytes or 0)})" for step in larger)
        notes.append(f"Larger than the source ({human_bytes(model.n_bytes)}): {sizes}.")
    return (*notes, *_low_bit_notes(possible, model))


def quantised_type(model: Model) -> str:
    """Return the block format of most of a quantised model's weights."""
    sizes: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.is_quantised:
            sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.n_elements
    return max(sizes, key=sizes.__getitem__, default="")


def _low_bit_notes(steps: Sequence[LevelStep], model: Model) -> list[str]:
    by_type: dict[str, list[str]] = {}
    for step in steps:
        for kind in sorted(_types_of(step) & {*TRAINED_TYPES, *_ONE_BIT}):
            by_type.setdefault(kind, []).append(step.level.name)
    notes = []
    trained = [kind for kind in by_type if kind in TRAINED_TYPES and not holds_few_values(model, kind)]
    for kind in trained:
        notes.append(
            f"{', '.join(by_type[kind])}: {kind} is for models that were trained with {TRAINED_TYPES[kind]} values per weight. "
            "These weights are ordinary ones, and lose nearly everything in it."
        )
    for kind in _ONE_BIT:
        if kind in by_type:
            notes.append(
                f"{', '.join(by_type[kind])}: {kind} stores less than 2 bits per weight. Expect a large loss: "
                f"the mean KLD was {closeness(kind):.2f} elsewhere ({KLD_SOURCE})."
            )
    return notes


def _types_of(step: LevelStep) -> set[str]:
    """Return the types that a level gives tensors; for an existing level, which has no recipe here, its name."""
    if step.resolved is None:
        return {step.level.ftype.upper()}
    return {tensor.type for tensor in step.resolved.recipe.tensors if tensor.changes}
