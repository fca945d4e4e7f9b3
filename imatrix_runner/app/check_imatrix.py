"""``imatrix check``: an imatrix against a model, with one verdict per level, before anything is computed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from imatrix_runner.app.run_levels import choose_levels
from imatrix_runner.context.context import Context, settle
from imatrix_runner.context.engine_choice import EngineNeeds
from imatrix_runner.context.requests import EnvironmentRequest, LevelsRequest
from imatrix_runner.engines.levels import Level
from imatrix_runner.imatrix.coverage import Coverage, examine
from imatrix_runner.imatrix.expected import uncollected
from imatrix_runner.imatrix.formats import MatrixFile, read
from imatrix_runner.mixes.targets import require_stock
from imatrix_runner.models.ggml_types import IGNORE_WEIGHTS
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.quantize.resolve import Resolved, Resolver
from imatrix_runner.quantize.usable_imatrix import usable_weights

Verdict = Literal["fine", "weaker", "fails"]


@dataclass(frozen=True)
class LevelVerdict:
    """What the imatrix means for one level. ``reason`` names the tensor and the type, or what is weaker."""

    level: Level
    verdict: Verdict
    reason: str
    resolved: Resolved


@dataclass(frozen=True)
class CheckedMatrix:
    file: MatrixFile
    model: Model
    coverage: Coverage
    verdicts: tuple[LevelVerdict, ...]

    @property
    def failing(self) -> tuple[LevelVerdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.verdict == "fails")


def check(
    path: Path, model_path: Path, levels: LevelsRequest, environment: EnvironmentRequest, context: Context
) -> CheckedMatrix:
    """Examine an imatrix for a GGUF model. Only the recipes need llama.cpp; nothing is written."""
    require_stock(
        levels.names,
        "cannot be checked",
        "the types of a mix are chosen with the imatrix, so that they suit it",
        "Name stock levels, for example --levels Q4_K_M.",
    )
    file = read(path.expanduser().absolute())
    model = open_gguf(model_path.expanduser().absolute(), allow_requantize=True)
    coverage = examine(file.matrix, {tensor.name: tensor.shape for tensor in model.tensors})
    _, choice = settle(environment, EngineNeeds(levels.names, n_gpu_layers="0"), context.sink)  # dry runs need no GPU
    engine = choice.make(context.runner(environment))
    weights = usable_weights(file.matrix, file.path, levels.options, uncollected(model))
    chosen = choose_levels(levels, engine.types, context.sink)
    resolver = Resolver(model, engine, levels.options, file.path, weights, uncovered=levels.uncovered).asked(chosen, None)
    with ThreadPoolExecutor(max_workers=max(1, psutil.cpu_count() or 1)) as pool:
        verdicts = tuple(pool.map(lambda level: _verdict(level, resolver.resolve(level, None), coverage), chosen))
    return CheckedMatrix(file, model, coverage, verdicts)


def _verdict(level: Level, resolved: Resolved, coverage: Coverage) -> LevelVerdict:
    recipe = resolved.recipe
    if recipe.failures:
        return LevelVerdict(level, "fails", recipe.failures[0].why, resolved)
    weighed = {tensor.original for tensor in recipe.tensors if tensor.changes and tensor.type not in IGNORE_WEIGHTS}
    weightless = [name for name in recipe.weightless if name in weighed]
    unseen = [name for name in recipe.unseen if name in weighed]
    partly = [e.tensor for e in coverage.experts if 0 < len(e.unseen) < e.n_experts and e.tensor in weighed]
    weaknesses = "; ".join(
        text.format(len(names), names[0])
        for text, names in (
            ("{} tensors are quantised without weights, first {}", weightless),
            ("{} entries counted no token, first {}", unseen),
            ("experts without data in {} tensors, first {}", partly),
        )
        if names
    )
    pinned = f"{len(resolved.pinned)} tensors pinned" if resolved.pinned else ""
    return LevelVerdict(level, "weaker" if weaknesses else "fine", "; ".join(filter(None, (weaknesses, pinned))), resolved)
