"""Which documents go into a calibration text: a seeded choice from streams of any length, by weight, up to a budget. Pure."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from imatrix_runner.calibration.documents import Conversation, Record


@dataclass(frozen=True)
class Candidate:
    """A document that may be chosen. ``digest`` stands for its content, ``key`` for its place in the order of its source."""

    record: Record
    digest: bytes
    key: int
    n_bytes: int


def content_bytes(content: str | Conversation) -> bytes:
    """What makes two documents the same: a text without the white space around it, or all of a conversation."""
    if isinstance(content, str):
        return content.strip().encode()
    return msgspec.json.encode((content.messages, content.tools), order="deterministic")


@dataclass
class Reservoir:
    """Of a stream of records the first ones in the order of ``seed`` (None: of the stream itself), about ``limit`` bytes of
    them (None: all).

    The order follows from each document's content, so a choice does not change when other documents come or go elsewhere, and
    equal documents meet however far apart they lie. ``limited``: something was left out for the limit.
    """

    seed: int | None
    limit: int | None
    seen: int = 0
    duplicates: int = 0
    limited: bool = False
    _held: dict[bytes, Candidate] = field(default_factory=dict)
    _heap: list[tuple[int, bytes]] = field(default_factory=list)
    _bytes: int = 0

    def add(self, record: Record) -> None:
        content = content_bytes(record.content)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        key = self.seen if self.seed is None else _seeded(self.seed, "choice", digest)
        self.seen += 1
        if digest in self._held:
            self.duplicates += 1
            return
        if self._full and key > -self._heap[0][0]:
            self.limited = True
            return
        self._held[digest] = Candidate(record, digest, key, len(content))
        heapq.heappush(self._heap, (-key, digest))
        self._bytes += len(content)
        while self.limit is not None and self._bytes - self._held[self._heap[0][1]].n_bytes >= self.limit:
            self.limited = True
            self._bytes -= self._held.pop(heapq.heappop(self._heap)[1]).n_bytes

    @property
    def _full(self) -> bool:
        return self.limit is not None and self._bytes >= self.limit

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is held."""
        return self._bytes

    def in_order(self) -> list[Candidate]:
        return sorted(self._held.values(), key=lambda candidate: (candidate.key, candidate.digest))


def lot(seed: int, digest: bytes) -> float:
    """A number from 0 to 1 that depends on the seed and a content: which documents are held out."""
    return float(_seeded(seed, "held out", digest) / (1 << 128))


def _seeded(seed: int, purpose: str, digest: bytes) -> int:
    """A number that depends on the seed and a content, and looks like chance."""
    made = hashlib.blake2b(digest, digest_size=16, key=hashlib.sha256(f"{purpose} {seed}".encode()).digest())
    return int.from_bytes(made.digest(), "big")


@dataclass(frozen=True)
class Document:
    """A candidate as it would stand in the text. ``size`` counts tokens (bytes where there is no tokenizer). ``marked``: what
    stands at its beginning parts it from the one before, a chat template's own marks or a control token."""

    source: int
    digest: bytes
    where: str
    text: str
    chat: bool
    marked: bool
    size: int


def shuffled(documents: Sequence[Document], seed: int | None) -> list[Document]:
    """All chosen documents in the order of the text: mixed by the seed, or as they are."""
    if seed is None:
        return list(documents)
    return sorted(documents, key=lambda document: (_seeded(seed, "order", document.digest), document.source))


def fair_shares(weights: Sequence[float], available: Sequence[int], budget: int) -> list[float]:
    """How much of ``budget`` each source gives: in proportion to the weights, but none more than it has; what one lacks the
    others make up for in proportion."""
    shares = [0.0] * len(weights)
    open_ = set(range(len(weights)))
    left = float(budget)
    while open_ and left > 0:
        total = sum(weights[i] for i in open_)
        short = {i for i in open_ if available[i] <= left * weights[i] / total}
        if not short:
            for i in open_:
                shares[i] = left * weights[i] / total
            break
        for i in short:
            shares[i] = float(available[i])
        left -= sum(shares[i] for i in short)
        open_ -= short
    return shares


def balanced_budget(weights: Sequence[float], available: Sequence[int]) -> int:
    """The largest budget that the weights allow exactly: the scarcest source is used up."""
    return int(min(have / weight for have, weight in zip(available, weights, strict=True)) * sum(weights))


@dataclass
class Choice:
    """Documents taken, and why others were not, each counted by source.

    ``is_near`` tells whether a document is nearly one that was taken; it is asked once for each document about to be taken.
    """

    n_sources: int
    is_near: Callable[[Document], bool]
    taken: list[Document] = field(default_factory=list)
    left: list[list[Document]] = field(default_factory=list)
    """Documents for which there was no room, in order, by source."""

    def __post_init__(self) -> None:
        self.sizes, self.duplicates, self.near_duplicates = ([0] * self.n_sources for _ in range(3))
        self._seen: set[bytes] = set()

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def take(self, document: Document) -> bool:
        """Take a document, unless it is there already or nearly so."""
        if document.digest in self._seen:
            self.duplicates[document.source] += 1
        elif self.is_near(document):
            self.near_duplicates[document.source] += 1
        else:
            self._seen.add(document.digest)
            self.taken.append(document)
            self.sizes[document.source] += document.size
            return True
        return False


def choose(
    sources: Sequence[Sequence[Document]],
    weights: Sequence[float],
    budget: int | None,
    is_near: Callable[[Document], bool],
) -> Choice:
    """Take whole documents, source by source in their own order, up to each source's fair share of ``budget`` (None: all).

    What the shares leave over, because documents are whole, goes to the sources that fell shortest.
    """
    choice = Choice(len(sources), is_near, left=[[] for _ in sources])
    shares = fair_shares(weights, [sum(each.size for each in source) for source in sources], budget) if budget else None
    for number, source in enumerate(sources):
        for document in source:
            if shares is not None and choice.sizes[number] + document.size > shares[number]:
                choice.left[number].append(document)
            else:
                choice.take(document)
    if budget is None or shares is None:
        return choice
    too_large: list[list[Document]] = [[] for _ in sources]
    for document in _by_need(choice.left, choice.sizes, shares):
        if choice.size + document.size > budget:
            too_large[document.source].append(document)
        else:
            choice.take(document)
    choice.left = too_large
    return choice


def _by_need(left: Sequence[Sequence[Document]], sizes: Sequence[int], shares: Sequence[float]) -> Iterator[Document]:
    """Documents that are over, those of the source that lacks most first; what each yields may change ``sizes``."""
    waiting = [list(reversed(documents)) for documents in left]
    while any(waiting):
        number = max((i for i in range(len(waiting)) if waiting[i]), key=lambda i: shares[i] - sizes[i])
        yield waiting[number].pop()
