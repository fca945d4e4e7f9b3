"""The choice of engine: llama-cpp-python in a worker process, or llama.cpp's own programs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.engines.abilities import RowChecker, TextTokeniser
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE, Bindings, UnusableBindings, find
from imatrix_runner.engines.ftypes import quant_types
from imatrix_runner.engines.levels import offered
from imatrix_runner.errors import ToolchainError, UsageError
from imatrix_runner.events import Notice, Sink, detail, info, warning
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.hardware import may_have_gpu
from imatrix_runner.toolchain.locate import ENV_VARIABLE, Found, locate, require
from imatrix_runner.toolchain.pip_install import AFRESH, DISTRIBUTION, pip_install
from imatrix_runner.toolchain.program_proof import ProgramProof, prove_programs
from imatrix_runner.toolchain.store import ORIGIN, cache_dir

if TYPE_CHECKING:
    from imatrix_runner.engines.embedded.engine import EmbeddedEngine
    from imatrix_runner.toolchain.probe import Toolchain

EMBEDDED, BINARIES = "embedded", "binaries"


class Machine:
    """The engines available on this machine. Each is looked for once, when it is first needed, because that runs programs."""

    def __init__(self, llama_cpp: Path | None, env: Mapping[str, str] = os.environ) -> None:
        self._llama_cpp, self._env = llama_cpp, env

    @property
    def named(self) -> str:
        """The option or variable with which the user named llama.cpp's programs; empty if neither was used."""
        if self._llama_cpp is not None:
            return "--llama-cpp"
        return ENV_VARIABLE if self._env.get(ENV_VARIABLE) else ""

    @cached_property
    def found(self) -> Found:
        """llama.cpp's programs, and the rejected candidates."""
        return locate(self._llama_cpp, env=self._env, cache=cache_dir(self._env))

    @property
    def toolchain(self) -> Toolchain | None:
        return self.found.toolchain

    @cached_property
    def bindings(self) -> Bindings | UnusableBindings:
        """llama-cpp-python with libraries that compute, or why not."""
        try:
            return find(self._env, cache_dir(self._env))
        except UnusableBindings as unusable:
            return unusable

    @property
    def tokenises(self) -> bool:
        """Whether :func:`make_tokeniser` can be used."""
        return not isinstance(self.bindings, UnusableBindings)

    @cached_property
    def may_have_gpu(self) -> bool:
        return may_have_gpu()


@dataclass(frozen=True)
class EngineNeeds:
    """What a request needs from an engine: names of levels, options passed through to llama-imatrix, ``-ngl``."""

    levels: Sequence[str] = ()
    extra: Sequence[str] = ()
    n_gpu_layers: str = ""


@dataclass(frozen=True)
class EngineChoice:
    """The engine that computes: with ``bindings`` the embedded one, with ``toolchain`` the binaries one. ``notice`` is the line
    about the choice, if any. ``additional`` are programs for levels that the embedded engine does not offer."""

    bindings: Bindings | None
    toolchain: Toolchain | None
    notice: Notice | None = None
    additional: Toolchain | None = None

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

    @contextmanager
    def opened(self, runner: Runner, cluster: ClusterOptions | None, sink: Sink) -> Iterator[Engine]:
        """The engine itself, whose workers on a ``cluster`` are started, and ended afterwards.

        Raises :class:`UsageError` for the binaries engine, :class:`ToolchainError` for a cluster that cannot be used.
        """
        if cluster is None and self.bindings is not None:
            from imatrix_runner.cluster.side_by_side import SideBySideEngine

            yield SideBySideEngine(self.bindings, runner, cache_dir())
            return
        if cluster is None:
            yield self.make(runner)
            return
        if self.bindings is None:
            raise UsageError(
                "--cluster needs the embedded engine",
                f"llama.cpp's programs cannot be given parts of a job{_reason(self.notice)}",
                "Leave out --engine binaries and --llama-cpp; see what is missing with: imatrix-runner doctor",
            )
        from imatrix_runner.cluster.cluster_engine import cluster_engine

        with cluster_engine(self.bindings, runner, cache_dir(), cluster, sink) as engine:
            yield engine

    @cached_property
    def _proof(self) -> ProgramProof:
        """Return the proof that the programs multiply correctly here, where they are the engine."""
        return prove_programs(self.toolchain, cache_dir()) if self.toolchain is not None else ProgramProof()

    @property
    def weakness(self) -> tuple[str, str]:
        """Return what does not work on this processor although the engine computes, and the remedy; both empty if all works."""
        if self.bindings is not None:
            return repacking_of_library(self.bindings)
        assert self.toolchain is not None
        return weakness_of_programs(self.toolchain, self._proof)

    def make_additional(self, runner: Runner) -> Engine | None:
        """Return the second engine, for the levels that the first does not offer; None if there are none."""
        from imatrix_runner.engines.binaries.engine import BinariesEngine

        return BinariesEngine(self.additional, runner, cache=cache_dir()) if self.additional is not None else None


def _reason(notice: Notice | None) -> str:
    return f" ({notice.text.rstrip('.')})" if notice is not None else ""


def repacking_of_library(bindings: Bindings) -> tuple[str, str]:
    """Return what is wrong with repacked weights in a library, and the remedy; both empty if they work."""
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
    """Return the same for llama.cpp's programs, also where they do not compute at all."""
    weakness = proof.weakness(tools)
    return weakness, f"Type: imatrix-runner tools build{' --force' if tools.origin == ORIGIN else ''}" if weakness else ""


