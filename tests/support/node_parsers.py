"""The hub's own parsers of GGUF names and headers, from npm, asked through node."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock

from imatrix_runner.toolchain.store import cache_dir

_FILES = ("package.json", "package-lock.json", "ask.mjs")


def ask_hub_parsers(names: Sequence[str], files: Sequence[Path] = ()) -> dict[str, Any]:
    """What ``support/node/ask.mjs`` answers."""
    asked = json.dumps({"names": list(names), "files": [str(path) for path in files]})
    command = [_program("node"), str(_installed() / "ask.mjs")]
    answer: dict[str, Any] = json.loads(subprocess.run(command, input=asked, capture_output=True, check=True, text=True).stdout)
    return answer


def _installed() -> Path:
    """A folder with the packages of the lock file; cached by its content."""
    source = Path(__file__).with_name("node")
    digest = hashlib.sha256(b"".join((source / name).read_bytes() for name in _FILES)).hexdigest()
    folder = cache_dir() / "tests" / f"node-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for name in _FILES:
                shutil.copy(source / name, part)
            command = [_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
            subprocess.run(command, cwd=part, check=True, timeout=300)
            part.rename(folder)
    return folder


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, (
        f"{name} is missing: install Node.js 20 or newer, or leave these tests out: scripts/test --no-node"
    )
    return found
