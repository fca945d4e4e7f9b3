"""The accelerators of this machine, as reported by its own tools; only for advice, never for decisions."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.process import Command, capture

_SECONDS = 10.0
_MAX_GPUS = 64
_GPU_LINE = re.compile(
    r"(?:(?P<device>[\w.-]{1,40}): )?(?P<name>.{1,200}?)(?: \((?P<total>\d{1,9}) MiB(?:, (?P<free>\d{1,9}) MiB free)?\))?"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name, and its memory in bytes if reported (Apple's GPUs share the machine's). ``device``: llama.cpp's
    name for it, ``CUDA0``."""

    name: str
    n_bytes: int | None = None
    free_bytes: int | None = None
    device: str = ""


def gpus() -> tuple[str, ...]:
    """Return one line per GPU: ``NVIDIA H200 (143771 MiB)``, ``AMD Instinct MI300X``, ``Apple M3 Max (Metal)``; empty without
    one."""
    found = [*parse_nvidia(_say("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"))]
    found += parse_rocm(_say("rocminfo"))
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.append(f"{_say('sysctl', '-n', 'machdep.cpu.brand_string').strip() or 'Apple GPU'} (Metal)")
    return tuple(found[:_MAX_GPUS])


def parse_gpus(lines: Sequence[str]) -> tuple[Gpu, ...]:
    """Parse GPUs from the lines of :func:`gpus` or of ``--list-devices``: ``CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)``.

    A build with several backends lists each GPU once for each backend: those of the first backend count.
    """
    found = [_gpu(match) for line in lines[:_MAX_GPUS] if (match := _GPU_LINE.fullmatch(line))]
    return tuple(gpu for gpu in found if _backend(gpu) == _backend(found[0]))


def _gpu(match: re.Match[str]) -> Gpu:
    total, free = (int(match[part]) << 20 if match[part] else None for part in ("total", "free"))
    return Gpu(match["name"], total, free, match["device"] or "")


def _backend(gpu: Gpu) -> str:
    return gpu.device.rstrip("0123456789")


def may_have_gpu(devices: Path = Path("/dev"), system: str = platform.system()) -> bool:
    """Whether the machine may have a GPU, so that programs should be asked: on Linux every driver shows its devices in
    ``/dev``."""
    if system != "Linux":
        return True
    return any(next(devices.glob(pattern), None) for pattern in ("nvidia[0-9]*", "dri/renderD*", "kfd", "dxg", "mali*"))


def likes_bf16(features: str) -> bool:
    """Whether BF16 weights compute faster than F16 and F32 ones on this processor, by llama.cpp's own list of features.

    Measured with AVX512_BF16 only: 1.34 to 1.43 times F16's speed.
    """
    return "AVX512_BF16 = 1" in features


def backend_for(gpu: str) -> str:
    """Return the backend to build for a GPU, as named by :func:`gpus`."""
    if gpu.endswith("(Metal)"):
        return "metal"
    return "hip" if gpu.startswith("AMD") else "cuda"


def advice(found: Sequence[str], backends: Sequence[str]) -> str | None:
    """Return a sentence for a machine whose GPU the toolchain cannot use, else None."""
    if not found or any(backend != "cpu" for backend in backends):
        return None
    return f"{found[0]} is there, but this toolchain is CPU-only: imatrix-runner tools build --backend {backend_for(found[0])}"


def parse_nvidia(text: str) -> list[str]:
    """Lines of ``nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits``."""
    rows = re.findall(r"^(.{1,80}), (\d+)\s*$", text, re.MULTILINE)
    return [f"{name if name.startswith('NVIDIA') else f'NVIDIA {name}'} ({memory} MiB)" for name, memory in rows]


def parse_rocm(text: str) -> list[str]:
    """The GPU agents of ``rocminfo``: those whose device type is GPU, by their marketing name."""
    agents = re.split(r"^Agent \d+", text, flags=re.MULTILINE)[1:]
    found = []
    for agent in agents:
        name = re.search(r"Marketing Name:[ \t]*(\S.{0,78}\S)", agent)
        if re.search(r"Device Type:\s*GPU", agent):
            label = name.group(1).strip() if name else "GPU"
            found.append(label if label.startswith("AMD") else f"AMD {label}")
    return found


def _say(*argv: str) -> str:
    """Return a tool's output; empty if it is not installed, fails, or does not answer in time."""
    try:
        captured = capture(Command(argv), seconds=_SECONDS)
    except (OSError, TimeoutError):
        return ""
    return captured.stdout if captured.returncode == 0 else ""


def processor_name() -> str:
    """Return the processor's name as the system gives it, ``AMD EPYC 9554 64-Core Processor``; else the kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(filter(None, names), "") or os.environ.get("PROCESSOR_IDENTIFIER") or platform.machine()


def machine_fingerprint(devices: Sequence[str]) -> str:
    """``sha256:…`` of what tells this machine from another: its name, processors and llama.cpp's ``devices``."""
    parts = (platform.node(), cpu_features(), str(os.cpu_count()), *(device.partition(" (")[0] for device in devices))
    return "sha256:" + hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def cpu_features() -> str:
    """Return the processor's features as text, to distinguish it from another one (Linux; elsewhere only its name or kind).

    Not by :func:`platform.processor`, which starts ``uname`` with the user's whole environment, tokens included.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    unknown = os.environ.get("PROCESSOR_IDENTIFIER") or platform.machine()  # the former on Windows
    return next((line for line in lines if line.startswith(("flags", "Features"))), unknown)
