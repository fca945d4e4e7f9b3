"""What every workflow needs at hand: the tools, a way to run children, someone to tell."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.engines.base import Engine
from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.errors import ToolchainError
from imatrix_runner.events import Sink
from imatrix_runner.journal import Journal
from imatrix_runner.process import Runner, Stop
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from imatrix_runner.workflow.request import EnvironmentRequest
from imatrix_runner.workspace import Workspace


@dataclass(frozen=True)
class Context:
    """The listener and the stop button of one command."""

    sink: Sink
    stop: Stop = field(default_factory=Stop)

    def runner(self, request: EnvironmentRequest) -> Runner:
        return Runner(self.stop, hang_seconds=request.hang_seconds)


@dataclass(frozen=True)
class Session:
    """One open workspace and everything that works in it. A dry run writes nothing: no journal, no logs, no lock."""

    workspace: Workspace
    journal: Journal
    toolchain: Toolchain
    engine: Engine
    runner: Runner
    sink: Sink
    dry_run: bool

    @property
    def stop(self) -> Stop:
        return self.runner.stop

    def log(self, step: str) -> Path | None:
        return None if self.dry_run else self.workspace.log(step)


def find_toolchain(request: EnvironmentRequest) -> Toolchain:
    """The llama.cpp tools to use. Raises :class:`ToolchainError` with every candidate that was turned down."""
    return require(locate(request.llama_cpp, env=os.environ, cache=cache_dir(os.environ)))


def make_engine(request: EnvironmentRequest, toolchain: Toolchain, runner: Runner) -> Engine:
    """The engine asked for. ``auto`` is the binaries engine."""
    if request.engine == "embedded":
        raise ToolchainError(
            "The embedded engine is not part of this version",
            f"imatrix-runner {_version()} computes with llama.cpp's own programs only",
            "Leave --engine out, or use --engine binaries.",
        )
    return BinariesEngine(toolchain, runner)


def _version() -> str:
    from imatrix_runner import __version__

    return __version__
