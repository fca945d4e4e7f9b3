"""Fixtures every room shares: the real toolchain, the demo model, a command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.resources import DEMO_MODEL, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """Real llama.cpp programs: built by ``scripts/test`` into the managed cache (or named by IMATRIX_RUNNER_LLAMA_CPP)."""
    return require(locate(None, env=os.environ, cache=cache_dir()))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return resource(DEMO_MODEL)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting, token or hub of the developer's reaches a test."""
    for name in list(os.environ):
        keep = name in ("IMATRIX_RUNNER_CACHE", "IMATRIX_RUNNER_LLAMA_CPP")
        if name.startswith(("IMATRIX_RUNNER_", "LLAMA_", "HF_", "HUGGING")) and not keep:
            monkeypatch.delenv(name)


@dataclass(frozen=True)
class Ran:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


RunCommand = Callable[..., Ran]


@pytest.fixture
def runner(tmp_path: Path) -> RunCommand:
    """Run ``imatrix-runner ARGUMENTS`` in a process of its own, in ``tmp_path``."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None, seconds: float = 300) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "imatrix_runner", *map(str, arguments)],
            cwd=cwd or tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
