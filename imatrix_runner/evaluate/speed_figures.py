"""Figures of speed, the levels that are fast enough, and the fewest layers on a GPU that are. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from imatrix_runner.engines.speed_jobs import MemoryBuffer
from imatrix_runner.evaluate.recommendations import Measure, Pick

ROUNDS = 3
"""Most rounds in which files are timed by turns: what changes in the machine meanwhile then changes all of them."""


@dataclass(frozen=True)
class TokenRate:
    """Tokens per second: the ``mean`` of ``runs`` repetitions and their standard ``deviation``, which llama-bench prints."""

    mean: float
    deviation: float
    runs: int

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for a single run."""
        return self.deviation / math.sqrt(self.runs) if self.runs > 1 else math.inf

    @classmethod
    def of(cls, speeds: Sequence[float]) -> TokenRate:
        return cls(fmean(speeds), stdev(speeds) if len(speeds) > 1 else 0.0, len(speeds))


@dataclass(frozen=True)
class SpeedSetting:
    """What figures of speed hold for. ``processor`` as the system names it, ``gpus`` as llama.cpp names them (empty: none was
    used); ``machine``: a fingerprint of both; tokens of the tests, and in the context before them; ``options``: llama.cpp's,
    as words."""

    processor: str
    gpus: tuple[str, ...]
    machine: str
    engine: str
    threads: int
    n_prompt: int
    n_gen: int
    depth: int
    options: str = ""


@dataclass(frozen=True)
class MeasuredSpeed:
    """How fast a file runs; ``buffers``: what llama.cpp allocates for a context that just holds the longer test."""

    prompt: TokenRate
    generation: TokenRate
    buffers: tuple[MemoryBuffer, ...]
    setting: SpeedSetting

    @property
    def n_bytes(self) -> int:
        """Memory of weights, context and computing together."""
        return sum(buffer.n_bytes for buffer in self.buffers)


def shares(repetitions: int) -> list[int]:
    """How many repetitions each round has: as equal as possible, in :data:`ROUNDS` rounds at most."""
    n = min(ROUNDS, repetitions)
    return [repetitions // n + (number < repetitions % n) for number in range(n)]


def reaches(rate: TokenRate, least: float) -> bool:
    """Whether a rate is at least ``least`` tokens/s, within its standard error."""
    error = rate.error if math.isfinite(rate.error) else 0.0
    return rate.mean + error >= least


def fast_enough(
    measures: Sequence[Measure], speeds: Mapping[str, MeasuredSpeed], least: float, layers: str = ""
) -> Pick | None:
    """The level closest to the source that generates ``least`` tokens/s, within the error; None without one. ``layers``: the
    ``-ngl`` that this takes, if not the one that was asked for."""
    fit = [each for each in measures if each.level in speeds and reaches(speeds[each.level].generation, least)]
    if not fit:
        return None
    best = min(fit, key=lambda each: (each.kld, each.n_bytes))
    rule = f"the closest to the source that generates {least:g} tokens/s ({describe_rate(speeds[best.level].generation)} here)"
    return Pick("speed", best.level, f"{rule}, with -ngl {layers}" if layers else rule)


def describe_rate(rate: TokenRate) -> str:
    """``23.4 ± 0.2``, with the standard error; without one ``23.4``."""
    if not math.isfinite(rate.error):
        return f"{rate.mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(rate.error))) if rate.error > 0 else 2
    return f"{rate.mean:.{min(digits, 3)}f} ± {rate.error:.{min(digits, 3)}f}"


def least_layers(n_layers: int, is_enough: Callable[[int], bool]) -> int | None:
    """The fewest layers on the GPU, of 0 to ``n_layers``, with which it is enough; None if it is not with all of them. More
    layers are taken to be faster."""
    if not is_enough(n_layers):
        return None
    low, high = -1, n_layers
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
