"""Checks that a directory holds llama.cpp binaries that run here, and reads their abilities from their own help."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.endings import ending, signal_name
from imatrix_runner.errors import ToolchainError
from imatrix_runner.process import Captured, Command, capture
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.quant_type import QuantType
from imatrix_runner.toolchain.usage import Usage, read_usage

TOOLS = ("llama-imatrix", "llama-quantize", "llama-tokenize", "llama-perplexity", "llama-gguf-split")
NEEDED = ("llama-imatrix", "llama-quantize")
COUNTER = "llama-tokenize"
"""It only counts tokens, and some forks do not ship it: it may be absent, but if present it must run."""
CONVERTER = "convert_hf_to_gguf.py"

_SUFFIX = ".exe" if os.name == "nt" else ""
_MAX_TEXT = 1 << 20
_MAX_TYPES = 500
_MAX_DEVICES = 64

# A help line has its options at the left; descriptions, and their continuations, are further right.
_OPTION_LINE = re.compile(r"^\s{0,12}((?:--?[A-Za-z][\w-]*(?:,\s*)?)+)", re.MULTILINE)
_OPTION_IN_USAGE = re.compile(r"\[(--?[A-Za-z][\w-]*)")
_SPELLING = re.compile(r"--?[A-Za-z][\w-]*")
_TYPES_HEADING = re.compile(r"allowed quantization types", re.IGNORECASE)
_TYPE_LINE = re.compile(r"^\s*(?:(\d{1,6})\s+or\s+)?([A-Za-z]\w{0,63})\s*:\s*(.{0,200})", re.MULTILINE)
_ALIAS = re.compile(r"alias for (\w+)")
_VERSION = re.compile(r"version:\s*(\S+)(?:\s*\(([^)]*)\))?")
_BACKENDS = ("cuda", "vulkan", "metal", "hip", "sycl", "opencl", "musa", "cann", "rpc", "openvino")
_BACKEND_LIBRARY = re.compile(rf"^(?:lib)?ggml-({'|'.join(_BACKENDS)})\b.*\.(?:so|dll|dylib)")
# Most specific first: a HIP build mentions ROCm devices but shares CUDA's source files and their messages.
_BACKEND_WORDS = (
    ("hip", re.compile(r"\bROCm\d*\b|ggml_hip", re.IGNORECASE)),
    ("cuda", re.compile(r"\bCUDA\d*\b|ggml_cuda_init")),
    ("vulkan", re.compile(r"\bVulkan\d*\b|ggml_vulkan")),
    ("metal", re.compile(r"\bMetal\b|\bMTL\d+\b|ggml_metal")),
    ("sycl", re.compile(r"\bSYCL\d*\b|ggml_sycl")),
    ("opencl", re.compile(r"\bGPUOpenCL\b|ggml_opencl")),
)
_MISSING_LIBRARY = re.compile(r"error while loading shared libraries: ([^:\s]+)|Library not loaded: (\S+)")


@dataclass(frozen=True)
class Rejection:
    """A rejected candidate, with the reason in one plain phrase."""

    directory: Path
    origin: str
    why: str

    def __str__(self) -> str:
        return f"{self.directory} ({self.origin}): {self.why}"


class Rejected(Exception):
    """A directory does not hold binaries that run here."""

    def __init__(self, directory: Path, origin: str, why: str) -> None:
        super().__init__(directory, origin, why)
        self.directory = directory
        self.origin = origin
        self.why = why

    @property
    def rejection(self) -> Rejection:
        return Rejection(self.directory, self.origin, self.why)


@dataclass(frozen=True)
class Toolchain:
    """llama.cpp binaries that ran, and what they reported about themselves.

    ``origin`` says how they were found. ``backends`` is ``cpu`` plus what this build can use (``cuda``, ``vulkan``, …);
    ``devices`` are the lines of ``--list-devices``. ``types`` keeps the order of ``llama-quantize``'s help, and may include a
    fork's own types. ``options`` maps a tool to the spellings in its help. ``converter`` is ``convert_hf_to_gguf.py`` if it is
    next to them.
    """

    directory: Path
    origin: str
    tools: Mapping[str, Path]
    version: str
    build: str
    commit: str
    backends: tuple[str, ...]
    devices: tuple[str, ...]
    types: tuple[QuantType, ...]
    options: Mapping[str, frozenset[str]]
    converter: Path | None
    usage: Mapping[str, Usage] = field(default_factory=dict)

    def tool(self, name: str) -> Path:
        """Return the path of one binary. Raises :class:`ToolchainError` if this toolchain does not have it."""
        path = self.tools.get(name)
        if path is None:
            raise ToolchainError(
                f"{name} is not part of this toolchain",
                f"{self.directory} ({self.origin}) does not hold a {name} that runs",
                "Build a complete toolchain with: imatrix-runner tools build",
            )
        return path

    def knows(self, tool: str, option: str) -> bool:
        """Whether ``tool``'s own help lists ``option`` (as spelled: ``--save-frequency``, ``-ngl``)."""
        return option in self.options.get(tool, frozenset())

    def takes(self, tool: str) -> Usage:
        """Return how ``tool`` takes its options; as llama.cpp's current programs do if its help was not read."""
        return self.usage.get(tool) or Usage()

    def type(self, name: str) -> QuantType | None:
        """Return the quantisation type named ``name``, in upper or lower case, or None."""
        return next((entry for entry in self.types if entry.name.lower() == name.lower()), None)

    def identity(self) -> str:
        """``llama.cpp 0.5.0-dev build 1 commit 0c1e57098``: goes into fingerprints and reports."""
        parts = ["llama.cpp", self.version]
        parts += ["build", self.build] if self.build else []
        parts += ["commit", self.commit] if self.commit else []
        return " ".join(parts)


