"""The requirements of a build, what to install if one is missing, and the causes of failed builds from their logs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.environment import find_program, search_path

Find = Callable[[str], str | None]

# What to install, by package manager; "" is the advice where none of them is available.
_PACKAGES: Mapping[str, Mapping[str, str]] = {
    "cmake": {
        "apt-get": "cmake",
        "dnf": "cmake",
        "pacman": "cmake",
        "brew": "cmake",
        "winget": "Kitware.CMake",
        "": "CMake 3.14 or newer (also: pip install cmake)",
    },
    "compiler": {
        "apt-get": "build-essential",
        "dnf": "gcc-c++",
        "pacman": "base-devel",
        "brew": "llvm",
        "winget": "Microsoft.VisualStudio.2022.BuildTools",
        "": "a C and C++17 compiler (GCC or Clang; on macOS: xcode-select --install)",
    },
    "ninja": {
        "apt-get": "ninja-build",
        "dnf": "ninja-build",
        "pacman": "ninja",
        "brew": "ninja",
        "winget": "Ninja-build.Ninja",
        "": "Ninja or Make (also: pip install ninja)",
    },
    "git": {"apt-get": "git", "dnf": "git", "pacman": "git", "brew": "git", "winget": "Git.Git", "": "git"},
    "cuda": {
        "apt-get": "nvidia-cuda-toolkit",
        "dnf": "cuda-toolkit",
        "pacman": "cuda",
        "winget": "Nvidia.CUDA",
        "": "NVIDIA's CUDA toolkit",
    },
    "vulkan": {
        "apt-get": "libvulkan-dev glslc spirv-headers",
        "dnf": "vulkan-loader-devel glslc spirv-headers-devel",
        "pacman": "vulkan-devel shaderc spirv-headers",
        "brew": "vulkan-loader vulkan-headers shaderc spirv-headers",
        "winget": "KhronosGroup.VulkanSDK",
        "": "the Vulkan SDK",
    },
    "hip": {"dnf": "rocm-hip-devel hipblas-devel rocblas-devel", "pacman": "rocm-hip-sdk", "": "AMD's ROCm HIP SDK"},
    "metal": {"": "Apple's developer tools: xcode-select --install (Metal exists on macOS only)"},
}
_INSTALL = {
    "apt-get": "sudo apt-get install",
    "dnf": "sudo dnf install",
    "pacman": "sudo pacman -S",
    "brew": "brew install",
    "winget": "winget install",
}
_CUDA_PLACES = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc")
_HIP_PLACES = ("/opt/rocm/bin/hipcc",)


@dataclass(frozen=True)
class Need:
    """A requirement of a build: a plain phrase, and what to install."""

    what: str
    thing: str


@dataclass(frozen=True)
class Diagnosis:
    """Why a build failed, in one phrase, and what to do. ``full_disk``: the error is a :class:`NoSpaceError`."""

    why: str
    todo: str
    full_disk: bool = False


def tool_path(env: Mapping[str, str]) -> str:
    """``PATH`` with this Python's own scripts added: so ``pip install cmake ninja`` works without an activated venv."""
    return os.pathsep.join(filter(None, (search_path(env), str(Path(sys.executable).parent))))


def finder(env: Mapping[str, str]) -> Find:
    """Look programs up as a build would."""
    path = tool_path(env)
    return lambda name: find_program(name, path)


def manager(find: Find) -> str:
    """Return the package manager of this machine; empty if none is known."""
    return next((name for name in _INSTALL if find(name)), "")


def how_to_install(thing: str, with_manager: str) -> str:
    """``sudo apt-get install cmake``, or in words where the manager has no such package."""
    packages = _PACKAGES[thing]
    if with_manager in packages and with_manager:
        return f"{_INSTALL[with_manager]} {packages[with_manager]}"
    return f"install {packages['']}"


def missing_needs(backend: str, by_git: bool, env: Mapping[str, str], find: Find, system: str = sys.platform) -> list[Need]:
    """Return everything that this machine lacks for a build, before the build starts."""

    def any_of(*names: str | None) -> bool:
        return any(find(name) for name in names if name)

    def exists(*places: str | None) -> bool:
        return any(Path(place).is_file() for place in places if place)

    needs: list[Need] = []
    if not any_of("cmake"):
        needs.append(Need("CMake", "cmake"))
    if system != "win32":  # there CMake finds Visual Studio by itself
        if not (any_of(env.get("CC"), "cc", "gcc", "clang") and any_of(env.get("CXX"), "c++", "g++", "clang++")):
            needs.append(Need("a C and C++ compiler", "compiler"))
        if not any_of("ninja", "make", "gmake"):
            needs.append(Need("Ninja or Make", "ninja"))
    if by_git and not any_of("git"):
        needs.append(Need("git", "git"))
    if backend == "cuda":
        homes = (env.get("CUDAToolkit_ROOT"), env.get("CUDA_HOME"), env.get("CUDA_PATH"))
        if not any_of(env.get("CUDACXX"), "nvcc") and not exists(
            *_CUDA_PLACES, *(f"{home}/bin/nvcc" for home in homes if home)
        ):
            needs.append(Need("the CUDA toolkit (nvcc)", "cuda"))
    if backend == "vulkan" and not any_of("glslc"):
        needs.append(Need("the Vulkan SDK (glslc)", "vulkan"))
    if backend == "hip":
        home = env.get("ROCM_PATH")
        if not any_of("hipcc") and not exists(*_HIP_PLACES, f"{home}/bin/hipcc" if home else None):
            needs.append(Need("ROCm's HIP compiler (hipcc)", "hip"))
    if backend == "metal" and system != "darwin":
        needs.append(Need("Metal", "metal"))
    return needs


