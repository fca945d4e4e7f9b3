"""Extras: packages that a plain install leaves out, and the one error where a command needs them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from imatrix_runner.errors import ToolchainError


@dataclass(frozen=True)
class Extra:
    """``imatrix-runner[name]``; ``modules`` are what it lets us import."""

    name: str
    modules: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that adds it."""
        return f'pip install "imatrix-runner[{self.name}]"'

    def missing(self) -> tuple[str, ...]:
        """Its modules that cannot be found. Nothing is imported."""
        return tuple(each for each in self.modules if importlib.util.find_spec(each) is None)

    def require(self, what: str) -> None:
        """Raise :class:`ToolchainError` where a module is missing; ``what`` needs it (a gerund phrase)."""
        if missing := self.missing():
            raise ToolchainError(
                f"{what} needs packages that are not installed",
                f"there is no {', '.join(missing)}; a plain install leaves them out",
                f"Install them with: {self.install}",
            )


CALIBRATION = Extra("calibration", ("datasketch", "fontTools", "py3langid", "pyarrow"))
"""What builds and inspects calibration texts, and reads Parquet."""

NOTIFY = Extra("notify", ("apprise",))
"""What ``batch --notify`` sends messages with."""

CONVERT = Extra("convert", ("torch", "transformers", "safetensors", "sentencepiece", "numpy", "yaml", "requests"))
"""What llama.cpp's converter imports."""

PUBLISH = Extra("publish", ("ggufdoctor", "wasmtime"))
"""What renders chat templates as llama.cpp does, without a build of it."""

RAY = Extra("ray", ("ray",))
"""What ``--cluster`` spreads work with."""

TASKS = Extra("tasks", ("lm_eval", "datasets", "evaluate"))
"""What ``evaluate --tasks`` takes tasks from."""
