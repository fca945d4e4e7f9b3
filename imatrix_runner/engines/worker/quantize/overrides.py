"""Parses llama-quantize's textual options into the values that it passes to llama.cpp. Pure; no native code.

Accepted values and error messages are those of llama.cpp's ``tools/quantize/quantize.cpp`` and ``common/common.cpp``: the
parent explains both engines' messages with one table (``engines/llama_cpp/messages.py``).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.files.imatrix_weights import MAX_TEXT, ImatrixValues
from imatrix_runner.engines.jobs import QuantizeOptions

_INTEGER = re.compile(rb"[ \t\n\v\f\r]*([+-]?\d+)")
_FLOAT = re.compile(
    rb"[ \t\n\v\f\r]*([+-]?(?:0x(?:[0-9a-f]+\.?[0-9a-f]*|\.[0-9a-f]+)(?:p[+-]?\d+)?|"
    rb"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf(?:inity)?|nan))",
    re.IGNORECASE,
)


class NotAccepted(Exception):
    """llama-quantize would reject an option; the argument is its message."""


@dataclass(frozen=True)
class KeyValue:
    """A metadata key to set. Key and text have at most :data:`MAX_TEXT` bytes; the value's type decides the stored type:
    int as u32, float as f32, bool, bytes as text."""

    key: bytes
    value: int | float | bool | bytes


def parse_override(text: str) -> KeyValue:
    """Parse ``--override-kv KEY=TYPE:VALUE``. As with C's ``atol`` and ``atof``, the longest numeric prefix counts, else 0."""
    given = os.fsencode(text)
    key, equals, typed = given.partition(b"=")
    # An empty key ends llama.cpp's list: later entries would be dropped silently.
    if not equals or not 0 < len(key) <= MAX_TEXT:
        raise NotAccepted(f"string_parse_kv_override: malformed KV override '{text}'")
    kind, colon, value = typed.partition(b":")
    if colon and kind == b"int":
        number = _INTEGER.match(value)
        return KeyValue(key, min(max(int(number[1][:40]), -(1 << 63)), (1 << 63) - 1) if number else 0)
    if colon and kind == b"float":
        return KeyValue(key, _c_float(value))
    if colon and kind == b"bool":
        if value not in (b"true", b"false"):
            raise NotAccepted(f"string_parse_kv_override: invalid boolean value for KV override '{text}'")
        return KeyValue(key, value == b"true")
    if colon and kind == b"str":
        if len(value) > MAX_TEXT:
            raise NotAccepted(f"string_parse_kv_override: malformed KV override '{text}', value cannot exceed {MAX_TEXT} chars")
        return KeyValue(key, value)
    raise NotAccepted(f"string_parse_kv_override: invalid type for KV override '{text}'")


def _c_float(text: bytes) -> float:
    found = _FLOAT.match(text)
    if not found:
        return 0.0
    number = found[1].decode("ascii")
    if "x" not in number.lower():
        return float(number)
    try:
        return float.fromhex(number)
    except OverflowError:
        return -math.inf if number.startswith("-") else math.inf


def imatrix_overrides(name: str, weights: ImatrixValues) -> list[KeyValue]:
    """Metadata about the imatrix, as llama-quantize writes it after the user's own overrides."""
    notes = [KeyValue(b"quantize.imatrix.file", os.fsencode(name)[:MAX_TEXT])]
    if weights.dataset is not None:
        notes.append(KeyValue(b"quantize.imatrix.dataset", weights.dataset))
    notes.append(KeyValue(b"quantize.imatrix.entries_count", len(weights.values)))
    if weights.chunks > 0:
        notes.append(KeyValue(b"quantize.imatrix.chunks_count", weights.chunks))
    return notes


def parse_type(text: str, types: Mapping[bytes, int]) -> int:
    """The number of a ggml type by its name in any case; ``types`` has lower-case names."""
    number = types.get(os.fsencode(text).lower())
    if number is None:
        raise NotAccepted(f"parse_ggml_type: invalid ggml_type '{text}'")
    return number


def parse_tensor_types(options: QuantizeOptions, types: Mapping[bytes, int]) -> list[tuple[bytes, int]]:
    """``(pattern, ggml type)`` in the order in which llama-quantize gets them: the first match wins."""
    return [_tensor_type(entry, types) for entry in _entries(options)]


def _entries(options: QuantizeOptions) -> Iterator[bytes]:
    yield from map(os.fsencode, options.tensor_types)
    if options.tensor_type_file is not None:
        yield from _words(options.tensor_type_file)
    yield from map(os.fsencode, options.pins)


def _words(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split()
    except OSError as error:
        raise NotAccepted(f"parse_tensor_type_file: failed to open file '{path}': {error.strerror}") from error


def _tensor_type(entry: bytes, types: Mapping[bytes, int]) -> tuple[bytes, int]:
    text = entry.decode("utf-8", "replace")
    pattern, equals, name = entry.partition(b"=")
    if not equals or b"\0" in entry:
        raise NotAccepted(f"parse_tensor_type: malformed tensor type '{text}'")
    if not pattern:
        raise NotAccepted("parse_tensor_type: missing tensor name")
    if not name:
        raise NotAccepted("parse_tensor_type: missing quantization type")
    number = types.get(name.lower())
    if number is None:
        shown = name.decode("utf-8", "replace")
        raise NotAccepted(f"parse_ggml_type: invalid ggml_type '{shown}'")
    return pattern.lower(), number


def parse_layers(text: str) -> list[int]:
    """The layers of ``--prune-layers``, sorted, without repeats."""
    layers = set()
    for part in text.split(","):
        number = _INTEGER.match(part.encode("utf-8", "replace"))
        layer = int(number[1]) if number else -1
        if not 0 <= layer < 1 << 31:
            raise NotAccepted(f"parse_layer_prune: invalid layer id '{part}'")
        layers.add(layer)
    return sorted(layers)
