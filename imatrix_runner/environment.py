"""The environment of child processes: the variables they inherit, the programs they find, and where they start.

The user's environment holds credentials, and the current directory may hold files that someone else made. So a child gets only
variables known to matter for its work, a search path without relative entries, and a working directory that no ordinary user
can write to: Python imports modules, ggml loads backends, git reads its configuration and Windows loads libraries from the
directory a program starts in.
"""

from __future__ import annotations

import os
import re
import string
import sys
from collections.abc import Iterator, Mapping
from enum import Flag, auto
from pathlib import Path

FURTHER = "IMATRIX_RUNNER_PASS_ENV"
"""Names of further variables that every child gets, separated by commas: for drivers and wrappers not known here."""


class ChildNeeds(Flag):
    """What a child needs beyond the basics of the system, as groups of environment variables."""

    NOTHING = 0
    COMPUTE = auto()
    """GPU drivers, llama.cpp's backends, thread pools."""
    COMPILE = auto()
    """Compilers and CMake."""
    NETWORK = auto()
    """Proxies, certificates, pip's and git's own settings."""
    HUB = auto()
    """The place of the hub's cache; never a token."""


def _pattern(names: str) -> re.Pattern[str]:
    """Matches the whitespace-separated ``names``; ``X_*`` stands for every name that begins with ``X_``."""
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names.split()))


_BASICS = _pattern(
    """
    PATH HOME USER LOGNAME TMPDIR TEMP TMP TZ LANG LANGUAGE LC_* TERM NO_COLOR XDG_*
    LD_LIBRARY_PATH LD_PRELOAD DYLD_* GLIBC_TUNABLES MALLOC_* ASAN_OPTIONS UBSAN_OPTIONS LSAN_OPTIONS TSAN_OPTIONS NIX_LD*
    PYTHONPATH PYTHONHOME PYTHONUSERBASE PYTHONNOUSERSITE PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX PYTHONHASHSEED PYTHONUTF8
    VIRTUAL_ENV CONDA_PREFIX __PYVENV_LAUNCHER__
    SYSTEMROOT SYSTEMDRIVE WINDIR COMSPEC PATHEXT APPDATA LOCALAPPDATA PROGRAMDATA PROGRAMFILES* PROGRAMW6432 COMMONPROGRAM*
    ALLUSERSPROFILE USERPROFILE USERNAME HOMEDRIVE HOMEPATH PUBLIC OS NUMBER_OF_PROCESSORS PROCESSOR_*
    """
)
_GROUPS: Mapping[ChildNeeds, re.Pattern[str]] = {
    ChildNeeds.COMPUTE: _pattern(
        """
        GGML_* CUDA_* NVIDIA_* NV_* NCCL_* HIP_* HSA_* ROCR_* ROCM_* ROCBLAS_* HIPBLAS* MIOPEN_* AMD_* AMDGPU_* GPU_*
        VK_* VULKAN_* MESA_* RADV_* ANV_* DRI_* MTL_* METAL_* SYCL_* ONEAPI_* DNNL_* ONEDNN_* ZE_* ZES_* UR_* IGC_* OCL_*
        OPENCL_* MUSA_* ASCEND_* ACL_* *_VISIBLE_DEVICES
        OMP_* GOMP_* KMP_* MKL_* OPENBLAS_* BLIS_* VECLIB_* NUMEXPR_* TORCH_* PYTORCH_*
        """
    ),
    ChildNeeds.COMPILE: _pattern(
        """
        CC CXX CPP AR RANLIB LD CFLAGS CXXFLAGS CPPFLAGS LDFLAGS CMAKE* MAKEFLAGS NINJA* CCACHE_* SOURCE_DATE_EPOCH
        CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH LIBRARY_PATH COMPILER_PATH PKG_CONFIG* GCC_*
        CUDACXX CUDAHOSTCXX CUDAARCHS CUDAFLAGS CUDATOOLKIT_ROOT CUDA_* NVCC_* HIP* ROCM_* VULKAN_SDK
        SDKROOT DEVELOPER_DIR MACOSX_DEPLOYMENT_TARGET NIX_* CONDA_* INCLUDE LIB LIBPATH VS* VC* WINDOWSSDK* UCRT* UNIVERSALCRT*
        """
    ),
    ChildNeeds.NETWORK: _pattern(
        """
        HTTP_PROXY HTTPS_PROXY ALL_PROXY FTP_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NETRC
        PIP_* GIT_SSL_* GIT_HTTP_* GIT_CONFIG_GLOBAL GIT_CONFIG_SYSTEM GIT_CONFIG_NOSYSTEM DBUS_SESSION_BUS_ADDRESS
        """
    ),
    ChildNeeds.HUB: _pattern("HF_* HUGGINGFACE_* TRANSFORMERS_*"),
}
# A name that says it holds a credential is left out of every group, whatever it begins with. pip's own settings may carry one
# for its index; only pip gets those.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH|_KEY$|_PAT$")
# They silently change what llama.cpp's tools do.
_SCRUBBED = ("LLAMA_ARG_", "LLAMA_LOG_", "GGML_SCHED_DEBUG")
# Lists of directories, in which an empty or relative entry means "wherever the program was started".
_SEARCHED = frozenset(
    ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
)

