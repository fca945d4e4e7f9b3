"""A type of level that llama.cpp offers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantType:
    """A quantisation type as ``llama-quantize`` offers it: ``Q4_K_M``, ftype 15, one line of help.

    ``number`` is None where the help gives none (``COPY``); ``alias_of`` names the type a short name stands for.
    """

    name: str
    number: int | None
    help: str
    alias_of: str = ""
