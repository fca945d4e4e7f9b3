"""The command line inside the test's own process: for what it says, where a process of its own would only cost time."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Ran

from imatrix_runner.cli.main import run_cli


class CommandLine:
    """``cli("run", model)`` is what ``imatrix-runner run MODEL`` says, and its exit code."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> Ran:
        self._capture.readouterr()
        code = run_cli([str(argument) for argument in arguments])
        said = self._capture.readouterr()
        return Ran(code, said.out, said.err)
