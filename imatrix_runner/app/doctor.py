"""``doctor``: checks what this machine has and lacks, each with a remedy."""

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

from imatrix_runner.context.engine_choice import (
    EMBEDDED,
    EngineChoice,
    EngineNeeds,
    Machine,
    choose,
    repacking_of_library,
    weakness_of_programs,
)
from imatrix_runner.engines.embedded.bindings import UnusableBindings
from imatrix_runner.engines.embedded.native_build import NoNative, compile_kernels
from imatrix_runner.errors import RunnerError, ToolchainError
from imatrix_runner.extras import CONVERT
from imatrix_runner.files import existing_parent, free_bytes, human_bytes
from imatrix_runner.resources import CALIBRATION_TEXT, DEMO_MODEL, resource
from imatrix_runner.toolchain.capabilities import matrix_support
from imatrix_runner.toolchain.hardware import advice, backend_for, gpus, likes_bf16
from imatrix_runner.toolchain.pip_install import AFRESH, DISTRIBUTION, pip_install
from imatrix_runner.toolchain.program_proof import prove_programs
from imatrix_runner.toolchain.store import cache_dir

Verdict = Literal["ok", "warn", "fail"]

_PACKAGES = ("click", "rich", "gguf", "numpy", "huggingface_hub", "msgspec", "psutil")
_MULTIPLIES = "multiplies weights of every main type, as loaded and repacked for this processor"
_LOW_DISK = 20 << 30
_LOW_MEMORY = 4 << 30


@dataclass(frozen=True)
class Check:
    """One line of the output. ``fail`` means that the main job cannot run; ``todo`` is the remedy."""

    name: str
    verdict: Verdict
    detail: str
    todo: str = ""


def examine(llama_cpp: Path | None, work_dir: Path, *, network: bool) -> list[Check]:
    """Run every check, in the order of the output."""
    machine = Machine(llama_cpp)
    try:
        choice: EngineChoice | ToolchainError = choose("auto", EngineNeeds(), machine)
    except ToolchainError as error:
        choice = error
    checks = [*_python(), *_engine(choice), *_bindings(machine), *_kernels(machine), *_toolchain(machine)]
    checks += [*_gpu(choice), *_source_type(choice)]
    checks += [*_memory(), *_disks(work_dir), *_resources(), *_converter(machine)]
    return [*checks, *_hub(network=network)]


def _python() -> Iterator[Check]:
    yield Check("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})")
    versions: list[str] = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Check("Packages", "fail", f"{name} is missing", "pip install --force-reinstall imatrix-runner")
    yield Check("Packages", "ok", ", ".join(versions))


def _engine(choice: EngineChoice | ToolchainError) -> Iterator[Check]:
    """Which engine ``--engine auto`` chooses, and why."""
    if isinstance(choice, ToolchainError):
        yield Check("Engine", "fail", choice.why, choice.todo)
    elif choice.notice is not None and choice.name != EMBEDDED:
        verdict: Verdict = "warn" if choice.notice.level == "warning" else "ok"
        yield Check("Engine", verdict, choice.notice.text.removeprefix("Engine: "))
    else:
        why = f"{DISTRIBUTION} works here" if choice.name == EMBEDDED else f"{DISTRIBUTION} is not installed"
        yield Check("Engine", "ok", f"{choice.name}: {why}")


def _bindings(machine: Machine) -> Iterator[Check]:
    bindings = machine.bindings
    if isinstance(bindings, UnusableBindings):
        yield Check(DISTRIBUTION, "warn", bindings.why, bindings.todo)
        return
    devices = ", ".join(bindings.devices) or "no GPU seen"
    where = f"{bindings.directory} ({bindings.origin})"
    identity = bindings.identity().removeprefix(f"{DISTRIBUTION} ")
    yield Check(DISTRIBUTION, "ok", f"{identity}, {'/'.join(bindings.backends)}, {devices}, {where}")
    weakness, todo = repacking_of_library(bindings)
    yield Check("  weights", "warn" if weakness else "ok", weakness or _MULTIPLIES, todo)


def _kernels(machine: Machine) -> Iterator[Check]:
    """Whether levels are quantised with this program's kernels, where those are proven, or only with ggml's."""
    if isinstance(machine.bindings, UnusableBindings):
        return
    native = compile_kernels(cache_dir(), machine.bindings.digest)
    if isinstance(native, NoNative):
        why = f"only ggml's, which take several times as long for the same bytes: {native.why}"
        yield Check("Kernels", "warn", why, "Install one (Debian, Ubuntu: apt-get install gcc); nothing else is needed.")
    else:
        yield Check("Kernels", "ok", f"imatrix-runner's, used where they give ggml's bytes: {native.library}")


