"""``imatrix check``: a matrix against a model, and one verdict per level, all before any work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from imatrix_runner.imatrix.coverage import Coverage, examine
from imatrix_runner.imatrix.expected import uncollected
from imatrix_runner.imatrix.formats import MatrixFile, read
from imatrix_runner.models.ggml_types import IGNORE_WEIGHTS
from imatrix_runner.models.sources import Model, open_gguf
from imatrix_runner.quantize.levels import Level
from imatrix_runner.quantize.resolve import Resolved, Resolver
from imatrix_runner.quantize.weights import usable_weights
from imatrix_runner.workflow.choice import Needs
from imatrix_runner.workflow.context import Context, settle
from imatrix_runner.workflow.request import EnvironmentRequest, LevelsRequest
from imatrix_runner.workflow.run import choose_levels

Verdict = Literal["fine", "weaker", "fails"]


@dataclass(frozen=True)
class LevelVerdict:
    """What the matrix means for one level. ``reason`` names the tensor and the type, or what is weaker."""

    level: Level
    verdict: Verdict
    reason: str
    resolved: Resolved


@dataclass(frozen=True)
class Checked:
    file: MatrixFile
    model: Model
    coverage: Coverage
    verdicts: tuple[LevelVerdict, ...]

    @property
    def failing(self) -> tuple[LevelVerdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.verdict == "fails")


def check(path: Path, model_path: Path, levels: LevelsRequest, environment: EnvironmentRequest, context: Context) -> Checked:
    """Examine an imatrix for a GGUF model. Only the recipes need llama.cpp; nothing is written."""
    file = read(path.expanduser().absolute())
    model = open_gguf(model_path.expanduser().absolute(), allow_requantize=True)
    coverage = examine(file.matrix, {tensor.name: tensor.shape for tensor in model.tensors})
    _, choice = settle(environment, Needs(levels.names, n_gpu_layers="0"), context.sink)  # dry runs need no GPU
    engine = choice.make(context.runner(environment))
    weights = usable_weights(file.matrix, file.path, levels.options, uncollected(model))
    resolver = Resolver(model, engine, levels.options, file.path, weights, uncovered=levels.uncovered)
    chosen = choose_levels(levels, engine.types, context.sink)
    with ThreadPoolExecutor(max_workers=max(1, psutil.cpu_count() or 1)) as pool:
        verdicts = tuple(pool.map(lambda level: _judge(level, resolver.resolve(level, None), coverage), chosen))
    return Checked(file, model, coverage, verdicts)


def _judge(level: Level, resolved: Resolved, coverage: Coverage) -> LevelVerdict:
    recipe = resolved.recipe
    if recipe.failures:
        return LevelVerdict(level, "fails", recipe.failures[0].why, resolved)
    weighed = {tensor.original for tensor in recipe.tensors if tensor.changes and tensor.type not in IGNORE_WEIGHTS}
    weightless = [name for name in recipe.weightless if name in weighed]
    unseen = [name for name in recipe.unseen if name in weighed]
    partly = [e.tensor for e in coverage.experts if 0 < len(e.unseen) < e.n_experts and e.tensor in weighed]
    told = "; ".join(
        text.format(len(names), names[0])
        for text, names in (
            ("{} tensors are quantised without weights, first {}", weightless),
            ("{} entries counted no token, first {}", unseen),
            ("experts without data in {} tensors, first {}", partly),
        )
        if names
    )
    pinned = f"{len(resolved.pinned)} tensors pinned" if resolved.pinned else ""
    return LevelVerdict(level, "weaker" if told else "fine", "; ".join(filter(None, (told, pinned))), resolved)
