"""What accelerators this machine has, as far as its own tools tell; only for advice, never for decisions."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.process import Command, capture

_SECONDS = 10.0
_MAX_GPUS = 64
_TOLD = re.compile(
    r"(?:(?P<device>[\w.-]{1,40}): )?(?P<name>.{1,200}?)(?: \((?P<total>\d{1,9}) MiB(?:, (?P<free>\d{1,9}) MiB free)?\))?"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name, and its memory in bytes as far as it is told (Apple's shares the machine's). ``device``: llama.cpp's
    name for it, ``CUDA0``."""

    name: str
    n_bytes: int | None = None
    free_bytes: int | None = None
    device: str = ""


def gpus() -> tuple[str, ...]:
    """One line per GPU: ``NVIDIA H200 (143771 MiB)``, ``AMD Instinct MI300X``, ``Apple M3 Max (Metal)``; empty without one."""
    found = [*parse_nvidia(_say("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"))]
    found += parse_rocm(_say("rocminfo"))
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.append(f"{_say('sysctl', '-n', 'machdep.cpu.brand_string').strip() or 'Apple GPU'} (Metal)")
    return tuple(found[:_MAX_GPUS])


def parse_gpus(lines: Sequence[str]) -> tuple[Gpu, ...]:
    """GPUs as :func:`gpus` tells them, or as ``--list-devices`` does: ``CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)``.

    A build with several backends names each GPU once for each: those of the first backend count.
    """
    found = [_gpu(match) for line in lines[:_MAX_GPUS] if (match := _TOLD.fullmatch(line))]
    return tuple(gpu for gpu in found if _backend(gpu) == _backend(found[0]))


def _gpu(match: re.Match[str]) -> Gpu:
    total, free = (int(match[part]) << 20 if match[part] else None for part in ("total", "free"))
    return Gpu(match["name"], total, free, match["device"] or "")


def _backend(gpu: Gpu) -> str:
    return gpu.device.rstrip("0123456789")


def may_have_gpu(devices: Path = Path("/dev"), system: str = platform.system()) -> bool:
    """Whether asking programs for GPUs can be worth the time: on Linux every driver shows its devices in ``/dev``."""
    if system != "Linux":
        return True
    return any(next(devices.glob(pattern), None) for pattern in ("nvidia[0-9]*", "dri/renderD*", "kfd", "dxg", "mali*"))


def likes_bf16(features: str) -> bool:
    """Whether BF16 weights compute faster than F16 and F32 ones on this processor, by llama.cpp's own line about it.

    Measured with AVX512_BF16 only: 1.34 to 1.43 times F16's speed.
    """
    return "AVX512_BF16 = 1" in features


def backend_for(gpu: str) -> str:
    """The backend to build for a GPU as :func:`gpus` names it."""
    if gpu.endswith("(Metal)"):
        return "metal"
    return "hip" if gpu.startswith("AMD") else "cuda"


def advice(found: Sequence[str], backends: Sequence[str]) -> str | None:
    """A sentence for machines whose GPU lies idle because the toolchain cannot use it, else None."""
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
    """What a tool says; nothing when it is not installed, fails, or does not answer in time."""
    try:
        told = capture(Command(argv), seconds=_SECONDS)
    except (OSError, TimeoutError):
        return ""
    return told.stdout if told.returncode == 0 else ""


def cpu_features() -> str:
    """What the processor can do, as text to tell it from another one (Linux; elsewhere only its name)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
