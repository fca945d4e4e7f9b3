"""The context of every step: the engine, the runner of children, the sink of events, the open workspace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.context.engine_choice import EngineChoice, EngineNeeds, Machine, choose
from imatrix_runner.context.requests import EnvironmentRequest
from imatrix_runner.engines.abilities import RowChecker
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.levels import offered
from imatrix_runner.events import Sink, warning
from imatrix_runner.journal import Journal
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.quant_type import QuantType
from imatrix_runner.workspace import Workspace, hold


@dataclass(frozen=True)
class Context:
    """The sink of events and the stop request of one command."""

    sink: Sink
    stop: Stop = field(default_factory=Stop)

    def runner(self, request: EnvironmentRequest) -> Runner:
        return Runner(self.stop, hang_seconds=request.hang_seconds)


@dataclass(frozen=True)
class Session:
    """One open workspace and everything that steps need in it. A dry run writes nothing: no journal, no logs, no lock.

    ``additional`` makes the levels that only it offers, ``checker`` reads finished levels again (``--verify full``).
    ``machine`` finds llama.cpp's programs for work outside the engines (conversion), when they are first needed.
    """

    workspace: Workspace
    journal: Journal
    machine: Machine
    engine: Engine
    runner: Runner
    sink: Sink
    dry_run: bool
    additional: Engine | None = None
    checker: RowChecker | None = None

    def engine_for(self, level: str) -> Engine:
        """Return the engine that makes a level: ``engine``, unless only the other one offers it."""
        name = level.upper()
        if self.additional is not None and name not in offered(self.engine.types) and name in offered(self.additional.types):
            return self.additional
        return self.engine

    @property
    def types(self) -> tuple[QuantType, ...]:
        """The types that can be made, by either engine."""
        if self.additional is None:
            return self.engine.types
        mine = offered(self.engine.types)
        return (*self.engine.types, *(kind for kind in self.additional.types if kind.name.upper() not in mine))

    @property
    def stop(self) -> Stop:
        return self.runner.stop

    def log(self, step: str) -> Path | None:
        return None if self.dry_run else self.workspace.log(step)


def settle(request: EnvironmentRequest, needs: EngineNeeds, sink: Sink) -> tuple[Machine, EngineChoice]:
    """Choose the engine and report the choice where that is useful. Raises what :func:`choose` raises."""
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
    """Hold a workspace as its only writer, and yield a runner of children. A dry run writes nothing, so it needs no lock."""
    if dry_run:
        yield context.runner(request)
        return
    with hold(workspace, request.command) as found:
        if found.orphans:
            context.sink(
                warning(f"An earlier run was killed; {found.orphans} of its programs were still running and were ended.")
            )
        yield Runner(context.stop, hang_seconds=request.hang_seconds, on_child=found.on_child, mark=found.mark)
