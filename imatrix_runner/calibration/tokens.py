"""Tokens of texts, whoever's tokenizer counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer knows of itself. ``special``: ids of control tokens -> their text; ``bos`` and ``eos`` are ids, None
    where there is no such token; ``add_bos``: every chunk of a calibration begins with ``bos``."""

    n_tokens: int
    special: Mapping[int, str]
    bos: int | None
    eos: int | None
    add_bos: bool


@dataclass(frozen=True)
class TextTokens:
    """One text's tokens. ``ids`` int32 [n]; ``ends`` int64 [n]: the bytes of the UTF-8 text up to each token's end, or None
    where the tokens' pieces do not add up to the text (a tokenizer that normalises)."""

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.ids)


class Tokeniser(Protocol):
    """Counts as the model will see it. Raises errors of ours."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def tokenise(self, texts: Sequence[str], *, parse_special: bool) -> list[TextTokens]:
        """The tokens of each text alone, without any that a vocabulary adds at the ends. ``parse_special``: control tokens
        written out in a text (``<|im_start|>``) become those tokens."""
        ...
