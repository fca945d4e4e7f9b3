"""What every workflow needs at hand: the engine, a way to run children, someone to tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.engines.base import Engine
from imatrix_runner.events import Sink
from imatrix_runner.journal import Journal
from imatrix_runner.process import Runner, Stop
from imatrix_runner.workflow.choice import Choice, Machine, Needs, choose
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
    """One open workspace and everything that works in it. A dry run writes nothing: no journal, no logs, no lock.

    ``machine`` finds llama.cpp's programs for what no engine does (conversion), when they are first asked for.
    """

    workspace: Workspace
    journal: Journal
    machine: Machine
    engine: Engine
    runner: Runner
    sink: Sink
    dry_run: bool

    @property
    def stop(self) -> Stop:
        return self.runner.stop

    def log(self, step: str) -> Path | None:
        return None if self.dry_run else self.workspace.log(step)


def settle(request: EnvironmentRequest, needs: Needs, sink: Sink) -> tuple[Machine, Choice]:
    """Decide what computes, and say so where it is worth a line. Raises what :func:`choose` raises."""
    machine = Machine(request.llama_cpp)
    choice = choose(request.engine, needs, machine)
    if choice.notice is not None:
        sink(choice.notice)
    return machine, choice
