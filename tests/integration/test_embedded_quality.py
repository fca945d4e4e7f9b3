"""Levels made with the embedded engine's matrix are as good as those made with llama-imatrix's: nearly the same bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from imatrix_runner.engines.jobs import QuantizeJob, QuantizeOptions
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from support.command_line import RunCommand
from support.divergence import divergence, save_logits
from support.llama_library import quantize_in_one_process
from support.llama_tools import BareTools
from support.tiny_architectures import write_architecture

LEVELS = ("IQ2_XS", "Q4_K_M")
CHUNKS = ("-c", "128", "--chunks", "32")

EQUAL = 0.95
"""Measured: 0.978 to 0.993, as a few blocks are rounded either way. A matrix of the next 32 chunks leaves 0.10 to 0.37."""


@dataclass(frozen=True)
class Level:
    """One file made with our matrix and one with theirs; all else is the same."""

    ours: Path
    theirs: Path

    def equal_blocks(self) -> float:
        """The share of quantised blocks (of up to 256 weights, with their scales) that are the same bytes in both."""
        equal = total = 0
        for one, other in zip(blocks(self.ours), blocks(self.theirs), strict=True):
            assert one.shape == other.shape
            equal += int((one == other).all(axis=1).sum())
            total += len(one)
        return equal / total


def blocks(path: Path) -> Iterator[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]:
    for tensor in GGUFReader(path).tensors:
        kind = GGMLQuantizationType(tensor.tensor_type)
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
            yield tensor.data.reshape(-1, GGML_QUANT_SIZES[kind][1])


def both(runner: RunCommand, tools: BareTools, model: Path, text: Path, folder: Path) -> dict[str, Level]:
    """A matrix of the same chunks by either, and every level with it."""
    for kind in ("ours", "theirs"):
        (folder / kind).mkdir()
    out = folder / "ours" / "imatrix.gguf"
    command = ("imatrix", "generate", model, "-f", text, "-o", out, "--work-dir", folder / "work", "--no-ppl", *CHUNKS)
    ran = runner(*command, "-t", "1", "--engine", "embedded")
    assert ran.code == 0, ran.err
    tools.imatrix(model, text, folder / "theirs" / "imatrix.gguf", "--no-ppl", "-t", "1", "-fit", "off", *CHUNKS)
    levels = {level: Level(folder / "ours" / f"{level}.gguf", folder / "theirs" / f"{level}.gguf") for level in LEVELS}
    jobs = [
        QuantizeJob("", model, file, level, QuantizeOptions(), file.with_name("imatrix.gguf"), 1, None)
        for level, made in levels.items()
        for file in (made.ours, made.theirs)
    ]
    quantize_in_one_process(tools.toolchain, jobs, folder / "jobs.json")
    return levels


@pytest.mark.parametrize("architecture", ["qwen3moe", "deepseek2"])
def test_levels_are_nearly_the_same_bytes(
    architecture: str, runner: RunCommand, tools: BareTools, tiny_text: Path, tmp_path: Path
) -> None:
    """Experts of all sizes, one of which sees hardly a token, and the 3-D weights of latent attention."""
    model = write_architecture(architecture, tmp_path / "model.gguf", dtype="BF16")
    for level, made in both(runner, tools, model, tiny_text, tmp_path).items():
        share = made.equal_blocks()
        print(f"{architecture} {level}: {share:.5f} of the blocks are equal")
        assert share > EQUAL


def test_the_demo_model_s_levels_are_as_good(runner: RunCommand, tools: BareTools, demo_model: Path, tmp_path: Path) -> None:
    """Its divergence on a text it never saw: functools' source, one of the files its training left out."""
    levels = both(runner, tools, demo_model, resource(CALIBRATION_TEXT), tmp_path)
    base = save_logits(tools, demo_model, Path(functools.__file__), tmp_path / "base")
    for level, made in levels.items():
        share = made.equal_blocks()
        ours, theirs = divergence(tools, made.ours, base), divergence(tools, made.theirs, base)
        print(f"{level}: {share:.5f} of the blocks are equal; divergence {ours.mean} and {theirs.mean} ± {theirs.error}")
        assert share > EQUAL
        assert abs(ours.mean - theirs.mean) < theirs.error
