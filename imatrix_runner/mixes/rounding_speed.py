"""How fast this machine rounds weights, remembered for the time that later plans name."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import msgspec

from imatrix_runner.remembered import recall, remember
from imatrix_runner.toolchain.hardware import cpu_features

LEAST_SECONDS = 2.0
"""Work that takes less says more about how long a worker takes to start."""

_FOLDER = "speeds"


class RoundingSpeed(msgspec.Struct, frozen=True):
    """Weights rounded per second, each counted once for each type; the mean over the types of the last measurement."""

    key: str
    weights_per_second: float


def rounding_speed(cache: Path, engine: str, threads: int | None) -> float | None:
    """Return the speed of the last measurement with this engine (its identity) and number of threads; None without any."""
    found = recall(cache / _FOLDER, _key(engine, threads), RoundingSpeed)
    return found.weights_per_second if found is not None and found.weights_per_second > 0 else None


def remember_rounding(cache: Path, engine: str, threads: int | None, n_weights: int, seconds: float) -> None:
    """Keep the speed of a measurement, if it took long enough to be one."""
    if n_weights and seconds >= LEAST_SECONDS:
        remember(cache / _FOLDER, RoundingSpeed(_key(engine, threads), n_weights / seconds))


def _key(engine: str, threads: int | None) -> str:
    """A digest of everything the speed depends on. A home directory may be that of several machines."""
    parts = (engine, str(threads), platform.node(), cpu_features(), str(os.cpu_count()))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
