"""Facts about a calibration text that need a tokenizer: tokens, chunks, share of the vocabulary used, control tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatrix_runner.calibration.tokenisers import TextTokens, Tokeniser, Vocabulary
from imatrix_runner.documents.blocks import parts, read_blocks
from imatrix_runner.safe_text import printable

_MOST_SPECIAL = 4096
_LONGEST_SPECIAL = 256


@dataclass(frozen=True)
class SpecialToken:
    """A control token of the vocabulary that is written out in the text: its id, its text and its number of occurrences."""

    id: int
    text: str
    count: int


@dataclass(frozen=True)
class TokenFacts:
    """The tokenised text, cut as llama-imatrix does: ``n_tokens``, in ``n_chunks`` whole chunks of ``n_ctx``.

    ``n_plain`` and ``n_parsed``: number of tokens if written-out control tokens are read as plain text, or parsed; ``n_tokens``
    is the one that applies. ``n_seen`` of ``n_vocabulary`` tokens occur (control tokens excluded). ``parse_special``: why
    control tokens are parsed (``--parse-special``, ``manifest``); empty if they are not. ``trained_context``: the model's
    training context in tokens, if its files state it.

    A text over 1 MiB (128 KiB with the tokenizers library) is counted in blocks of that size; each may change the count by a
    token.
    """

    model: str
    n_ctx: int
    n_tokens: int
    n_chunks: int
    n_plain: int
    n_parsed: int
    n_vocabulary: int
    n_seen: int
    bytes_per_token: float
    parse_special: str
    special: tuple[SpecialToken, ...]
    trained_context: int | None

    @property
    def share_seen(self) -> float:
        return self.n_seen / self.n_vocabulary if self.n_vocabulary else 0.0


def inspect_tokens(
    path: Path,
    tokeniser: Tokeniser,
    n_ctx: int,
    *,
    model: str,
    parse_special: str,
    trained_context: int | None,
    batch_bytes: int,
    on_bytes: Callable[[int], None] | None = None,
) -> TokenFacts:
    """Tokenise the text of ``path``, about ``batch_bytes`` at a time.

    ``on_bytes`` is called with the number of bytes done so far, and may raise to stop. Raises :class:`InvalidDataError` for a
    file that is not text, and what the tokenizer raises.
    """
    wanted = bool(parse_special)
    counter: _Counter | None = None
    asked = other = n_bytes = 0
    for batch in _batches(path, batch_bytes):
        found = tokeniser.tokenise(batch, parse_special=wanted)
        counter = counter or _Counter(tokeniser.vocabulary)  # known once the tokenizer has answered
        marked = []
        for text, tokens in zip(batch, found, strict=True):
            asked += len(tokens)
            n_bytes += len(text.encode())
            if counter.add(text, tokens):
                marked.append(text)
            else:  # without control tokens both ways give the same tokens
                other += len(tokens)
        if marked:
            other += sum(map(len, tokeniser.tokenise(marked, parse_special=not wanted)))
        if on_bytes is not None:
            on_bytes(n_bytes)
    assert counter is not None  # a text is not empty
    vocabulary = counter.vocabulary
    asked, other = asked + vocabulary.add_bos, other + vocabulary.add_bos
    plain, parsed = (other, asked) if wanted else (asked, other)
    return TokenFacts(
        model=model,
        n_ctx=n_ctx,
        n_tokens=asked,
        n_chunks=asked // n_ctx,
        n_plain=plain,
        n_parsed=parsed,
        n_vocabulary=vocabulary.n_tokens - len(vocabulary.special),
        n_seen=counter.n_seen(),
        bytes_per_token=n_bytes / asked if asked else 0.0,
        parse_special=parse_special,
        special=counter.special(),
        trained_context=trained_context,
    )


class _Counter:
    """Tracks which tokens of a vocabulary occur, and counts written-out control tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._ids = {text: token for token, text in vocabulary.special.items() if 0 < len(text) <= _LONGEST_SPECIAL}
        texts = sorted(self._ids, key=lambda text: (-len(text), text))[:_MOST_SPECIAL]
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._found: Counter[str] = Counter()
        self._seen = np.zeros(vocabulary.n_tokens, np.bool_)

    def add(self, text: str, tokens: TextTokens) -> bool:
        """Count a text; return whether it contains control tokens."""
        self._seen[tokens.ids[tokens.ids < len(self._seen)]] = True
        found = self._pattern.findall(text) if self._pattern else []
        self._found.update(found)
        return bool(found)

    def n_seen(self) -> int:
        """Number of distinct tokens that occur, without control tokens."""
        control = [token for token in self.vocabulary.special if 0 <= token < len(self._seen)]
        return int(np.count_nonzero(self._seen)) - int(np.count_nonzero(self._seen[control]))

    def special(self) -> tuple[SpecialToken, ...]:
        """The written-out control tokens, the most frequent first."""
        return tuple(SpecialToken(self._ids[text], printable(text), count) for text, count in self._found.most_common())


def _batches(path: Path, batch_bytes: int) -> Iterator[list[str]]:
    """The text in blocks, grouped into batches of about ``batch_bytes``, without its final newline, which llama-imatrix
    drops."""
    batch: list[str] = []
    size = 0
    for block in read_blocks(path):
        for text in parts(block.text, batch_bytes):
            if size >= batch_bytes:
                yield batch
                batch, size = [], 0
            batch.append(text)
            size += len(text)
    if batch:
        batch[-1] = batch[-1].removesuffix("\n")
        yield batch
