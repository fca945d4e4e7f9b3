"""What a worker's machine is, and whether it computes what the driver would."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

import imatrix_runner
from imatrix_runner.engines.embedded.bindings import Bindings
from imatrix_runner.engines.embedded.engine import EmbeddedEngine


@dataclass(frozen=True)
class NodeFacts:
    """``arithmetic``: the library, its version and build, and numpy's (what sums depend on); ``features``: the processor's, as
    llama.cpp names them. ``memory``: bytes; ``trouble``: why it cannot compute, empty if it can."""

    host: str
    program: str
    python: str
    identity: str
    arithmetic: str
    features: str
    memory: int
    devices: tuple[str, ...]
    trouble: str = ""

    @classmethod
    def of(cls, engine: EmbeddedEngine) -> NodeFacts:
        """The facts of this machine."""
        bindings: Bindings = engine.bindings
        return cls(
            socket.gethostname(),
            imatrix_runner.__version__,
            platform.python_version(),
            engine.identity(),
            engine.arithmetic(),
            bindings.features,
            psutil.virtual_memory().total,
            bindings.devices,
        )

    @classmethod
    def unusable(cls, why: str) -> NodeFacts:
        """A machine that cannot compute."""
        version, python = imatrix_runner.__version__, platform.python_version()
        return cls(socket.gethostname(), version, python, "", "", "", psutil.virtual_memory().total, (), why)


def why_left_out(node: NodeFacts, driver: NodeFacts) -> str:
    """Why a machine would not compute what the driver would; empty if it would."""
    if node.trouble:
        return node.trouble
    for what, theirs, mine in (
        ("imatrix-runner", node.program, driver.program),
        ("the library", node.identity, driver.identity),
        ("the arithmetic", node.arithmetic, driver.arithmetic),
    ):
        if theirs != mine:
            return f"{what} there is {theirs}, here {mine}"
    return ""


def unlike(nodes: Sequence[NodeFacts]) -> tuple[str, ...]:
    """The features of the processors where they differ, each once; empty where all are alike."""
    found = sorted({node.features for node in nodes})
    return tuple(found) if len(found) > 1 else ()


def share_of_processors(workers: int) -> int:
    """Processors for each of some workers on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)
