"""``doctor``: what this machine has, what it lacks, and what to do about each."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from imatrix_runner.errors import RunnerError
from imatrix_runner.files import existing_parent, free_bytes, human_bytes
from imatrix_runner.models.convert import missing_packages
from imatrix_runner.resources import CALIBRATION_TEXT, DEMO_MODEL, resource
from imatrix_runner.toolchain.hardware import advice, gpus
from imatrix_runner.toolchain.locate import Found, locate
from imatrix_runner.toolchain.store import cache_dir

Verdict = Literal["ok", "warn", "fail"]

_PACKAGES = ("click", "rich", "gguf", "numpy", "huggingface_hub", "msgspec", "psutil")
_LOW_DISK = 20 << 30
_LOW_MEMORY = 4 << 30


@dataclass(frozen=True)
class Check:
    """One line of the page. ``fail`` means that the main job cannot run; ``todo`` is the remedy."""

    name: str
    verdict: Verdict
    detail: str
    todo: str = ""


def examine(llama_cpp: Path | None, work_dir: Path, *, network: bool) -> list[Check]:
    """Every check, in the order of the page."""
    found = locate(llama_cpp, env=os.environ, cache=cache_dir())
    checks = [*_python(), *_toolchain(found), *_gpu(found), *_memory(), *_disks(work_dir), *_resources(), *_converter(found)]
    return [*checks, *_hub(network=network)]


def _python() -> Iterator[Check]:
    yield Check("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})")
    versions: list[str] = []
    for name in (*_PACKAGES, "llama-cpp-python"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name in _PACKAGES:
                yield Check("Packages", "fail", f"{name} is missing", "pip install --force-reinstall imatrix-runner")
    yield Check("Packages", "ok", ", ".join(versions))


def _toolchain(found: Found) -> Iterator[Check]:
    toolchain = found.toolchain
    if toolchain is not None:
        detail = f"{toolchain.identity()}, {'/'.join(toolchain.backends)}, {toolchain.directory} ({toolchain.origin})"
        yield Check("llama.cpp", "ok", detail)
    else:
        yield Check("llama.cpp", "fail", "no programs that run were found", "imatrix-runner tools build   (about 4 minutes)")
    for entry in found.rejected:
        yield Check("  turned down", "warn", str(entry))


def _gpu(found: Found) -> Iterator[Check]:
    seen = gpus()
    backends = found.toolchain.backends if found.toolchain is not None else ()
    hint = advice(seen, backends) if found.toolchain is not None else None
    yield Check("GPU", "warn" if hint else "ok", ", ".join(seen) or "none found: the CPU computes", hint or "")


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    low = memory.available < _LOW_MEMORY
    todo = "Close other programs; quantise with --jobs 1 --max-buffer-size 512." if low else ""
    detail = f"{human_bytes(memory.available)} available of {human_bytes(memory.total)}, {psutil.cpu_count()} CPU threads"
    yield Check("Memory", "warn" if low else "ok", detail, todo)


def _disks(work_dir: Path) -> Iterator[Check]:
    for name, path, option in (("Disk, work", work_dir, "--work-dir"), ("Disk, cache", cache_dir(), "IMATRIX_RUNNER_CACHE")):
        where = existing_parent(path)
        free = free_bytes(path)
        if not os.access(where, os.W_OK):
            yield Check(name, "fail", f"{where} cannot be written to", f"Choose another place with {option}.")
        else:
            todo = f"Models need room: another disk can be chosen with {option}." if free < _LOW_DISK else ""
            yield Check(name, "warn" if todo else "ok", f"{human_bytes(free)} free at {where}", todo)


def _resources() -> Iterator[Check]:
    try:
        detail = ", ".join(f"{name} {human_bytes(resource(name).stat().st_size)}" for name in (CALIBRATION_TEXT, DEMO_MODEL))
    except RunnerError as error:
        yield Check("Shipped files", "fail", error.why, error.todo)
    else:
        yield Check("Shipped files", "ok", detail)


def _converter(found: Found) -> Iterator[Check]:
    missing = missing_packages()
    if found.toolchain is not None and found.toolchain.converter is None:
        yield Check("Conversion", "warn", "this toolchain has no converter", "imatrix-runner tools build")
    elif missing:
        detail = f"Hugging Face models cannot be converted: {', '.join(missing)} missing"
        yield Check("Conversion", "warn", detail, "pip install 'imatrix-runner[convert]'")
    else:
        yield Check("Conversion", "ok", "Hugging Face models can be converted")


def _hub(*, network: bool) -> Iterator[Check]:
    from imatrix_runner.models.hub import hub_endpoint, reachability, token_source

    source = token_source()
    token = f"token from {source}" if source else "no token (public models need none)"
    if not network:
        yield Check("Hub", "ok", f"not asked; {token}")
        return
    answer = reachability()
    fine = answer.startswith(("reachable", "not asked"))
    todo = "" if fine else "Check the network, HF_ENDPOINT and proxies; local models work without."
    yield Check("Hub", "ok" if fine else "warn", f"{hub_endpoint()}: {answer}; {token}", todo)


def environment_variables(env: Mapping[str, str]) -> list[str]:
    """Our own and llama.cpp's variables that are set: names only, values may be secret."""
    return sorted(name for name in env if name.startswith(("IMATRIX_RUNNER_", "LLAMA_ARG_", "LLAMA_LOG_")))
