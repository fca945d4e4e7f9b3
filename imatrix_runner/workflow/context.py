"""What every workflow needs at hand: the engine, a way to run children, someone to tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from imatrix_runner.engines.base import CheckJob, Engine
from imatrix_runner.events import Sink, warning
from imatrix_runner.journal import Journal
from imatrix_runner.process import Runner
from imatrix_runner.quantize.levels import offered
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.probe import QuantType
from imatrix_runner.workflow.choice import Choice, Machine, Needs, choose
from imatrix_runner.workflow.request import EnvironmentRequest
from imatrix_runner.workspace import Workspace, hold


@dataclass(frozen=True)
class Context:
    """The listener and the stop button of one command."""

    sink: Sink
    stop: Stop = field(default_factory=Stop)

    def runner(self, request: EnvironmentRequest) -> Runner:
        return Runner(self.stop, hang_seconds=request.hang_seconds)


class RowChecker(Protocol):
    """Reads a finished output again; see :meth:`EmbeddedEngine.check`."""

    def check(self, job: CheckJob, sink: Sink) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Session:
    """One open workspace and everything that works in it. A dry run writes nothing: no journal, no logs, no lock.

    ``beside`` makes the levels that only it offers, ``checker`` reads finished levels again (``--verify full``). ``machine``
    finds llama.cpp's programs for what no engine does (conversion), when they are first asked for.
    """

    workspace: Workspace
    journal: Journal
    machine: Machine
    engine: Engine
    runner: Runner
    sink: Sink
    dry_run: bool
    beside: Engine | None = None
    checker: RowChecker | None = None

    def engine_for(self, level: str) -> Engine:
        """The engine that makes a level: another one than ``engine`` only for what that does not offer."""
        if self.beside is not None and level.upper() not in offered(self.engine.types):
            return self.beside
        return self.engine

    @property
    def types(self) -> tuple[QuantType, ...]:
        """What can be made, by whichever engine."""
        if self.beside is None:
            return self.engine.types
        mine = offered(self.engine.types)
        return (*self.engine.types, *(kind for kind in self.beside.types if kind.name.upper() not in mine))

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
    weakness, todo = choice.weakness
    if weakness:
        sink(warning(f"{weakness}. {todo}"))
    return machine, choice


@contextmanager
def held(workspace: Workspace, request: EnvironmentRequest, context: Context, *, dry_run: bool) -> Iterator[Runner]:
    """Be the one who writes to a workspace, and run children there. A dry run writes nothing, so it needs no lock."""
    if dry_run:
        yield context.runner(request)
        return
    with hold(workspace, request.command) as found:
        if found.orphans:
            context.sink(warning(f"An earlier run was killed; {found.orphans} of its programs still ran and were ended."))
        yield Runner(context.stop, hang_seconds=request.hang_seconds, on_child=found.on_child, mark=found.mark)
