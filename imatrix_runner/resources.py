"""The shipped files: in ``_resources/`` of the package in a wheel, in ``resources/`` of a checkout."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.errors import InvalidDataError

CALIBRATION_TEXT = "imatrix_data.txt"
HELD_OUT_TEXT = "held_out.txt"
"""The held-out text: the same kinds of text as the calibration text, with nothing in common."""
DEMO_MODEL = "demo-model.gguf"

SELF_PROMPTS = "self_prompts.jsonl"
"""Prompts for a model to answer, for a calibration text of its own: chat, tools, code, reasoning, many languages."""

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a shipped file. Raises :class:`InvalidDataError` when the installation lacks it."""
    for directory in (_PACKAGE / "_resources", _PACKAGE.parent / "resources"):
        if (directory / name).is_file():
            return directory / name
    raise InvalidDataError(
        f"The shipped file {name} is missing",
        f"neither {_PACKAGE / '_resources'} nor {_PACKAGE.parent / 'resources'} holds it",
        "Install the package again: pip install --force-reinstall imatrix-runner",
    )
