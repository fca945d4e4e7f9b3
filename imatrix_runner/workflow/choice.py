"""What can compute here, and which of it does: llama-cpp-python inside a worker, or llama.cpp's own programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from imatrix_runner.engines.base import Engine
from imatrix_runner.engines.embedded.find import LIBRARY_VARIABLE, Bindings, Unusable, find
from imatrix_runner.engines.embedded.install import AFRESH, DISTRIBUTION, pip_install
from imatrix_runner.engines.embedded.levels import quant_types
from imatrix_runner.errors import ToolchainError, UsageError
from imatrix_runner.events import Notice, detail, info, warning
from imatrix_runner.process import Runner
from imatrix_runner.quantize.levels import offered
from imatrix_runner.toolchain.hardware import may_have_gpu
from imatrix_runner.toolchain.locate import ENV_VARIABLE, Found, locate, require
from imatrix_runner.toolchain.program_proof import ProgramProof, prove_programs
from imatrix_runner.toolchain.store import ORIGIN, cache_dir

if TYPE_CHECKING:
    from imatrix_runner.engines.embedded.engine import EmbeddedEngine
    from imatrix_runner.toolchain.probe import Toolchain

EMBEDDED, BINARIES = "embedded", "binaries"


class Machine:
    """What could compute here. Each thing is looked for when it is first asked for, and once: looking runs programs."""

    def __init__(self, llama_cpp: Path | None, env: Mapping[str, str] = os.environ) -> None:
        self._llama_cpp, self._env = llama_cpp, env

    @property
    def named(self) -> str:
        """What the user named llama.cpp's programs with; empty when they did not."""
        if self._llama_cpp is not None:
            return "--llama-cpp"
        return ENV_VARIABLE if self._env.get(ENV_VARIABLE) else ""

    @cached_property
    def found(self) -> Found:
        """llama.cpp's programs, and the candidates that did not count."""
        return locate(self._llama_cpp, env=self._env, cache=cache_dir(self._env))

    @property
    def toolchain(self) -> Toolchain | None:
        return self.found.toolchain

    @cached_property
    def bindings(self) -> Bindings | Unusable:
        """llama-cpp-python with libraries that compute, or why not."""
        try:
            return find(self._env, cache_dir(self._env))
        except Unusable as unusable:
            return unusable

    @cached_property
    def may_have_gpu(self) -> bool:
        return may_have_gpu()


@dataclass(frozen=True)
class Needs:
    """What a request asks of an engine: names of levels, options for llama-imatrix that were passed unread, ``-ngl``."""

    levels: Sequence[str] = ()
    extra: Sequence[str] = ()
    n_gpu_layers: str = ""


@dataclass(frozen=True)
class Choice:
    """The engine that computes: with ``bindings`` the embedded one, with ``toolchain`` the binaries one. ``notice`` is the
    line about it, if there is something to say. ``beside`` are programs for levels that the embedded engine does not offer."""

    bindings: Bindings | None
    toolchain: Toolchain | None
    notice: Notice | None = None
    beside: Toolchain | None = None

    @property
    def name(self) -> str:
        return EMBEDDED if self.bindings is not None else BINARIES

    def no_gpu(self) -> str:
        """Why there is no GPU to compute on, as far as this engine knows, and how to get at one."""
        if self.bindings is not None:
            return (
                f"{DISTRIBUTION} sees no GPU (built for: {', '.join(self.bindings.backends)}). For CUDA type: "
                f"{pip_install(*AFRESH, cmake='-DGGML_CUDA=on')}"
            )
        assert self.toolchain is not None
        return (
            f"these llama.cpp tools see no GPU ({', '.join(self.toolchain.backends)} build). "
            "Build for one with: imatrix-runner tools build --backend cuda"
        )

    def make(self, runner: Runner) -> Engine:
        """The engine itself, running its children through ``runner``."""
        if self.bindings is not None:
            from imatrix_runner.engines.embedded.engine import EmbeddedEngine

            return EmbeddedEngine(self.bindings, runner, cache_dir())
        from imatrix_runner.engines.binaries.engine import BinariesEngine

        assert self.toolchain is not None
        return BinariesEngine(self.toolchain, runner, self._proof.repacking, cache_dir())

    @cached_property
    def _proof(self) -> ProgramProof:
        """How the programs multiply here, where they are what computes."""
        return prove_programs(self.toolchain, cache_dir()) if self.toolchain is not None else ProgramProof()

    @property
    def weakness(self) -> tuple[str, str]:
        """What does not work on this processor although the engine computes, and the remedy; both empty where all does."""
        if self.bindings is not None:
            return repacking_of_library(self.bindings)
        assert self.toolchain is not None
        return weakness_of_programs(self.toolchain, self._proof)

    def make_beside(self, runner: Runner) -> Engine | None:
        """The engine for the levels that the other does not offer, if there are any."""
        from imatrix_runner.engines.binaries.engine import BinariesEngine

        return BinariesEngine(self.beside, runner, cache=cache_dir()) if self.beside is not None else None


def repacking_of_library(bindings: Bindings) -> tuple[str, str]:
    """What there is to say about repacked weights in a library, and the remedy; both empty where they work."""
    if bindings.repacking.works:
        return "", ""
    if bindings.origin == LIBRARY_VARIABLE:
        todo = f"Let {LIBRARY_VARIABLE} name libraries that another compiler built."
    elif bindings.library is None:
        todo = f"Type: {pip_install(*AFRESH, without_amx=True)}"
    else:
        todo = "Type: imatrix-runner tools build --force"
    return bindings.repacking.line(DISTRIBUTION), todo


