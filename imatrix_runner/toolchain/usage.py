"""How a program takes its options, from its help: flags or values, and its defaults.

llama.cpp's options keep their names over the years but change their form: ``-fa`` was a flag in 2024 and takes a value now.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MAX_TEXT = 1 << 20
# "-fa,   --flash-attn             enable Flash Attention": two blanks end the spellings of a flag; a value follows after one.
_FLAG_LINE = re.compile(r"^\s{0,12}((?:--?[A-Za-z][\w-]*(?:,\s*)?)+)(?:[ \t]{2,}(?=[^\s-])|[ \t]*$)", re.MULTILINE)
_SPELLING = re.compile(r"--?[A-Za-z][\w-]*")
_ESCAPE = re.compile(r"^\s{0,12}-e,\s+--escape\b(.*(?:\n(?!\s{0,12}-).*)?)", re.MULTILINE)
_LAYERS = re.compile(r"--n-gpu-layers\b(.*(?:\n(?!\s{0,12}-).*)?)")


@dataclass(frozen=True)
class Usage:
    """How one program takes its options; the defaults are those of llama.cpp's current programs.

    ``flags``: spellings that take no value. ``escapes``: a written ``\\n`` in a text becomes a line break unless
    ``--no-escape`` is given. ``named_layers``: ``-ngl`` takes ``auto`` and ``all``, not only numbers. ``legacy_matrix``:
    llama-imatrix writes the legacy ``.dat``, because its help names no other format. ``leaves_log``: it writes a ``llama.log``
    into the directory where it is started.
    """

    flags: frozenset[str] = frozenset()
    escapes: bool = False
    named_layers: bool = True
    legacy_matrix: bool = False
    leaves_log: bool = False


def read_usage(text: str) -> Usage:
    """The :class:`Usage` that a help text describes."""
    text = text[:_MAX_TEXT]
    flags = {name for line in _FLAG_LINE.findall(text) for name in _SPELLING.findall(line)}
    escape, layers = _ESCAPE.search(text), _LAYERS.search(text)
    return Usage(
        frozenset(flags),
        escapes=escape is not None and "default: true" in escape[1],
        named_layers=layers is not None and "'all'" in layers[1],
        legacy_matrix="imatrix.gguf" not in text,
        leaves_log="--log-new" in text,
    )