# First match wins. A key of _PACKAGES as remedy means: install it.
_SIGNS: tuple[tuple[str, str, str], ...] = (
    (r"Disk quota exceeded", "the disk quota is used up", "disk"),
    (r"No space left on device", "the disk is full", "disk"),
    (
        (
            r"Killed signal terminated program|fatal error: Killed|compiler error: Killed|execute command: Killed|"
            r"virtual memory exhausted|: out of memory|annot allocate memory"
        ),
        "the compiler ran out of memory",
        "Give it fewer jobs (-j 1) or close other programs, then run the same command again: it continues.",
    ),
    (r"CMake (?:[\d.]+ or higher|3\.\d+ or higher) is required", "this CMake is too old", "cmake"),
    (
        r"unsupported GNU version|#error -- unsupported|nvcc fatal\s*: Unsupported gpu|Unsupported gpu architecture",
        "this CUDA toolkit does not work with this compiler or GPU",
        "Set CUDAHOSTCXX to a supported compiler, or install a matching CUDA toolkit.",
    ),
    (
        r"Could(?: not|n't) find (?:nvcc|CUDAToolkit)|No CMAKE_CUDA_COMPILER|CUDA Toolkit not found|CUDA::\w+",
        "no complete CUDA toolkit was found",
        "cuda",
    ),
    (r"Could NOT find Vulkan|SPIRV-Headers|glslc.*not found|vulkan/vulkan\.h", "no complete Vulkan SDK was found", "vulkan"),
    (
        r"hip-config\.cmake|hipConfig\.cmake|Could not find.*hip|HIP_PLATFORM|find ROCm",
        "no complete ROCm HIP SDK was found",
        "hip",
    ),
    (
        r"No CMAKE_(?:C|CXX)_COMPILER could be found|is not able to compile a simple test program",
        "no working compiler was found",
        "compiler",
    ),
    (r"unable to find a build program|CMAKE_MAKE_PROGRAM is not set", "neither Ninja nor Make was found", "ninja"),
    (r"Metal framework not found|METAL_LIBRARY|xcrun: error", "Apple's developer tools are missing", "metal"),
    (
        r"unrecognized (?:command[- ]line )?option|cxx_std_17|filesystem: No such file",
        "this compiler is too old for llama.cpp",
        "compiler",
    ),
    (r"file (?:truncated|too short|not recognized|format not recognized)", "an object file is damaged", "fresh"),
)


def diagnose(lines: Sequence[str], out_of_memory: bool, with_manager: str) -> Diagnosis | None:
    """Return the cause of a failed build from its log, or None if it is unknown."""
    if out_of_memory:
        lines = [*lines, "virtual memory exhausted"]
    text = "\n".join(lines)
    for pattern, why, remedy in _SIGNS:
        if not re.search(pattern, text):
            continue
        if remedy == "disk":
            return Diagnosis(why, "Free some space, or choose another disk with IMATRIX_RUNNER_CACHE.", full_disk=True)
        if remedy == "fresh":
            return Diagnosis(why, "Start the build again from scratch with: imatrix-runner tools build --force")
        if remedy in _PACKAGES:
            return Diagnosis(why, f"{_sentence(how_to_install(remedy, with_manager))}, then run the same command again.")
        return Diagnosis(why, remedy)
    return None


def _sentence(text: str) -> str:
    return f"Type: {text}" if text.startswith(tuple(_INSTALL.values())) else text[:1].upper() + text[1:]


def needs_advice(needs: Sequence[Need], with_manager: str) -> str:
    """Return one line that says how to install everything that is missing."""
    if with_manager and all(with_manager in _PACKAGES[need.thing] for need in needs):
        packages = " ".join(_PACKAGES[need.thing][with_manager] for need in needs)
        return f"Type: {_INSTALL[with_manager]} {packages}"
    return _sentence("; ".join(how_to_install(need.thing, with_manager) for need in needs))