def weakness_of_programs(tools: Toolchain, proof: ProgramProof) -> tuple[str, str]:
    """The same for llama.cpp's programs; also where they do not compute at all."""
    weakness = proof.weakness(tools)
    return weakness, f"Type: imatrix-runner tools build{' --force' if tools.origin == ORIGIN else ''}" if weakness else ""


def make_checker(machine: Machine, runner: Runner) -> EmbeddedEngine:
    """What reads levels again for ``--verify full``: ggml's own functions know every type. Raises :class:`ToolchainError`."""
    from imatrix_runner.engines.embedded.engine import EmbeddedEngine

    bindings = machine.bindings
    if isinstance(bindings, Unusable):
        raise ToolchainError("--verify full needs llama-cpp-python", bindings.why, bindings.todo) from bindings
    return EmbeddedEngine(bindings, runner)


def choose(asked: str, needs: Needs, machine: Machine) -> Choice:
    """Decide for ``asked`` (``auto``, ``embedded``, ``binaries``).

    ``auto`` is the embedded engine wherever it can serve. Raises :class:`UsageError` when the embedded engine was asked for
    by name and cannot serve, :class:`ToolchainError` when what is needed is not here.
    """
    if asked == BINARIES:
        return Choice(None, require(machine.found))
    if asked == EMBEDDED:
        return _embedded(needs, machine)
    if because := _named_or_unread(needs, machine):
        return _binaries(machine, info(_because(because)))
    bindings = machine.bindings
    if isinstance(bindings, Unusable):
        return _instead(bindings, machine)
    if because := _only_theirs(needs, bindings, machine):
        return _binaries(machine, info(_because(because)))
    return _embedded_choice(bindings, needs, machine)


def _embedded(needs: Needs, machine: Machine) -> Choice:
    if needs.extra:
        raise UsageError(
            f"The embedded engine does not know {needs.extra[0]}",
            "options after -- go to llama-imatrix unread, and the embedded engine runs without it",
            "Leave them out, or use --engine binaries.",
        )
    if isinstance(machine.bindings, Unusable):
        raise machine.bindings
    return _embedded_choice(machine.bindings, needs, machine)


def _embedded_choice(bindings: Bindings, needs: Needs, machine: Machine) -> Choice:
    """The embedded engine, and for levels that only llama.cpp's programs offer (a fork's), those beside it."""
    mine = offered(quant_types(bindings.ftypes))
    unknown = [name for name in needs.levels if name.strip().upper() not in mine]
    if unknown and machine.toolchain is not None:
        theirs = offered(machine.toolchain.types)
        only = [name for name in unknown if name.strip().upper() in theirs]
        if only:
            told = info(f"{', '.join(only)}: made by {machine.toolchain.directory}, because only these programs offer it.")
            return Choice(bindings, None, told, machine.toolchain)
    return Choice(bindings, None, detail(f"Engine: embedded, {DISTRIBUTION} {bindings.version} ({bindings.origin})"))


def _because(reason: str) -> str:
    return f"Engine: binaries, because {reason}."


def _named_or_unread(needs: Needs, machine: Machine) -> str:
    """Reasons for the binaries that can be seen without looking for anything."""
    if machine.named:
        return f"{machine.named} names llama.cpp's programs"
    return f"{needs.extra[0]} after -- is an option for llama-imatrix" if needs.extra else ""


def _only_theirs(needs: Needs, bindings: Bindings, machine: Machine) -> str:
    """Why only the programs can serve although llama-cpp-python computes: a GPU that only they see."""
    devices: tuple[str, ...] = ()
    if not bindings.devices and needs.n_gpu_layers != "0" and machine.may_have_gpu and machine.toolchain is not None:
        devices = machine.toolchain.devices
    if devices:
        return f"only they see a GPU ({devices[0]}); {DISTRIBUTION} here is built for: {', '.join(bindings.backends)}"
    return ""


def _binaries(machine: Machine, notice: Notice | None) -> Choice:
    try:
        return Choice(None, require(machine.found), notice)
    except ToolchainError as error:
        if notice is None or machine.named:
            raise
        # Without the reason the user would wonder why programs are wanted at all.
        raise ToolchainError(error.what, f"{notice.text} {error.why}", error.todo) from error


def _instead(unusable: Unusable, machine: Machine) -> Choice:
    """The binaries, because there is no llama-cpp-python that computes; worth a word only when there should be one."""
    if machine.toolchain is not None:
        broken = warning(f"{_because(unusable.why)} {unusable.todo}") if unusable.installed else None
        return Choice(None, machine.toolchain, broken)
    turned_down = "; ".join(str(entry) for entry in machine.found.rejected[:3])
    pip = pip_install(*AFRESH) if unusable.installed else pip_install()
    raise ToolchainError(
        "There is nothing here that could compute",
        f"{unusable.why}, and no llama.cpp programs that run were found" + (f" ({turned_down})" if turned_down else ""),
        f"Type: {pip}   (or, for llama.cpp's own programs: imatrix-runner tools build)",
    ) from unusable
