"""A check that llama.cpp's programs multiply correctly: llama-imatrix computes a tiny model with all main tensor types.

The result is remembered for these files on this processor, because the check takes about half a second.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import imatrix_runner
from imatrix_runner.endings import crashed, ending
from imatrix_runner.events import Sink, warning
from imatrix_runner.files import stamp
from imatrix_runner.process import Captured, Command, capture, relevant_lines
from imatrix_runner.remembered import recall, remember
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.hardware import cpu_features
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.proof_model import PROOF_CHUNKS, PROOF_CONTEXT, PROOF_TEXT, Architecture, write_proof_model
from imatrix_runner.toolchain.repacking import REPACKS, Repacking

_TOOL = "llama-imatrix"
_NO_REPACK = "--no-repack"
_FOLDER = "programs"
_SECONDS = 20.0
_FAR = 0.05
"""Limit on the change of a chunk's mean nll by repacked weights. With ggml's AVX-512 kernels the change is below 0.01."""

_ARCHITECTURES: tuple[Architecture, ...] = ("jamba", "llama")
_VALUE = re.compile(r"\[\d+\]([-\w.]+),")
_LIBRARY = re.compile(r"(?:lib)?ggml.*\.(?:so|dylib|dll)")
_DECIDING = re.compile(r"GGML_|LD_LIBRARY_PATH$|LD_PRELOAD$|DYLD_")


@dataclass(frozen=True)
class ProgramProof:
    """``repacking``: whether it works with these programs here; ``broken``: how they crash with and without it, empty if they
    compute."""

    repacking: Repacking = REPACKS
    broken: str = ""

    def weakness(self, tools: Toolchain) -> str:
        """Return what does not work, in a phrase; empty if all works."""
        if self.broken:
            return f"The programs of {tools.directory} cannot multiply here ({self.broken})"
        return "" if self.repacking.works else self.repacking.line(f"the programs of {tools.directory}")


class _Remembered(msgspec.Struct, frozen=True):
    """The result of a check, and the ``key`` of everything it depends on."""

    key: str
    repacking: Repacking


@dataclass(frozen=True)
class _Tried:
    """One run: perplexities chunk by chunk, empty if the program computed nothing; ``crash`` says how it ended."""

    values: tuple[float, ...] = ()
    crash: str = ""


def warn_of_weakness(tools: Toolchain, cache: Path, sink: Sink) -> None:
    """Check that new programs multiply correctly, and warn if they do not."""
    weakness = prove_programs(tools, cache).weakness(tools)
    if weakness:
        sink(warning(f"{weakness}."))


def prove_programs(tools: Toolchain, cache: Path, env: Mapping[str, str] = os.environ) -> ProgramProof:
    """Return whether these programs multiply correctly on this processor.

    Programs that cannot load the model (forks, old releases) cannot be checked, and are assumed to work. A failure is not
    remembered, because it may be repaired at any moment.
    """
    key = _key(tools, env)
    known = recall(cache / _FOLDER, key, _Remembered)
    if known is not None:
        return ProgramProof(known.repacking)
    found = _prove(tools)
    if not found.broken:
        remember(cache / _FOLDER, _Remembered(key, found.repacking))
    return found


def _key(tools: Toolchain, env: Mapping[str, str]) -> str:
    """Return one digest of everything the check depends on."""
    program = tools.tool(_TOOL)
    homes = {tools.directory, program.resolve().parent, program.resolve().parent.parent / "lib"}
    libraries = sorted(path for home in homes if home.is_dir() for path in home.iterdir() if _LIBRARY.match(path.name))
    parts = [imatrix_runner.__version__, tools.identity(), cpu_features()]
    parts += [f"{path} {stamp(path)}" for path in (program, *libraries) if path.is_file()]
    parts += [f"{name}={value}" for name, value in sorted(env.items()) if _DECIDING.match(name)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _prove(tools: Toolchain) -> ProgramProof:
    with scratch_folder() as folder:
        for architecture in _ARCHITECTURES:
            model = write_proof_model(folder / f"{architecture}.gguf", architecture)
            packed = _run(tools, model, repack=True)
            if packed.values or packed.crash:
                return _compare(packed, _run(tools, model, repack=False) if tools.knows(_TOOL, _NO_REPACK) else _Tried())
    return ProgramProof()


def _compare(packed: _Tried, plain: _Tried) -> ProgramProof:
    if packed.crash:
        return ProgramProof(Repacking(False, packed.crash)) if plain.values else ProgramProof(broken=packed.crash)
    far = _distance(packed.values, plain.values)
    return ProgramProof(Repacking(False, f"its log-likelihoods are wrong by {far:.2g}") if far >= _FAR else REPACKS)


def _run(tools: Toolchain, model: Path, *, repack: bool) -> _Tried:
    text, out = model.with_suffix(".txt"), model.with_suffix(".out.gguf")
    text.write_text(PROOF_TEXT, encoding="utf-8")
    argv = [str(tools.tool(_TOOL)), "-m", str(model), "-f", str(text), "-o", str(out), "-t", "1"]
    argv += ["-c", str(PROOF_CONTEXT), "-b", str(2 * PROOF_CONTEXT), "-ub", str(2 * PROOF_CONTEXT)]
    argv += ["--chunks", str(PROOF_CHUNKS), "-ngl", "0"]
    argv += ["-fit", "off"] if tools.knows(_TOOL, "-fit") else []
    argv += [] if repack else [_NO_REPACK]
    try:
        captured = capture(Command(tuple(argv), cwd=model.parent), seconds=_SECONDS)
    except (OSError, TimeoutError):
        return _Tried()
    if crashed(captured.returncode):
        return _Tried(crash=_death(captured))
    return _Tried(_values(captured.stdout) if captured.returncode == 0 else ())


def _death(captured: Captured) -> str:
    said = [line for line in relevant_lines(captured.stderr.splitlines(), 1) if "assert" in line.lower()]
    return "; ".join([ending(captured.returncode), *said])


def _values(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in _VALUE.findall(text))
    except ValueError:
        return ()


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of mean nll over the chunks that both printed; infinite if one is not a number."""
    pairs = [(a, b) for a, b in zip(one, other, strict=False)]
    if not all(math.isfinite(value) and value > 0 for pair in pairs for value in pair):
        return math.inf
    return max((abs(math.log(a / b)) for a, b in pairs), default=0.0)
