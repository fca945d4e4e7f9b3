"""From a level to its recipe, asking llama.cpp; and pinning tensors that the imatrix does not cover."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.engines.base import DryRun, Engine, QuantizeJob, QuantizeOptions
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, ToolchainError, UsageError
from imatrix_runner.models.gguf_file import type_id, type_size
from imatrix_runner.models.sources import Model
from imatrix_runner.quantize.levels import Level
from imatrix_runner.quantize.recipe import Recipe, RecipeTensor, make_recipe
from imatrix_runner.quantize.weights import Failure, Weights

FAIL, KEEP = "fail", "keep"


@dataclass(frozen=True)
class Resolved:
    """A recipe, and the options that llama-quantize must be given to follow it (with the pins, if any)."""

    recipe: Recipe
    options: QuantizeOptions
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resolver:
    """Asks for the recipes of one model with one imatrix.

    ``imatrix`` is what llama-quantize is given (its presence changes the mixture), ``weights`` what is known or expected to be
    in it. ``uncovered``: ``fail``, ``keep`` or a type for tensors without data. ``known``:
    what llama.cpp has answered already, by level.
    """

    model: Model
    engine: Engine
    options: QuantizeOptions
    imatrix: Path | None
    weights: Weights | None
    uncovered: str = FAIL
    known: Mapping[str, DryRun | RunnerError] = field(default_factory=dict)

    def asked(self, levels: Sequence[Level], log: Path | None) -> Resolver:
        """The same, knowing llama.cpp's answers for these levels: asked all at once, which is quicker than one by one."""
        if not levels:
            return self
        answers = self.engine.dry_runs([self._job(level, level.apply(self.options), None) for level in levels], log)
        return replace(self, known={level.name: answer for level, answer in zip(levels, answers, strict=True)})

    def resolve(self, level: Level, log: Path | None) -> Resolved:
        """The recipe of one level. What llama.cpp refuses to plan is a recipe that fails, with its reason.

        Raises :class:`UsageError` for an option that llama.cpp does not take, such as a pattern: it would fail every level.
        """
        options = level.apply(self.options)
        before: dict[str, str] = {}
        try:
            recipe = self._ask(level, options, log)
            # A pin shifts llama.cpp's choice for other tensors: look again until none without data is too small.
            while pins := {tensor: pin for tensor, pin in self._pins(recipe).items() if tensor.name not in before}:
                before |= {tensor.name: tensor.type for tensor in pins}
                options = replace(options, pins=(*options.pins, *pins.values()))
                recipe = self._ask(level, options, log)
            pinned = tuple(tensor.original for tensor in recipe.tensors if before.get(tensor.name, tensor.type) != tensor.type)
            return Resolved(recipe, options, pinned)
        except (EngineError, InvalidDataError, ToolchainError) as error:
            return Resolved(_impossible(level, error), options)

    def _ask(self, level: Level, options: QuantizeOptions, log: Path | None) -> Recipe:
        dry = self.known.get(level.name) if options == level.apply(self.options) else None
        if isinstance(dry, RunnerError):
            raise dry
        if dry is None:
            dry = self.engine.dry_run(self._job(level, options, log))
        return make_recipe(level, self.model.header, self.model.tensors, dry, self.weights, options)

    def _job(self, level: Level, options: QuantizeOptions, log: Path | None) -> QuantizeJob:
        step = f"level-{level.name}"
        return QuantizeJob(step, self.model.path, Path("unused"), level.ftype, options, self.imatrix, None, log)

    def _pins(self, recipe: Recipe) -> dict[RecipeTensor, str]:
        """``--tensor-type`` entries for the tensors without data that would become smaller than the safe type."""
        if self.uncovered == FAIL or self.weights is None:
            return {}
        uncovered = {*recipe.weightless, *recipe.unseen, *recipe.starved}
        pins: dict[RecipeTensor, str] = {}
        for tensor in recipe.tensors:
            safe = tensor.source_type if self.uncovered == KEEP else self.uncovered.upper()
            if tensor.original in uncovered and bits(tensor.type) < bits(safe):
                pins[tensor] = f"^{re.escape(tensor.name)}$={safe.lower()}"
        return pins


def bits(type_name: str) -> float:
    """Bits per weight of a ggml type; 0 for one we do not know (a fork's)."""
    number = type_id(type_name)
    size = type_size(number) if number is not None else None
    return 8 * size[1] / size[0] if size is not None else 0.0


def check_uncovered(value: str) -> str:
    """``fail``, ``keep`` or a known ggml type. Raises :class:`UsageError`."""
    if value.lower() in (FAIL, KEEP):
        return value.lower()
    if bits(value) == 0:
        raise UsageError(
            f"--uncovered {value} is no type", "it takes fail, keep or a ggml type", "For example: --uncovered q4_k"
        )
    return value.lower()


def _impossible(level: Level, error: RunnerError) -> Recipe:
    return Recipe(level, (), (), (), (Failure(error.why, error.todo),), False, None)
