"""How far a quantised model is from its source on a text: llama-perplexity's KL divergence, chunk by chunk."""

from __future__ import annotations

import math
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from support.command_line import clean_environment
from support.llama_tools import BareTools

_MEAN = re.compile(r"^Mean +KLD: +([-\d.]+) ± +([\d.]+)$", re.MULTILINE)
_ROW = re.compile(r"^ *(\d+)" + r" +[-\d.]+ ± +[\d.]+" * 2 + r" +([-\d.]+) ± ", re.MULTILINE)
_TRIES = 20


@dataclass(frozen=True)
class Divergence:
    """The mean over all scored tokens, its standard error as llama-perplexity prints it, and the mean of each chunk."""

    mean: float
    error: float
    chunks: npt.NDArray[np.float64]

    def minus(self, other: Divergence) -> tuple[float, float]:
        """The difference of two on the same text, and its standard error, from chunk to chunk: what both have in common, the
        text, cancels out."""
        each = self.chunks - other.chunks
        return self.mean - other.mean, float(each.std(ddof=1)) / math.sqrt(len(each))


def save_logits(tools: BareTools, model: Path, text: Path, out: Path, *, n_ctx: int = 512, threads: int = 1) -> Path:
    """What the source says of the text: the base that :func:`divergence` compares with."""
    told = _perplexity(tools, "-m", model, "-f", text, "-c", n_ctx, "-t", threads, "--kl-divergence-base", out)
    vocab, chunks = _sizes(out)
    row = 2 * (2 * ((vocab + 1) // 2) + 4)
    assert out.stat().st_size == 20 + 4 * chunks * n_ctx + chunks * (n_ctx - 1 - n_ctx // 2) * row, told[-1000:]
    return out


def _sizes(base: Path) -> tuple[int, int]:
    """Tokens in the vocabulary and chunks of text."""
    with base.open("rb") as file:
        magic, _, vocab, chunks = struct.unpack("<8siii", file.read(20))
    assert magic == b"_logits_"
    return vocab, chunks


def divergence(tools: BareTools, model: Path, base: Path, *, n_ctx: int = 512, threads: int = 1) -> Divergence:
    """Asks again while llama-perplexity's asynchronous log loses a line that is needed (it often does at its end)."""
    _, chunks = _sizes(base)
    for _ in range(_TRIES):
        told = _perplexity(tools, "-m", model, "-c", n_ctx, "-t", threads, "--kl-divergence", "--kl-divergence-base", base)
        mean, rows = _MEAN.search(told), _ROW.findall(told)
        # Each row is the mean of all chunks up to its own.
        if mean and [int(number) for number, _ in rows] == list(range(1, chunks + 1)):
            sums = np.array([int(number) * float(value) for number, value in rows])
            return Divergence(float(mean[1]), float(mean[2]), np.diff(sums, prepend=0.0))
    raise AssertionError(f"llama-perplexity told no result in {_TRIES} runs: {told[-1000:]}")


def _perplexity(tools: BareTools, *arguments: str | Path | int) -> str:
    done = subprocess.run(
        [tools.toolchain.tool("llama-perplexity"), *map(str, arguments)],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode() + done.stderr.decode()
