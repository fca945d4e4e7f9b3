"""Resolve a level to its recipe with llama.cpp's dry run, and pin tensors that the imatrix does not cover."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.jobs import DryRun, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, ToolchainError, UsageError
from imatrix_runner.models.gguf_file import type_id, type_size
from imatrix_runner.models.model import Model
from imatrix_runner.quantize.recipe import Recipe, RecipeTensor, make_recipe
from imatrix_runner.quantize.usable_imatrix import Failure, UsableImatrix
from imatrix_runner.steps import step_id

FAIL, KEEP = "fail", "keep"


@dataclass(frozen=True)
class Resolved:
    """A recipe, and the options that llama-quantize must be given to follow it (with the pins, if any)."""

    recipe: Recipe
    options: QuantizeOptions
    pinned: tuple[str, ...] = ()


class _NotKnown(Exception):
    """The dry run with these options was not done yet."""

    def __init__(self, options: QuantizeOptions) -> None:
        super().__init__(options)
        self.options = options


@dataclass(frozen=True)
class Resolver:
    """Resolves the recipes of one model with one imatrix.

    ``imatrix`` is what llama-quantize is given (its presence changes the mixture), ``weights`` the known or expected entries.
    ``uncovered``: ``fail``, ``keep`` or a type for tensors without data. ``known``: the dry runs that are done already, by
    level and options.
    """

    model: Model
    engine: Engine
    options: QuantizeOptions
    imatrix: Path | None
    weights: UsableImatrix | None
    uncovered: str = FAIL
    known: Mapping[tuple[str, QuantizeOptions], DryRun | RunnerError] = field(default_factory=dict)

    def asked(self, levels: Sequence[Level], log: Path | None) -> Resolver:
        """Return a resolver that has the dry runs of these levels: running them together is faster than one by one. Where
        tensors are pinned, those that still need one run together again."""
        resolver, todo = self, [(level, level.apply(self.options)) for level in levels]
        while todo:
            answers = self.engine.dry_runs([self._job(level, options, None) for level, options in todo], log)
            keys = [(level.name, options) for level, options in todo]
            resolver = replace(resolver, known={**resolver.known, **dict(zip(keys, answers, strict=True))})
            pinning = self.uncovered != FAIL and self.weights is not None
            todo = [(level, options) for level in levels if (options := resolver._next(level))] if pinning else []
        return resolver

    def _next(self, level: Level) -> QuantizeOptions | None:
        """The options of the next dry run that a level needs; None if it is resolved, or cannot be."""
        try:
            self._follow(level, self._recall)
        except _NotKnown as missing:
            return missing.options
        except RunnerError:
            return None  # raised again where it is resolved
        return None

    def resolve(self, level: Level, log: Path | None) -> Resolved:
        """Return the recipe of one level. A level that llama.cpp refuses to plan gets a failing recipe with the reason.

        Raises :class:`UsageError` for an option that llama.cpp does not accept, such as a pattern, because every level would
        fail.
        """

        def ask(level: Level, options: QuantizeOptions) -> Recipe:
            try:
                return self._recall(level, options)
            except _NotKnown:
                return self._recipe(level, options, self.engine.dry_run(self._job(level, options, log)))

        try:
            return self._follow(level, ask)
        except (EngineError, InvalidDataError, ToolchainError) as error:
            return Resolved(_impossible(level, error), level.apply(self.options))

    def _follow(self, level: Level, ask: Callable[[Level, QuantizeOptions], Recipe]) -> Resolved:
        """Pin tensors without data. A pin changes llama.cpp's choice for other tensors: repeat until none of them has too small
        a type."""
        options = level.apply(self.options)
        before: dict[str, str] = {}
        recipe = ask(level, options)
        while pins := {tensor: pin for tensor, pin in self._pins(recipe).items() if tensor.name not in before}:
            before |= {tensor.name: tensor.type for tensor in pins}
            options = replace(options, pins=(*options.pins, *pins.values()))
            recipe = ask(level, options)
        pinned = tuple(tensor.original for tensor in recipe.tensors if before.get(tensor.name, tensor.type) != tensor.type)
        return Resolved(recipe, options, pinned)

    def _recall(self, level: Level, options: QuantizeOptions) -> Recipe:
        dry = self.known.get((level.name, options))
        if dry is None:
            raise _NotKnown(options)
        if isinstance(dry, RunnerError):
            raise dry
        return self._recipe(level, options, dry)

    def _recipe(self, level: Level, options: QuantizeOptions, dry: DryRun) -> Recipe:
        weights = self.weights.without(level.exclude_weights) if self.weights is not None else None
        return make_recipe(level, self.model.header, self.model.tensors, dry, weights, options)

    def _job(self, level: Level, options: QuantizeOptions, log: Path | None) -> QuantizeJob:
        step = step_id("level", level.name)
        return QuantizeJob(step, self.model.path, Path("unused"), level.ftype, options, self.imatrix, None, log)

    def _pins(self, recipe: Recipe) -> dict[RecipeTensor, str]:
        """Return the ``--tensor-type`` entries for tensors without data that would become smaller than the safe type."""
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
    """Return the bits per weight of a ggml type; 0 for an unknown one (a fork's)."""
    number = type_id(type_name)
    size = type_size(number) if number is not None else None
    return 8 * size[1] / size[0] if size is not None else 0.0


def check_uncovered(value: str) -> str:
    """``fail``, ``keep`` or a known ggml type. Raises :class:`UsageError`."""
    if value.lower() in (FAIL, KEEP):
        return value.lower()
    if bits(value) == 0:
        raise UsageError(
            f"Invalid --uncovered {value}", "expected 'fail', 'keep' or a ggml type", "For example: --uncovered q4_k"
        )
    return value.lower()


def _impossible(level: Level, error: RunnerError) -> Recipe:
    return Recipe(level, (), (), (), (Failure(error.why, error.todo),), False, None)
