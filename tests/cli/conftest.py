"""Fixtures of the command line's tests; ``runner`` (a real process) comes from the conftest above."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import CommandLine


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process, in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys)
