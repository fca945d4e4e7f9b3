"""Which model classes llama.cpp's converter knows, as it says itself."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import msgspec

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.process import Command, capture
from imatrix_runner.remembered import recall, remember

_SECONDS = 120.0
_CLASS = re.compile(r"\s*- (\w{1,100})\s*", re.ASCII)


class SupportedModels(msgspec.Struct, frozen=True):
    """What a converter answered; ``key`` depends on the converter, its libraries and this Python."""

    key: str
    names: frozenset[str]


def supported_models(converter: Path, remembered: Path) -> frozenset[str]:
    """The names of the classes (``LlamaForCausalLM``) that a converter can convert; empty if it does not say. It takes seconds
    to start, so its answer is kept in the folder ``remembered``."""
    key = _key(converter)
    if (known := recall(remembered, key, SupportedModels)) is not None:
        return known.names
    names = _asked(converter)
    if names:
        remember(remembered, SupportedModels(key, names))
    return names


def _key(converter: Path) -> str:
    """A digest of everything that the answer depends on: the converter with the modules next to it, and where they run."""
    modules = [converter, *sorted(converter.parent.glob("conversion/*.py"))]
    parts = [sys.executable, *(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in modules)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _asked(converter: Path) -> frozenset[str]:
    argv = (sys.executable, str(converter), "--print-supported-models")
    env = {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    try:
        said = capture(Command(argv, env=env, needs=ChildNeeds.COMPUTE), seconds=_SECONDS)
    except (OSError, TimeoutError):
        return frozenset()
    lines = (*said.stdout.splitlines(), *said.stderr.splitlines())
    return frozenset(match[1] for line in lines if (match := _CLASS.fullmatch(line)))