def executable(directory: Path, tool: str) -> Path:
    """Return the path that ``tool`` has in ``directory`` if it is there."""
    return directory / f"{tool}{_SUFFIX}"


def program(directory: Path, tool: str) -> Path:
    """Return the path of ``tool`` in ``directory``, also under its name before June 2024: without ``llama-``."""
    path, old = executable(directory, tool), executable(directory, tool.removeprefix("llama-"))
    return old if old.is_file() and not path.is_file() else path


def probe(directory: Path, origin: str, *, seconds: float = 20) -> Toolchain:
    """Run every binary in ``directory`` and read its abilities; raise :class:`Rejected` unless all :data:`NEEDED` run.

    ``seconds`` limits each single run.
    """
    paths = {tool: program(directory, tool) for tool in TOOLS}
    missing = [tool for tool in NEEDED if not paths[tool].is_file()]
    if missing:
        raise Rejected(directory, origin, f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} not there")

    def ask(tool: str, *arguments: str) -> Captured:
        return _ask(paths[tool], arguments, seconds)

    must = (*NEEDED, *([COUNTER] if paths[COUNTER].is_file() else []))
    try:
        version_shown = ask("llama-imatrix", "--version")
        helps = {tool: _text(ask(tool, "--help")) for tool in must}
        options = {tool: parse_options(text) for tool, text in helps.items()}
        types = parse_types(helps["llama-quantize"])
        for tool in must:
            if not options[tool]:
                raise _Unfit(f"{tool} runs, but its help lists no options: is it llama.cpp's?")
        if not types:
            raise _Unfit("llama-quantize runs, but its help lists no quantisation types")
        for tool in TOOLS:
            if tool not in must and paths[tool].is_file():
                try:
                    helps[tool] = _text(ask(tool, "--help"))
                except _Unfit:
                    continue  # not required: it is not part of this toolchain
                options[tool] = parse_options(helps[tool])
        listed = ask("llama-imatrix", "--list-devices") if "--list-devices" in options["llama-imatrix"] else None
    except _Unfit as unfit:
        raise Rejected(directory, origin, str(unfit)) from unfit
    version, build, commit = parse_version(_text(version_shown))
    devices = parse_devices(_text(listed)) if listed and listed.returncode == 0 else ()
    spoken = _text(version_shown) + (_text(listed) if listed else "")
    home = paths["llama-imatrix"].resolve().parent
    return Toolchain(
        directory=directory,
        origin=origin,
        tools={tool: paths[tool] for tool in TOOLS if tool in options},
        version=version,
        build=build,
        commit=commit,
        backends=find_backends(spoken, _library_names(home, directory)),
        devices=devices,
        types=types,
        options=options,
        converter=_converter(home),
        usage={tool: read_usage(text) for tool, text in helps.items()},
    )


class _Unfit(Exception):
    """Why one binary was rejected."""


def _ask(path: Path, arguments: Iterable[str], seconds: float) -> Captured:
    name = path.name
    try:
        # Releases of 2024 and forks write a log to the current directory.
        with scratch_folder() as folder:
            answer = capture(Command((str(path.absolute()), *arguments), cwd=folder), seconds=seconds)
    except TimeoutError as error:
        raise _Unfit(f"{name} gave no answer within {seconds:g} s") from error
    except FileNotFoundError as error:
        raise _Unfit(f"{name} cannot start: the loader or interpreter it asks for is not on this machine") from error
    except PermissionError as error:
        raise _Unfit(f"{name} may not be executed ({error.strerror})") from error
    except OSError as error:
        raise _Unfit(f"{name} is not a program for this machine ({error.strerror or error})") from error
    why = why_unfit(answer)
    if why:
        raise _Unfit(f"{name} does not run: {why}")
    return answer


