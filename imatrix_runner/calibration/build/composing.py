"""Joins chosen documents into one text of the requested size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from imatrix_runner.calibration.build.mixing import ChosenDocuments, Document, shuffled
from imatrix_runner.calibration.tokenisers import TextTokens, Tokeniser, Vocabulary
from imatrix_runner.documents.manifest import DocumentPlace
from imatrix_runner.errors import InvalidDataError

PARTING = "\n\n"
"""Between two plain documents."""

_BATCH_BYTES = 4 << 20

_TRIES = 8

_ROUNDS = 12


@dataclass(frozen=True)
class Composed:
    """``text`` as it is written to the file, the place of each document, and the number of tokens that llama-imatrix sees (None
    without a tokenizer). ``at_start``: number of whole chunks that begin with a document, if aligned; ``cut``: sources of the
    documents whose end was left out."""

    text: str
    documents: tuple[Document, ...]
    places: tuple[DocumentPlace, ...]
    tokens: int | None
    at_start: int | None
    cut: tuple[int, ...]


@dataclass
class Composer:
    """``seed`` None keeps the order. ``parse_special``: control tokens written out in the text are parsed as such."""

    tokeniser: Tokeniser | None
    seed: int | None
    n_ctx: int
    parse_special: bool
    _cut: list[int] = field(default_factory=list)

    def compose(self, choice: ChosenDocuments, budget: int | None, *, whole_chunks: bool) -> Composed:
        """Compose all chosen documents. With a budget the remaining room is filled, if necessary with the beginning of a plain
        document; with ``whole_chunks`` documents are added or dropped until the text has exactly ``budget // n_ctx`` chunks."""
        if budget is None or self.tokeniser is None:
            return self._composed(shuffled(choice.taken, self.seed))
        spare = [document for documents in choice.left for document in documents]
        documents = list(choice.taken)
        composed = self._composed(shuffled(documents, self.seed))
        # Documents tokenised separately do not add up exactly to the tokens of the joined text.
        for _ in range(_TRIES):
            assert composed.tokens is not None
            if composed.tokens < budget:
                more = self._fillings(budget - composed.tokens, spare, choice)
                if not more:
                    break
                documents += more
            elif whole_chunks and composed.tokens >= budget + self.n_ctx:
                documents.pop()
            else:
                break
            composed = self._composed(shuffled(documents, self.seed))
        return composed

    def joined(self, documents: Sequence[Document]) -> str:
        """The text of these documents, mixed by the seed."""
        return self._composed(shuffled(documents, self.seed)).text

    def align(self, choice: ChosenDocuments, budget: int | None) -> Composed:
        """Compose the chosen documents so that chunks begin where a document begins. Each document begins with a control
        token."""
        order = shuffled(choice.taken, self.seed)
        if budget is not None:
            order += self._reserve(choice, budget)
        tokens = dict(zip((each.digest for each in order), self._tokenised([each.text for each in order]), strict=True))
        refused: set[tuple[bytes, int]] = set()
        rounds = 0

        def cut_quality(document: Document, keep: int) -> int:
            quality = _cut_quality(document, tokens[document.digest], keep)
            # Cuts within words often fail. After _ROUNDS rounds words stay whole, and some chunks begin within a document.
            hopeless = (document.digest, keep) in refused or (quality == 1 and rounds >= _ROUNDS)
            return 0 if hopeless else quality

        while True:
            rounds += 1
            layout = lay_out(order, self.n_ctx, budget, cut_quality)
            cuts = [(layout.documents[number], keep) for number, keep in layout.cuts.items()]
            texts = [_beginning(document, tokens[document.digest], keep) for document, keep in cuts]
            wrong = {
                (document.digest, keep)
                for (document, keep), found in zip(cuts, self._tokenised(texts), strict=True)
                if len(found) != keep
            }
            if not wrong:
                break
            refused |= wrong  # the shortened text tokenises differently: try another cut
        shortened = dict(zip(layout.cuts, texts, strict=True))
        self._cut = [layout.documents[number].source for number in layout.cuts]
        documents = [
            replace(each, text=shortened.get(number, each.text), size=layout.cuts.get(number, each.size))
            for number, each in enumerate(layout.documents)
        ]
        composed = self._composed(documents)
        return replace(composed, at_start=_at_start(documents, self.n_ctx, composed.tokens))

    def _reserve(self, choice: ChosenDocuments, budget: int) -> list[Document]:
        """More documents, up to another ``budget`` of tokens: filling chunks cuts off the ends of some."""
        reserve: list[Document] = []
        for document in shuffled([each for documents in choice.left for each in documents], self.seed):
            if sum(each.size for each in reserve) >= budget:
                break
            if choice.take(document):
                reserve.append(document)
        return reserve

    def _fillings(self, room: int, spare: list[Document], choice: ChosenDocuments) -> list[Document]:
        """Documents that fill ``room`` tokens; short ones may be many."""
        more: list[Document] = []
        while room > 0 and (document := self._filling(room, spare, choice)) is not None:
            more.append(document)
            room -= document.size
        return more

    def _filling(self, room: int, spare: list[Document], choice: ChosenDocuments) -> Document | None:
        """From ``spare``: the whole document that fits best, else the beginning of a longer plain one, else a shorter one."""
        whole = [each for each in spare if room <= each.size < room + self.n_ctx // 2]
        plain = [each for each in spare if each.size > room and not each.chat]
        for document in (*sorted(whole, key=_size), *sorted(plain, key=_size), *(each for each in spare if each.size < room)):
            spare.remove(document)
            if not choice.take(document):
                continue
            if document in whole or document.size < room:
                return document
            if text := self._shortened(document.text, room):
                self._cut.append(document.source)
                return replace(document, text=text, size=room)
        return None

    def _shortened(self, text: str, keep: int) -> str:
        """The beginning of a text with at least ``keep`` tokens, up to the end of a line or a word."""
        (tokens,) = self._tokenised([text])
        if tokens.ends is None or len(tokens) <= keep:
            return ""
        data = text.encode()
        end = int(tokens.ends[keep - 1])
        spaces = [place for place in (data.find(b"\n", end, end + 400), data.find(b" ", end, end + 100)) if place >= 0]
        return data[: spaces[0] if spaces else end].decode("utf-8", "ignore")

    def _composed(self, documents: Sequence[Document]) -> Composed:
        blocks: list[str] = []
        places: list[DocumentPlace] = []
        offset = 0
        for number, document in enumerate(documents):
            text = self._without_bos(document.text) if number == 0 else document.text
            size = len(text.encode())
            places.append(DocumentPlace(offset, size, document.source))
            last = number == len(documents) - 1
            # llama-imatrix drops one line break at the end of its file; this one is added so that no document loses its own.
            parting = "\n" if last else "" if document.marked else PARTING
            blocks += [text, parting]
            offset += size + len(parting)
        whole = "".join(blocks)
        return Composed(whole, tuple(documents), tuple(places), self._measured(whole), None, tuple(self._cut))

    def _without_bos(self, text: str) -> str:
        """``text`` without its own BOS: llama-imatrix adds one before the text, so the first document's would be a second."""
        vocabulary = self._vocabulary
        if vocabulary is None or not vocabulary.add_bos or vocabulary.bos is None or not self.parse_special:
            return text
        return text.removeprefix(vocabulary.special.get(vocabulary.bos, "")) or text

    @property
    def _vocabulary(self) -> Vocabulary | None:
        return self.tokeniser.vocabulary if self.tokeniser is not None else None

    def _measured(self, text: str) -> int | None:
        """Number of tokens of the whole text as llama-imatrix sees it; None without a tokenizer."""
        if self.tokeniser is None:
            return None
        (found,) = self._tokenised([text.removesuffix("\n")])
        return len(found) + int(self.tokeniser.vocabulary.add_bos)

    def _tokenised(self, texts: Sequence[str]) -> list[TextTokens]:
        assert self.tokeniser is not None
        found: list[TextTokens] = []
        for batch in batches(texts):
            found += self.tokeniser.tokenise(batch, parse_special=self.parse_special)
        return found


def _size(document: Document) -> int:
    return document.size


def starting(text: str, tokens: TextTokens, vocabulary: Vocabulary) -> str:
    """The document with a control token at its beginning: its own, or the vocabulary's separator (BOS or EOS). The tokenizer
    splits the text at control tokens, so the tokens of separate documents add up to those of the joined text."""
    if len(tokens) and int(tokens.ids[0]) in vocabulary.special:
        return text
    token = vocabulary.bos if vocabulary.add_bos else vocabulary.eos
    token = token if token is not None else vocabulary.bos
    if token is None or token not in vocabulary.special:
        raise InvalidDataError(
            "Documents cannot be aligned to chunks",
            "this vocabulary has no token that separates documents (neither BOS nor EOS)",
            "Omit --align.",
        )
    return vocabulary.special[token] + text


def _at_start(documents: Sequence[Document], n_ctx: int, n_tokens: int | None) -> int | None:
    """Number of whole chunks that begin with a document; None if the documents' tokens do not add up to ``n_tokens``."""
    starts = np.cumsum([0, *(document.size for document in documents)])
    if n_tokens != int(starts[-1]):
        return None
    return int(np.isin(np.arange(0, n_tokens - n_ctx + 1, n_ctx), starts[:-1]).sum())


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in batches of a few megabytes."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut_quality(document: Document, tokens: TextTokens, keep: int) -> int:
    """How good a cut after ``keep`` tokens is: 2 after a word, 1 elsewhere, 0 within a character or if it cannot be made."""
    if tokens.ends is None or not 0 < keep < len(tokens):
        return 0
    data = document.text.encode()
    end = int(tokens.ends[keep - 1])
    if data[end] & 0xC0 == 0x80:
        return 0
    return 2 if data[end : end + 1].isspace() and not data[end - 1 : end].isspace() else 1


def _beginning(document: Document, tokens: TextTokens, keep: int) -> str:
    """The first ``keep`` tokens of a document."""
    assert tokens.ends is not None
    return document.text.encode()[: int(tokens.ends[keep - 1])].decode("utf-8")


_AHEAD = 64
"""Number of next documents among which one is sought that fills the room left in a chunk."""


@dataclass
class ChunkLayout:
    """Documents in order. ``cuts``: index in ``documents`` -> tokens kept of that document, so that it ends with its chunk.
    ``loose``: number of chunks that begin within a document because no document could be cut to fit."""

    documents: list[Document] = field(default_factory=list)
    cuts: dict[int, int] = field(default_factory=dict)
    loose: int = 0


def lay_out(
    documents: Sequence[Document], n_ctx: int, budget: int | None, cut_quality: Callable[[Document, int], int]
) -> ChunkLayout:
    """Fill chunks of ``n_ctx`` tokens, each from the beginning of a document, up to ``budget`` tokens (None: all documents).

    A document longer than a chunk continues in the next. The room after it is filled with the largest of the next documents
    that fits whole. If none fits, it is filled with the beginning of a longer one: the one with the highest ``cut_quality`` at
    that length (0: it cannot be cut there), and of those the shortest.
    """
    layout = ChunkLayout()
    waiting = deque(documents)
    position = 0

    def place(document: Document, keep: int | None = None) -> None:
        nonlocal position
        if keep is not None and keep < document.size:
            layout.cuts[len(layout.documents)] = keep
        layout.documents.append(document)
        position += min(document.size, keep if keep is not None else document.size)

    while waiting and (budget is None or position < budget):
        used = position % n_ctx
        room = n_ctx - used if used else n_ctx
        left = budget - position if budget is not None else None
        if used == 0 and (left is None or waiting[0].size <= left):
            place(waiting.popleft())
            continue
        ahead = list(waiting)[:_AHEAD]
        whole = [document for document in ahead if document.size <= room]
        if whole:
            best = max(whole, key=lambda document: document.size)
            waiting.remove(best)
            place(best)
            continue
        length = room if used or left is None else left  # the last document of a budget may fill several chunks
        rated = [(cut_quality(document, length), -document.size) for document in ahead]
        fitting = [number for number, document in enumerate(ahead) if document.size > length and rated[number][0]]
        if fitting:
            best = ahead[max(fitting, key=lambda number: rated[number])]
            waiting.remove(best)
            place(best, length)
            continue
        layout.loose += 1
        place(waiting.popleft())
    return layout
