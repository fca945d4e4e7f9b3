"""Checks of llama-quantize's options that have a syntax, before a model is fetched or opened.

llama.cpp parses numbers like C's ``atol`` and ``atof`` and reads anything else as 0; here that is an error.
"""

from __future__ import annotations

import os
import re

from imatrix_runner.errors import UsageError
from imatrix_runner.safe_text import printable

MAX_TEXT = 127
"""Bytes of a key or a text in llama.cpp's ``llama_model_kv_override``."""

_SHOWN = 60
_MOST_MEGABYTES = 1 << 31  # llama-gguf-split reads a C int
_NUMBERS = {
    "int": (re.compile(r"[+-]?\d+"), "a whole number", "2048"),
    "float": (re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE), "a number", "0.5"),
}
_AT_MOST = f"llama.cpp takes at most {MAX_TEXT}"


def check_override(text: str) -> None:
    """Raise :class:`UsageError` unless ``text`` is the KEY=TYPE:VALUE that ``--override-kv`` takes."""
    shown = f"--override-kv {_short(text)}"
    key, equals, typed = text.partition("=")
    kind, colon, value = typed.partition(":")
    if not equals or not key:
        raise UsageError(f"{shown} has no key and value", "the form is KEY=TYPE:VALUE", _example("general.name", "str", "Mine"))
    if (length := len(os.fsencode(key))) > MAX_TEXT:
        raise UsageError(
            f"{shown} has a key that is too long", f"{length} bytes; llama.cpp takes at most {MAX_TEXT}", "Shorten it."
        )
    if not colon or kind not in ("int", "float", "bool", "str"):
        why = "TYPE is int, float, bool or str, and the value follows a colon"
        raise UsageError(f"{shown} has no type", why, _example(key, "str", typed or "Mine"))
    if kind == "bool" and value not in ("true", "false"):
        raise UsageError(f"{shown} is neither true nor false", "a bool must be one of the two", _example(key, "bool", "true"))
    if kind == "str" and (length := len(os.fsencode(value))) > MAX_TEXT:
        raise UsageError(
            f"{shown} has a text that is too long",
            f"{length} bytes; {_AT_MOST}",
            "Shorten it, or set it in the source before (the gguf package's gguf-new-metadata writes texts of any length).",
        )
    if kind in _NUMBERS:
        form, what, example = _NUMBERS[kind]
        if not form.fullmatch(value):
            why = f"{kind} takes {what}, and llama.cpp would read 0"
            raise UsageError(f"{shown} is not {what}", why, _example(key, kind, example))


def check_tensor_type(text: str) -> None:
    """Raise :class:`UsageError` unless ``text`` has the form REGEX=TYPE. llama.cpp checks types and patterns."""
    pattern, equals, kind = text.partition("=")
    if not (pattern and equals and kind):
        missing = "pattern" if equals and not pattern else "type"
        example = "For example: --tensor-type ffn_down=q6_k"
        raise UsageError(f"--tensor-type {_short(text)} has no {missing}", "the form is REGEX=TYPE", example)


def parse_split_size(text: str) -> int:
    """Return the megabytes (10^6 bytes) of the N(M|G) that ``--split-max-size`` takes. Raises :class:`UsageError`."""
    match = re.fullmatch(r"([0-9]{1,9})([MG])", text)
    megabytes = int(match[1]) * (1000 if match[2] == "G" else 1) if match is not None else 0
    if not 0 < megabytes < _MOST_MEGABYTES:
        raise UsageError(
            f"Invalid --split-max-size {_short(text)!r}",
            "it takes a whole number from 1 with M (10^6 bytes) or G (10^9 bytes), as llama-gguf-split does",
            "For example: --split-max-size 48G",
        )
    return megabytes


def _example(key: str, kind: str, value: str) -> str:
    return f"For example: --override-kv {_short(key)}={kind}:{_short(value)}"


def _short(text: str) -> str:
    return printable(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
