"""What the plan says of a level is what becomes of it, whatever the options, on models of several architectures:
with an imatrix that is there, and with one that is only expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import DryRun, QuantizeOptions
from imatrix_runner.engines.levels import resolve_levels
from imatrix_runner.errors import RunnerError
from imatrix_runner.imatrix.expected import expect
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.quantize.recipe import make_recipe
from imatrix_runner.quantize.usable_imatrix import expected_weights
from imatrix_runner.quantize.verify import verify_output
from imatrix_runner.toolchain.probe import Toolchain
from support.llama_tools import BareTools
from support.recipes import make
from support.tiny_architectures import write_architecture
from support.tiny_models import write_llama_gguf

LEVEL = "Q2_K_S"
"""It needs data for nearly all its tensors, and takes no tables that are slow to make."""

MODELS: dict[str, Callable[[Path], Path]] = {
    "glm4moe": lambda path: write_architecture("glm4moe", path, dtype="BF16"),
    "deepseek2": lambda path: write_architecture("deepseek2", path, dtype="BF16"),
    "lfm2": lambda path: write_architecture("lfm2", path, dtype="BF16"),
    "narrow": lambda path: write_llama_gguf(path, hidden=288, vocab=300),
}
OPTIONS = {
    "none": QuantizeOptions(),
    "pure": QuantizeOptions(pure=True),
    "leave-output": QuantizeOptions(leave_output_tensor=True),
    "output": QuantizeOptions(output_tensor_type="q2_k"),
    "embeddings": QuantizeOptions(token_embedding_type="iq4_xs"),
    "all-one-type": QuantizeOptions(tensor_types=(".*=iq3_s",)),
    "nextn-kept": QuantizeOptions(tensor_types=(r"blk\.2\.=bf16",)),
    "pruned": QuantizeOptions(prune_layers="1"),
    "excluded": QuantizeOptions(exclude_weights=("ffn_down",)),
    "included": QuantizeOptions(include_weights=("attn",)),
    "metadata": QuantizeOptions(override_kv=("general.name=str:other", "general.alignment=int:64")),
}


@dataclass(frozen=True)
class Calibrated:
    model: Path
    imatrix: Path
    text: Path


@pytest.fixture(scope="module", params=MODELS)
def calibrated(
    request: pytest.FixtureRequest, tools: BareTools, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Calibrated:
    folder = tmp_path_factory.mktemp("verdicts")
    model = MODELS[request.param](folder / "m.gguf")
    tools.imatrix(model, tiny_text, folder / "imatrix.gguf", "-c", "128", "--chunks", "2")
    return Calibrated(model, folder / "imatrix.gguf", tiny_text)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_verdict_is_right_before_and_after_the_imatrix_is_there(
    options: QuantizeOptions, calibrated: Calibrated, toolchain: Toolchain, tmp_path: Path
) -> None:
    engine = BinariesEngine(toolchain, Runner())
    made = make(engine, calibrated.model, LEVEL, tmp_path / "o.gguf", calibrated.imatrix, options)
    try:
        good = made.succeeded and verify_output([tmp_path / "o.gguf"], made.recipe, made.weights) == made.recipe.file_bytes
    except RunnerError:
        good = False
    assert good is not bool(made.recipe.failures)
    assert all(failure.todo for failure in made.recipe.failures)

    source = open_gguf(calibrated.model, allow_requantize=False)
    (level,) = resolve_levels([LEVEL], engine.types)
    expected = expected_weights(expect(source, dataset=str(calibrated.text), chunks=2), level.apply(options))
    types = {tensor.name: tensor.type.lower() for tensor in made.recipe.tensors}
    dry = DryRun(types, made.recipe.fallbacks, needs_imatrix=False)
    foretold = make_recipe(level, source.header, source.tensors, dry, expected, level.apply(options))
    assert bool(foretold.failures) is not good
    assert (foretold.starved, foretold.weightless) == (made.recipe.starved, made.recipe.weightless)
    if good:
        assert foretold.file_bytes == (tmp_path / "o.gguf").stat().st_size