def make_tokeniser(runner: Runner) -> TextTokeniser:
    """Return a tokeniser that uses a GGUF's own vocabulary. Raises :class:`ToolchainError` without llama-cpp-python."""
    from imatrix_runner.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(find(os.environ, cache_dir()), runner)


def make_checker(machine: Machine, runner: Runner) -> RowChecker:
    """Return the checker of rows for ``--verify full``: ggml's own functions know every type. Raises
    :class:`ToolchainError`."""
    from imatrix_runner.engines.embedded.engine import EmbeddedEngine

    bindings = machine.bindings
    if isinstance(bindings, UnusableBindings):
        raise ToolchainError("--verify full needs llama-cpp-python", bindings.why, bindings.todo) from bindings
    return EmbeddedEngine(bindings, runner)


def make_embedded(machine: Machine, runner: Runner, what: str) -> EmbeddedEngine:
    """Return the embedded engine for work that only it does. ``what`` needs it, as a phrase. Raises
    :class:`ToolchainError`."""
    from imatrix_runner.engines.embedded.engine import EmbeddedEngine

    bindings = machine.bindings
    if isinstance(bindings, UnusableBindings):
        raise ToolchainError(f"{what} needs llama-cpp-python", bindings.why, bindings.todo) from bindings
    return EmbeddedEngine(bindings, runner, cache_dir())


def choose(asked: str, needs: EngineNeeds, machine: Machine) -> EngineChoice:
    """Decide for ``asked`` (``auto``, ``embedded``, ``binaries``).

    ``auto`` is the embedded engine wherever it can serve. Raises :class:`UsageError` when the embedded engine was asked for
    by name and cannot serve, :class:`ToolchainError` when what is needed is not here.
    """
    if asked == BINARIES:
        return EngineChoice(None, require(machine.found))
    if asked == EMBEDDED:
        return _embedded(needs, machine)
    if because := _named_or_unread(needs, machine):
        return _binaries(machine, info(_because(because)))
    bindings = machine.bindings
    if isinstance(bindings, UnusableBindings):
        return _instead(bindings, machine)
    if because := _only_theirs(needs, bindings, machine):
        return _binaries(machine, info(_because(because)))
    return _embedded_choice(bindings, needs, machine)


def _embedded(needs: EngineNeeds, machine: Machine) -> EngineChoice:
    if needs.extra:
        raise UsageError(
            f"The embedded engine does not know {needs.extra[0]}",
            "options after -- are passed through to llama-imatrix, which the embedded engine does not run",
            "Leave them out, or use --engine binaries.",
        )
    if isinstance(machine.bindings, UnusableBindings):
        raise machine.bindings
    return _embedded_choice(machine.bindings, needs, machine)


def _embedded_choice(bindings: Bindings, needs: EngineNeeds, machine: Machine) -> EngineChoice:
    """Choose the embedded engine, with llama.cpp's programs for levels that only they offer (a fork's)."""
    mine = offered(quant_types(bindings.ftypes))
    unknown = [name for name in needs.levels if name.strip().upper() not in mine]
    if unknown and machine.toolchain is not None:
        theirs = offered(machine.toolchain.types)
        only = [name for name in unknown if name.strip().upper() in theirs]
        if only:
            notice = info(f"{', '.join(only)}: made by {machine.toolchain.directory}, because only these programs offer it.")
            return EngineChoice(bindings, None, notice, machine.toolchain)
    return EngineChoice(bindings, None, detail(f"Engine: embedded, {DISTRIBUTION} {bindings.version} ({bindings.origin})"))


def _because(reason: str) -> str:
    return f"Engine: binaries, because {reason}."


def _named_or_unread(needs: EngineNeeds, machine: Machine) -> str:
    """Return the reason for the binaries engine that follows from the request alone; empty if there is none."""
    if machine.named:
        return f"{machine.named} names the llama.cpp programs to use"
    return f"{needs.extra[0]} after -- is an option for llama-imatrix" if needs.extra else ""


def _only_theirs(needs: EngineNeeds, bindings: Bindings, machine: Machine) -> str:
    """Return why the programs are needed although llama-cpp-python computes: a GPU that only they see."""
    devices: tuple[str, ...] = ()
    if not bindings.devices and needs.n_gpu_layers != "0" and machine.may_have_gpu and machine.toolchain is not None:
        devices = machine.toolchain.devices
    if devices:
        return f"only they can use the GPU ({devices[0]}); {DISTRIBUTION} here is built for: {', '.join(bindings.backends)}"
    return ""


def _binaries(machine: Machine, notice: Notice | None) -> EngineChoice:
    try:
        return EngineChoice(None, require(machine.found), notice)
    except ToolchainError as error:
        if notice is None or machine.named:
            raise
        # Without the reason it would be unclear why programs are needed at all.
        raise ToolchainError(error.what, f"{notice.text} {error.why}", error.todo) from error


def _instead(unusable: UnusableBindings, machine: Machine) -> EngineChoice:
    """Choose the binaries because llama-cpp-python does not compute; reported only if it is installed."""
    if machine.toolchain is not None:
        broken = warning(f"{_because(unusable.why)} {unusable.todo}") if unusable.installed else None
        return EngineChoice(None, machine.toolchain, broken)
    turned_down = "; ".join(str(entry) for entry in machine.found.rejected[:3])
    pip = pip_install(*AFRESH) if unusable.installed else pip_install()
    raise ToolchainError(
        "No usable engine found",
        f"{unusable.why}, and no llama.cpp programs that run were found" + (f" ({turned_down})" if turned_down else ""),
        f"Type: {pip}   (or, for llama.cpp's own programs: imatrix-runner tools build)",
    ) from unusable