def why_unfit(answer: Captured) -> str:
    """Return why a run of ``--help`` or ``--version`` failed; empty if it succeeded.

    Exit code 1 counts as success: ``llama-quantize`` ends with it after its help.
    """
    code, text = answer.returncode, _text(answer)
    if library := _MISSING_LIBRARY.search(text):
        return f"the shared library {library.group(1) or library.group(2)} is missing"
    if "version `GLIBC" in text or "version `GLIBCXX" in text:
        return "it was built for a newer system (its C or C++ library is newer than this machine's)"
    if code in (0, 1):
        return ""
    # After a crash the last lines are ordinary output; a program that aborts says why.
    return ending(code) if signal_name(code) not in ("", "SIGABRT") else f"{ending(code)}{_last_line(text)}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f", {lines[-1][:200]}" if lines else ""


def _text(answer: Captured) -> str:
    return f"{answer.stdout[:_MAX_TEXT]}\n{answer.stderr[:_MAX_TEXT]}"


def _listed(names: Iterable[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last


def parse_options(text: str) -> frozenset[str]:
    """Every option spelling a help text lists: ``{"-m", "--model", …}``."""
    text = text[:_MAX_TEXT]
    listed = {name for line in _OPTION_LINE.findall(text) for name in _SPELLING.findall(line)}
    return frozenset(listed | set(_OPTION_IN_USAGE.findall(text)))


def parse_types(text: str) -> tuple[QuantType, ...]:
    """The types ``llama-quantize``'s help lists, in its order; a name listed twice counts once."""
    text = text[:_MAX_TEXT]
    heading = _TYPES_HEADING.search(text)
    found: dict[str, QuantType] = {}
    for number, name, line in _TYPE_LINE.findall(text[heading.end() :] if heading else ""):
        alias = _ALIAS.search(line)
        found.setdefault(name, QuantType(name, int(number) if number else None, line.strip(), alias.group(1) if alias else ""))
        if len(found) == _MAX_TYPES:
            break
    return tuple(found.values())


def parse_version(text: str) -> tuple[str, str, str]:
    """``(version, build, commit)`` of ``--version``; ``unknown`` and empty strings for what it does not state.

    Two shapes are known: ``version: 0.5.0-dev (build 1, commit 0c1e570)`` and the older ``version: 4567 (abcdef1)``, whose
    number is the build.
    """
    match = _VERSION.search(text[:_MAX_TEXT])
    if not match:
        return "unknown", "", ""
    version, inside = match.group(1)[:64], match.group(2) or ""
    build = re.search(r"build (\w{1,32})", inside)
    commit = re.search(r"commit ([\w.+-]{1,64})", inside) or re.fullmatch(r"([0-9a-f]{6,40})", inside.strip())
    number = build.group(1) if build else version if version.isdigit() else ""
    # A source tree without its history counts 0 commits, which is not a build number.
    return version, "" if number == "0" else number, commit.group(1) if commit else ""


def parse_devices(text: str) -> tuple[str, ...]:
    """The devices ``--list-devices`` names, one line each: ``CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)``."""
    _, found, rest = text[:_MAX_TEXT].partition("Available devices:")
    lines = (line for line in rest.splitlines() if re.match(r"\s+[\w.:\[\]-]+: ", line))
    return tuple(line.strip()[:200] for line, _ in zip(lines, range(_MAX_DEVICES), strict=False)) if found else ()


def find_backends(text: str, libraries: Iterable[str]) -> tuple[str, ...]:
    """``cpu`` plus every backend that the tools mention or that is next to them as a ggml library."""
    found = {match.group(1) for name in libraries if (match := _BACKEND_LIBRARY.match(name))}
    for backend, words in _BACKEND_WORDS:
        if words.search(text) and not (backend == "cuda" and "hip" in found):
            found.add(backend)
    return ("cpu", *(backend for backend in _BACKENDS if backend in found))


def _library_names(*homes: Path) -> set[str]:
    """Return the names of the files next to the binaries and in an install prefix's library folder."""
    folders = {folder for home in homes for folder in (home, home.parent / "lib", home.parent / "libexec")}
    return {entry.name for folder in folders if folder.is_dir() for entry in folder.glob("*ggml-*")}


def _converter(home: Path) -> Path | None:
    """The converter of a managed toolchain, an install prefix or a checkout (bin, build/bin, build/bin/Release)."""
    prefix = home.parent
    places = (home, prefix / "converter", prefix / "libexec", prefix, prefix.parent, prefix.parent.parent)
    return next((place / CONVERTER for place in places if (place / CONVERTER).is_file()), None)
