"""The ``tokenizer_config.json`` next to a model: read with bounds, and its special tokens as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.untrusted import UnreadableError, from_json

_MAX_CONFIG = 16 << 20


def read_config(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file of a model's directory, of at most 16 MiB; empty if there is no such file."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _MAX_CONFIG:
            raise unusable_tokenizer(path, f"it is larger than {_MAX_CONFIG >> 20} MiB")
        return from_json(path.read_bytes(), dict[str, Any])
    except OSError as error:
        raise from_os_error(error, "reading the tokenizer's configuration", path) from error
    except UnreadableError as error:
        raise unusable_tokenizer(path, str(error)) from error


def special_text(config: Mapping[str, Any], name: str) -> str:
    """The text of a special token such as ``bos_token``: a string, or the ``content`` of an object; empty if missing."""
    value = config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def unusable_tokenizer(path: Path, why: str) -> InvalidDataError:
    """The error for a tokenizer's file that cannot be used."""
    return InvalidDataError(
        f"{path} cannot be used as a tokenizer",
        why,
        "Give the model's GGUF with --model, or a directory with tokenizer.json and tokenizer_config.json.",
    )