_SPINS = "3000"
"""How often a waiting GNU OpenMP thread polls before it sleeps; 300,000 by default. ggml's threads synchronise after every
operation, and where other programs occupy the cores, waiting threads use up the time that the last one needs: on two cores,
next to two busy processes, an imatrix of a model of 130 million parameters took 23 s with the default and 13 s with this (alone
6.1 and 6.3 s; ``scripts/bench imatrix --vocab 32000 --types f16 --busy 2``)."""


def child_environment(
    extra: Mapping[str, str] | None = None, needs: ChildNeeds = ChildNeeds.COMPUTE, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a child: the basics and what ``needs`` names of ``env`` (by default this process's), plus ``extra``.

    Credentials and relative search paths are left out; variables are set that keep llama.cpp from hanging and from busy
    waiting.
    """
    env = os.environ if env is None else env
    passed = {name.strip() for name in env.get(FURTHER, "").split(",")}
    clean = {name: value for name, value in env.items() if name in passed or _belongs(name.upper(), needs)}
    for name in _SEARCHED & clean.keys():
        clean[name] = os.pathsep.join(_absolute_entries(clean[name]))
        if not clean[name]:
            del clean[name]
    clean.setdefault("PATH", os.defpath)
    # A failed assertion would fork and attach a debugger first, and that may hang for ever.
    clean.setdefault("GGML_NO_BACKTRACE", "1")
    if "OMP_WAIT_POLICY" not in clean:
        clean.setdefault("GOMP_SPINCOUNT", _SPINS)
    if os.name == "nt":
        clean["NoDefaultCurrentDirectoryInExePath"] = "1"
    clean.update(extra or {})
    return clean


def _belongs(name: str, needs: ChildNeeds) -> bool:
    if name.startswith(_SCRUBBED):
        return False
    if _BASICS.fullmatch(name):
        return True
    groups = [group for group in _GROUPS if group in needs and _GROUPS[group].fullmatch(name)]
    return ChildNeeds.NETWORK in groups or (bool(groups) and not _SECRET.search(name))


def credentials(env: Mapping[str, str]) -> tuple[str, ...]:
    """The values of variables whose names say that they hold a credential; not places where one is kept."""
    named = [value for name, value in env.items() if _SECRET.search(name.upper().replace("AUTHOR", ""))]
    return tuple(
        value for value in named if value and not Path(value).is_absolute() and not set(value) & set(string.whitespace)
    )


def _absolute_entries(searched: str) -> Iterator[str]:
    return (entry for entry in searched.split(os.pathsep) if entry and Path(entry).is_absolute())


def search_path(env: Mapping[str, str]) -> str:
    """``PATH`` without relative entries: a program that is in the current directory by chance must not be run."""
    return os.pathsep.join(_absolute_entries(env.get("PATH", os.defpath)))


def find_program(name: str, path: str) -> str | None:
    """The program ``name`` on a search ``path``, as an absolute path; a name with a directory in it stands for itself."""
    if Path(name).name != name:
        return os.path.abspath(name) if os.access(name, os.X_OK) else None  # noqa: PTH100 - links are kept
    endings = ("", *os.environ.get("PATHEXT", ".EXE;.BAT;.CMD").split(os.pathsep)) if os.name == "nt" else ("",)
    # Not shutil.which: on Windows it looks in the current directory first.
    places = (Path(folder) / f"{name}{ending}" for folder in _absolute_entries(path) for ending in endings)
    return next((str(place) for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def neutral_directory() -> Path:
    """Return an existing directory in which only the administrator can create files."""
    return Path(os.environ.get("SYSTEMROOT", "C:\\")) if sys.platform == "win32" else Path("/")
