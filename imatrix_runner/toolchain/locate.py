"""Finds llama.cpp's binaries: in the directory the user named, or in the first of the usual places where they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.errors import ToolchainError
from imatrix_runner.toolchain.probe import NEEDED, Rejected, Rejection, Toolchain, executable, probe, program
from imatrix_runner.toolchain.store import ORIGIN, Store, cache_dir

__all__ = ["ENV_VARIABLE", "Found", "cache_dir", "locate", "require"]

ENV_VARIABLE = "IMATRIX_RUNNER_LLAMA_CPP"
_OPTION = "--llama-cpp"
_PATH = "PATH"
_USUAL = "usual place"
_NAMED = (_OPTION, ENV_VARIABLE)
# Where a llama.cpp directory keeps its binaries: in itself, an install prefix, a build tree.
_INSIDE = ("", "bin", "build/bin", "build/bin/Release")
_MAX_SHOWN = 8


@dataclass(frozen=True)
class Found:
    """The first toolchain that runs, if any, and the candidates that were rejected before it."""

    toolchain: Toolchain | None
    rejected: tuple[Rejection, ...]


def locate(
    explicit: Path | None,
    *,
    env: Mapping[str, str],
    cache: Path,
    system: str = sys.platform,
    seconds: float = 20,
) -> Found:
    """Look in the order: ``explicit`` or :data:`ENV_VARIABLE` (then nowhere else), the managed cache, PATH, usual places.

    Raises nothing: :func:`require` turns a failure into an error, ``doctor`` shows it. ``seconds`` limits each single run of a
    probe.
    """
    rejected: list[Rejection] = []
    seen: set[Path] = set()
    for directory, origin in _candidates(explicit, env, cache, system):
        real = directory.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            return Found(probe(directory, origin, seconds=seconds), tuple(rejected))
        except Rejected as no:
            rejected.append(no.rejection)
    return Found(None, tuple(rejected))


def require(found: Found) -> Toolchain:
    """Return the toolchain. Raises :class:`ToolchainError` with the rejected candidates and how to get one."""
    if found.toolchain is not None:
        return found.toolchain
    named = next((entry for entry in found.rejected if entry.origin in _NAMED), None)
    if named is not None:
        raise ToolchainError(
            f"The llama.cpp directory given by {named.origin} cannot be used",
            f"{named.directory}: {named.why}",
            f"Give another directory, or leave {named.origin} out and type: imatrix-runner tools build",
        )
    shown = "; ".join(str(entry) for entry in found.rejected[:_MAX_SHOWN])
    raise ToolchainError(
        "No llama.cpp binaries that run here were found",
        shown or f"none of {', '.join(NEEDED)} is in the tool cache, on PATH or in the usual places",
        "Type: imatrix-runner tools build (or: imatrix-runner tools install)",
    )


def usual_places(env: Mapping[str, str], system: str) -> tuple[Path, ...]:
    """Return the usual places of llama.cpp on this system, from package managers and builds by hand."""
    if system == "win32":
        roots = [env[name] for name in ("ProgramFiles", "ProgramW6432", "LOCALAPPDATA", "USERPROFILE") if env.get(name)]
        inside = ("llama.cpp", "Programs/llama.cpp", "Microsoft/WinGet/Links")
        return tuple(Path(root) / place for root in roots for place in inside)
    homebrew = ("/opt/homebrew/bin", "/home/linuxbrew/.linuxbrew/bin")
    places = [Path(place) for place in (*homebrew, "/usr/local/bin", "/usr/bin", "/opt/llama.cpp")]
    if home := env.get("HOME"):
        places += [Path(home) / "llama.cpp", Path(home) / ".local" / "bin"]
    return tuple(places)


def _candidates(explicit: Path | None, env: Mapping[str, str], cache: Path, system: str) -> Iterator[tuple[Path, str]]:
    named = explicit or (Path(env[ENV_VARIABLE]) if env.get(ENV_VARIABLE) else None)
    if named is not None:
        yield _inside(named.absolute(), old_names=True), _OPTION if explicit else ENV_VARIABLE
        return
    for folder, _ in Store(cache).complete():
        yield folder / "bin", ORIGIN
    for entry in env.get("PATH", "").split(os.pathsep):
        # A relative entry depends on the current directory: programs that are there by chance must not be run.
        if Path(entry).is_absolute() and _holds_any(Path(entry)):
            yield Path(entry), _PATH
    for place in usual_places(env, system):
        if place.is_absolute() and _holds_any(inside := _inside(place)):
            yield inside, _USUAL


def _inside(directory: Path, *, old_names: bool = False) -> Path:
    """Return the folder in or below ``directory`` that holds binaries; ``directory`` itself if none does.

    ``old_names``: accept the old names ``imatrix`` and ``quantize``, too; only where the user says that they are llama.cpp's,
    because other projects have programs of these names.
    """
    places = [directory / place for place in _INSIDE]
    found = next((place for place in places if _holds_any(place)), None)
    if found is None and old_names:
        found = next((place for place in places if all(program(place, tool).is_file() for tool in NEEDED)), None)
    return found or directory


def _holds_any(directory: Path) -> bool:
    return any(executable(directory, tool).is_file() for tool in NEEDED)