def _toolchain(machine: Machine) -> Iterator[Check]:
    toolchain = machine.toolchain
    if toolchain is not None:
        detail = f"{toolchain.identity()}, {'/'.join(toolchain.backends)}, {toolchain.directory} ({toolchain.origin})"
        yield Check("llama.cpp", "ok", detail)
        proof = prove_programs(toolchain, cache_dir())
        weakness, todo = weakness_of_programs(toolchain, proof)
        yield Check(
            "  weights",
            "fail" if proof.broken and isinstance(machine.bindings, UnusableBindings) else "warn" if weakness else "ok",
            weakness or _MULTIPLIES,
            todo,
        )
        formats = matrix_support(toolchain, cache_dir())
        unread = formats.reads is None
        yield Check("  imatrix", "warn" if unread else "ok", str(formats), "imatrix-runner tools build" if unread else "")
    elif isinstance(machine.bindings, UnusableBindings) or machine.named:
        yield Check("llama.cpp", "fail", "no working programs found", "imatrix-runner tools build   (about 4 minutes)")
    else:
        yield Check(
            "llama.cpp",
            "ok",
            "no programs; needed to convert Hugging Face models and for --engine binaries: tools build",
        )
    for entry in machine.found.rejected:
        yield Check("  turned down", "warn", str(entry))


def _gpu(choice: EngineChoice | ToolchainError) -> Iterator[Check]:
    seen = gpus()
    hint = None
    if isinstance(choice, EngineChoice) and choice.bindings is not None and seen and len(choice.bindings.backends) == 1:
        flag = "HIP" if backend_for(seen[0]) == "hip" else backend_for(seen[0]).upper()
        todo = pip_install(*AFRESH, cmake=f"-DGGML_{flag}=on")
        hint = f"{seen[0]} found, but {DISTRIBUTION} is built for the CPU only: {todo}"
    elif isinstance(choice, EngineChoice) and choice.toolchain is not None:
        hint = advice(seen, choice.toolchain.backends)
    yield Check("GPU", "warn" if hint else "ok", ", ".join(seen) or "none found; the CPU is used", hint or "")


def _source_type(choice: EngineChoice | ToolchainError) -> Iterator[Check]:
    if isinstance(choice, EngineChoice) and choice.bindings is not None and likes_bf16(choice.bindings.features):
        yield Check("Source type", "ok", "on the CPU, BF16 models compute about 1.4x faster than F16 ones here (AVX512_BF16)")


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
            yield Check(name, "fail", f"{where} is not writable", f"Choose another place with {option}.")
        else:
            todo = f"Models need more space; choose another disk with {option}." if free < _LOW_DISK else ""
            yield Check(name, "warn" if todo else "ok", f"{human_bytes(free)} free at {where}", todo)


def _resources() -> Iterator[Check]:
    try:
        detail = ", ".join(f"{name} {human_bytes(resource(name).stat().st_size)}" for name in (CALIBRATION_TEXT, DEMO_MODEL))
    except RunnerError as error:
        yield Check("Shipped files", "fail", error.why, error.todo)
    else:
        yield Check("Shipped files", "ok", detail)


def _converter(machine: Machine) -> Iterator[Check]:
    missing, toolchain = CONVERT.missing(), machine.toolchain
    if toolchain is None or toolchain.converter is None:
        without = "this toolchain has no converter" if toolchain is not None else "it needs llama.cpp's programs"
        yield Check("Conversion", "warn", f"Hugging Face models cannot be converted: {without}", "imatrix-runner tools build")
    elif missing:
        detail = f"Hugging Face models cannot be converted: {', '.join(missing)} missing"
        yield Check("Conversion", "warn", detail, CONVERT.install)
    else:
        yield Check("Conversion", "ok", "Hugging Face models can be converted")


def _hub(*, network: bool) -> Iterator[Check]:
    from imatrix_runner.models.hub import hub_endpoint, reachability, token_source

    source = token_source()
    token = f"token from {source}" if source else "no token (public models need none)"
    if not network:
        yield Check("Hub", "ok", f"not checked; {token}")
        return
    answer = reachability()
    fine = answer.startswith(("reachable", "not asked"))
    todo = "" if fine else "Check the network, HF_ENDPOINT and proxies; local models work without."
    yield Check("Hub", "ok" if fine else "warn", f"{hub_endpoint()}: {answer}; {token}", todo)


def environment_variables(env: Mapping[str, str]) -> list[str]:
    """Names of the imatrix-runner and llama.cpp variables that are set; no values, which may be secret."""
    return sorted(
        name for name in env if name.startswith(("IMATRIX_RUNNER_", "LLAMA_ARG_", "LLAMA_LOG_", "LLAMA_CPP_LIB_PATH"))
    )
