"""Set-up shared by demo, test, lint and bench: a ``.venv`` of the checkout's own, and one native build of llama.cpp.

Standard library only. Every step is skipped when its result is there; what cannot be made here is named.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
_BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = _BIN / ("python.exe" if os.name == "nt" else "python")

# The bindings without a native build of their own: the embedded engine has them load the libraries of the toolchain that is
# built below from the same version, so that the minutes of compiling are spent once.
_BINDINGS = "llama-cpp-python==0.3.36"
_NO_NATIVE_BUILD = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
_TORCH = "torch==2.13.0"
_BROWSER_PACKAGES = ("chromium", "chromium-driver")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def run(*argv: str | Path, **env: str) -> None:
    """Run a command of the set-up; when it fails, so do we."""
    done = subprocess.run([str(part) for part in argv], cwd=ROOT, env={**os.environ, **env}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def check_python() -> None:
    if sys.version_info < (3, 10):
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}. Try: python3.12 {sys.argv[0]}")


def ensure_venv(*extras: str) -> None:
    """The checkout's own environment with the package (editable) and these extras."""
    check_python()
    if not PYTHON.exists():
        say(f"creating {VENV}")
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except (subprocess.CalledProcessError, ImportError) as error:
            shutil.rmtree(VENV, ignore_errors=True)
            hint = "On Debian or Ubuntu: apt-get install python3-venv"
            raise SystemExit(f"Python's venv module does not work ({error}). {hint}") from error
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + ",".join(sorted(extras)).encode()).hexdigest()
    stamp = VENV / "installed"
    if stamp.exists() and wanted in stamp.read_text().split():
        return
    say(f"installing imatrix-runner[{','.join(extras)}] into {VENV}")
    quiet = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if "convert" in extras:
        run(PYTHON, *quiet, _TORCH)
    # Not from, and not into, pip's cache of built wheels: one without libraries must not reach other projects.
    run(PYTHON, *quiet, "--no-cache-dir", "--no-binary", "llama-cpp-python", _BINDINGS, **_NO_NATIVE_BUILD)
    run(PYTHON, *quiet, "--editable", f".[{','.join(extras)}]" if extras else ".")
    with stamp.open("a") as handle:
        handle.write(wanted + "\n")


def ensure_browser() -> None:
    """Chromium and its driver, with which tests look at pages: Debian's packages, where we may install them."""
    if shutil.which("chromedriver") and any(map(shutil.which, _BROWSERS)):
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise SystemExit(
            "Chromium and chromedriver are needed for the tests of pages. On Debian or Ubuntu: "
            f"sudo apt-get install {' '.join(_BROWSER_PACKAGES)}. Or leave these tests out: scripts/test --no-browser"
        )
    say(f"installing {' and '.join(_BROWSER_PACKAGES)} (once)")
    run("apt-get", "-qq", "update")
    run("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *_BROWSER_PACKAGES, DEBIAN_FRONTEND="noninteractive")


def ensure_tools() -> None:
    """llama.cpp's programs and libraries where every command finds them; a build takes about 4 minutes, once."""
    located = subprocess.run([PYTHON, "-m", "imatrix_runner", "tools", "locate"], cwd=ROOT, capture_output=True, check=False)
    if located.returncode:
        say("building llama.cpp (once, about 4 minutes on two cores)")
        run(PYTHON, "-m", "imatrix_runner", "tools", "build")
