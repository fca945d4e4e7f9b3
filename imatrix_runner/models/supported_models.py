"""Which model classes llama.cpp's converter knows, as it says itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.process import Command, capture

_SECONDS = 120.0
_CLASS = re.compile(r"\s*- (\w{1,100})\s*", re.ASCII)


def supported_models(converter: Path) -> frozenset[str]:
    """The names of the classes (``LlamaForCausalLM``) that a converter can convert; empty if it does not say."""
    argv = (sys.executable, str(converter), "--print-supported-models")
    env = {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    try:
        said = capture(Command(argv, env=env, needs=ChildNeeds.COMPUTE), seconds=_SECONDS)
    except (OSError, TimeoutError):
        return frozenset()
    lines = (*said.stdout.splitlines(), *said.stderr.splitlines())
    return frozenset(match[1] for line in lines if (match := _CLASS.fullmatch(line)))
