"""What a calibration text is to one tokenizer: tokens, chunks, the share of the vocabulary it uses, control tokens in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatrix_runner.calibration.pieces import parts, read_pieces
from imatrix_runner.calibration.tokens import TextTokens, Tokeniser, Vocabulary
from imatrix_runner.models.bounded import printable

_MOST_SPECIAL = 4096
_LONGEST_SPECIAL = 256


@dataclass(frozen=True)
class SpecialToken:
    """A control token of the vocabulary that stands in the text as plain letters: its id, text, and how often."""

    id: int
    text: str
    count: int


@dataclass(frozen=True)
class TokenFacts:
    """The text through a tokenizer, as llama-imatrix cuts it: ``n_tokens`` in ``n_chunks`` whole chunks of ``n_ctx``.

    ``n_plain`` and ``n_parsed``: tokens when control tokens that are written out are read as letters, and as what they are;
    ``n_tokens`` is that of the two which will happen. ``n_seen`` of ``n_vocabulary`` tokens (without control tokens) occur.
    ``parse_special``: why control tokens are parsed (``--parse-special``, ``manifest``), empty if they are not.
    ``trained_context``: the tokens the model is used with at most, if its files say so.

    A text over 1 MiB (with the tokenizers library 128 KiB) is counted in pieces of that size, each of which may make a token of
    difference to the count of the whole.
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
    """Tokenise the text of ``path``; ``on_bytes`` hears how far it is (and may raise to stop). About ``batch_bytes`` are given
    to the tokenizer at a time.

    Raises :class:`InvalidDataError` for what is no text, and what the tokenizer raises.
    """
    wanted = bool(parse_special)
    counter: _Counter | None = None
    asked = other = n_bytes = 0
    for batch in _batches(path, batch_bytes):
        found = tokeniser.tokenise(batch, parse_special=wanted)
        counter = counter or _Counter(tokeniser.vocabulary)  # known from now on without asking again
        marked = []
        for text, tokens in zip(batch, found, strict=True):
            asked += len(tokens)
            n_bytes += len(text.encode())
            if counter.add(text, tokens):
                marked.append(text)
            else:  # only a text with control tokens in it reads differently the other way
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
    """Which tokens of a vocabulary occur, and its control tokens that are written out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._ids = {text: token for token, text in vocabulary.special.items() if 0 < len(text) <= _LONGEST_SPECIAL}
        texts = sorted(self._ids, key=lambda text: (-len(text), text))[:_MOST_SPECIAL]
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._found: Counter[str] = Counter()
        self._seen = np.zeros(vocabulary.n_tokens, np.bool_)

    def add(self, text: str, tokens: TextTokens) -> bool:
        """Whether there are control tokens in the text."""
        self._seen[tokens.ids[tokens.ids < len(self._seen)]] = True
        found = self._pattern.findall(text) if self._pattern else []
        self._found.update(found)
        return bool(found)

    def n_seen(self) -> int:
        """Tokens that occur, control tokens aside."""
        control = [token for token in self.vocabulary.special if 0 <= token < len(self._seen)]
        return int(np.count_nonzero(self._seen)) - int(np.count_nonzero(self._seen[control]))

    def special(self) -> tuple[SpecialToken, ...]:
        """The most frequent first."""
        return tuple(SpecialToken(self._ids[text], printable(text), count) for text, count in self._found.most_common())


def _batches(path: Path, batch_bytes: int) -> Iterator[list[str]]:
    """The text in pieces, as many at a time as hold ``batch_bytes``; without the newline at its very end, as llama-imatrix
    reads it."""
    batch: list[str] = []
    size = 0
    for piece in read_pieces(path):
        for text in parts(piece.text, batch_bytes):
            if size >= batch_bytes:
                yield batch
                batch, size = [], 0
            batch.append(text)
            size += len(text)
    if batch:
        batch[-1] = batch[-1].removesuffix("\n")
        yield batch
