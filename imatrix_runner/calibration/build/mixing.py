"""Chooses the documents of a calibration text: seeded, from streams of any length, by weight, up to a budget. Pure."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from imatrix_runner.documents.documents import Conversation, DocumentRecord


@dataclass(frozen=True)
class DocumentCandidate:
    """A document that may be chosen. ``digest`` identifies its content; ``key`` orders it within its source."""

    record: DocumentRecord
    digest: bytes
    key: int
    n_bytes: int


def content_bytes(content: str | Conversation) -> bytes:
    """The bytes by which documents are compared: a text without surrounding white space, or a whole conversation."""
    if isinstance(content, str):
        return content.strip().encode()
    return msgspec.json.encode((content.messages, content.tools), order="deterministic")


@dataclass
class Reservoir:
    """Keeps about ``limit`` bytes (None: all) of a stream of records: the first in the order given by ``seed`` (None: the order
    of the stream).

    The seeded order depends on each document's content alone. So adding or removing other documents does not reorder the rest,
    and equal documents are found however far apart they are. ``limited``: documents were dropped because of the limit.
    """

    seed: int | None
    limit: int | None
    seen: int = 0
    duplicates: int = 0
    limited: bool = False
    _held: dict[bytes, DocumentCandidate] = field(default_factory=dict)
    _heap: list[tuple[int, bytes]] = field(default_factory=list)
    _bytes: int = 0

    def add(self, record: DocumentRecord) -> None:
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
        self._held[digest] = DocumentCandidate(record, digest, key, len(content))
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
        """Total size of the held documents."""
        return self._bytes

    def in_order(self) -> list[DocumentCandidate]:
        return sorted(self._held.values(), key=lambda candidate: (candidate.key, candidate.digest))


def lot(seed: int, digest: bytes) -> float:
    """A pseudo-random number in [0, 1) from the seed and a document's digest; decides which documents are held out."""
    return float(_seeded(seed, "held out", digest) / (1 << 128))


def _seeded(seed: int, purpose: str, digest: bytes) -> int:
    """A pseudo-random 128-bit number from the seed, the purpose and a document's digest."""
    made = hashlib.blake2b(digest, digest_size=16, key=hashlib.sha256(f"{purpose} {seed}".encode()).digest())
    return int.from_bytes(made.digest(), "big")


@dataclass(frozen=True)
class Document:
    """A candidate as it would appear in the text. ``size`` is in tokens (bytes without a tokenizer). ``marked``: it begins with
    a chat template's marker or a control token, so it needs no separator from the document before it."""

    source: int
    digest: bytes
    where: str
    text: str
    chat: bool
    marked: bool
    size: int


def shuffled(documents: Sequence[Document], seed: int | None) -> list[Document]:
    """The chosen documents in the order of the text: shuffled by the seed, or unchanged if it is None."""
    if seed is None:
        return list(documents)
    return sorted(documents, key=lambda document: (_seeded(seed, "order", document.digest), document.source))


def fair_shares(weights: Sequence[float], available: Sequence[int], budget: int) -> list[float]:
    """Each source's share of ``budget``: in proportion to the weights, but at most what is available. The others make up for
    what a source lacks, in proportion."""
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
class ChosenDocuments:
    """Documents taken, and the number of duplicates, each by source.

    ``is_near`` returns whether a document nearly equals one that was taken; it is called once for each document to be taken.
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
        """Take a document unless it duplicates, or nearly duplicates, one that was taken; return whether it was taken."""
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
) -> ChosenDocuments:
    """Take whole documents, source by source in their own order, up to each source's fair share of ``budget`` (None: all).

    What the shares leave over, because documents are whole, goes to the sources that fell shortest.
    """
    choice = ChosenDocuments(len(sources), is_near, left=[[] for _ in sources])
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
    """Remaining documents, each from the source that is furthest below its share; the caller may change ``sizes`` in
    between."""
    waiting = [list(reversed(documents)) for documents in left]
    while any(waiting):
        number = max((i for i in range(len(waiting)) if waiting[i]), key=lambda i: shares[i] - sizes[i])
        yield waiting[number].pop()
