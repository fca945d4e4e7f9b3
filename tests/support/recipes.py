"""Predict a level as the program does, make it with the real llama-quantize, and keep both for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import Quantized, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.levels import Level, resolve_levels
from imatrix_runner.errors import RunnerError
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.formats import read
from imatrix_runner.models.model import open_gguf
from imatrix_runner.quantize.recipe import Recipe, make_recipe
from imatrix_runner.quantize.usable_imatrix import UsableImatrix, usable_weights

NO_OPTIONS = QuantizeOptions()


@dataclass(frozen=True)
class Made:
    """One level, foretold and made. ``outcome`` is what llama-quantize reported, or how it failed."""

    recipe: Recipe
    weights: UsableImatrix | None
    out: Path
    outcome: Quantized | RunnerError

    @property
    def succeeded(self) -> bool:
        return isinstance(self.outcome, Quantized)


def predict(
    engine: BinariesEngine, model: Path, level: Level, imatrix: Path | None, options: QuantizeOptions = NO_OPTIONS
) -> tuple[Recipe, UsableImatrix | None]:
    """The recipe of a level, from a dry run with the real imatrix."""
    options = level.apply(options)
    source = open_gguf(model, allow_requantize=True)
    weights = usable_weights(read(imatrix).matrix, imatrix, options) if imatrix is not None else None
    weights = weights if weights is not None and weights.sizes else None
    dry = engine.dry_run(QuantizeJob("", model, model, level.ftype, options, imatrix, None, None))
    return make_recipe(level, source.header, source.tensors, dry, weights, options), weights


def make(
    engine: BinariesEngine, model: Path, name: str, out: Path, imatrix: Path | None, options: QuantizeOptions = NO_OPTIONS
) -> Made:
    """Predict the level ``name`` and then really make it, with one thread."""
    (level,) = resolve_levels([name], engine.toolchain.types)
    recipe, weights = predict(engine, model, level, imatrix, options)
    job = QuantizeJob("", model, out, level.ftype, level.apply(options), imatrix, 1, None)
    try:
        return Made(recipe, weights, out, engine.quantize(job, ignore))
    except RunnerError as error:
        return Made(recipe, weights, out, error)
