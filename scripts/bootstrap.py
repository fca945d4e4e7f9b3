"""Set-up shared by demo, test, lint, bench and pin: a ``.venv`` of the checkout's own, and one native build of llama.cpp.

Standard library only. Every step is skipped when its result is there; what cannot be made here is named. What is installed is
pinned by ``constraints.txt`` (refreshed by ``scripts/pin``), so that a clone made next year installs what was tested.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
_BIN, _EXECUTABLE = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
VENV = ROOT / ".venv"
PYTHON = VENV / _BIN / _EXECUTABLE
NEWEST_VENV = ROOT / ".venv-newest"
NEWEST_PYTHON = NEWEST_VENV / _BIN / _EXECUTABLE

# The bindings without a native build of their own: the embedded engine has them load the libraries of the toolchain that is
# built below from the same version, so that the minutes of compiling are spent once.
_BINDINGS = "llama-cpp-python"
_NO_NATIVE_BUILD = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
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


def pinned() -> dict[str, list[str]]:
    """Every pinned package with its versions; one may have several, for different Pythons. Empty without the file."""
    versions: dict[str, list[str]] = {}
    if CONSTRAINTS.exists():
        for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
                versions.setdefault(match[1].lower(), []).append(match[2])
    return versions


def ensure_venv(*extras: str, newest: bool = False) -> Path:
    """An environment of the checkout's own with the package (editable) and these extras; the path of its Python.

    ``newest``: a second environment (``.venv-newest``) with the newest version of everything that pyproject.toml allows, looked
    for at every call, instead of the pinned ones.
    """
    check_python()
    folder, python = (NEWEST_VENV, NEWEST_PYTHON) if newest else (VENV, PYTHON)
    if not python.exists():
        say(f"creating {folder}")
        try:
            venv.create(folder, with_pip=True, clear=folder.exists())
        except (subprocess.CalledProcessError, ImportError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            hint = "On Debian or Ubuntu: apt-get install python3-venv"
            raise SystemExit(f"Python's venv module does not work ({error}). {hint}") from error
    decisive = (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes() + ",".join(sorted(extras)).encode()
    wanted = hashlib.sha256(decisive).hexdigest()
    stamp = folder / "installed"
    if not newest and stamp.exists() and wanted in stamp.read_text().split():
        return python
    say(f"installing imatrix-runner[{','.join(extras)}] into {folder}")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins: dict[str, str] = {}
    if newest:
        install += ["--upgrade", "--upgrade-strategy", "eager"]
    else:
        # By the environment rather than -c: pip hands it on to the environments that packages are built in (newer ones by the
        # second name). Relative, for pip splits it at spaces; run() works in ROOT.
        relative = CONSTRAINTS.relative_to(ROOT).as_posix()
        pins = {"PIP_CONSTRAINT": relative, "PIP_BUILD_CONSTRAINT": relative}
    if "convert" in extras:
        run(*install, "torch", **pins)
    # Not from, and not into, pip's cache of built wheels: one without libraries must not reach other projects.
    run(*install, "--no-cache-dir", "--no-binary", _BINDINGS, _BINDINGS, **_NO_NATIVE_BUILD, **pins)
    run(*install, "--editable", f".[{','.join(extras)}]" if extras else ".", **pins)
    if not newest:
        with stamp.open("a") as handle:
            handle.write(wanted + "\n")
    return python


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


def ensure_node() -> None:
    """Node.js and npm, with which tests ask the hub's own parsers of names and headers."""
    if not (shutil.which("node") and shutil.which("npm")):
        raise SystemExit(
            "Node.js 20 or newer and npm are needed for the tests of published names (https://nodejs.org). "
            "Or leave these tests out: scripts/test --no-node"
        )


def ensure_tools(python: Path = PYTHON, **env: str) -> None:
    """llama.cpp's programs and libraries where every command finds them; a build takes about 4 minutes, once."""
    locate = [python, "-m", "imatrix_runner", "tools", "locate"]
    located = subprocess.run(locate, cwd=ROOT, env={**os.environ, **env}, capture_output=True, check=False)
    if located.returncode:
        say("building llama.cpp (once, about 4 minutes on two cores)")
        run(python, "-m", "imatrix_runner", "tools", "build", **env)


def installed(python: Path) -> dict[str, str]:
    """What an environment holds: name (as :func:`pinned` spells it) -> version."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True)
    return {re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"] for each in json.loads(listed.stdout)}
