"""Builds a calibration text: streams the sources, then chooses, renders, counts and mixes documents, and writes a manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from imatrix_runner.calibration.build.composing import PARTING, Composed, Composer, batches, starting
from imatrix_runner.calibration.build.mixing import (
    ChosenDocuments,
    Document,
    DocumentCandidate,
    Reservoir,
    balanced_budget,
    choose,
    lot,
)
from imatrix_runner.calibration.tokenisers import Tokeniser
from imatrix_runner.documents.documents import BadRecord, Conversation, DocumentRecord
from imatrix_runner.documents.manifest import Manifest, SourceFacts, TemplateFacts
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Finished, Progress, Sink, Started, info, warning
from imatrix_runner.files import human_bytes
from imatrix_runner.signals import Stop

READ, RENDER, COUNT, CHOOSE = "read", "render", "count", "choose"

MAX_BYTES = 64 << 20
"""Upper bound, in bytes, for a built text and for what is held of one source. An imatrix converges with a hundredth of it."""

_NOTICEABLE = 0.05
_BYTES_PER_TOKEN = 8
_LEAST_HELD = 1 << 20


@dataclass(frozen=True)
class OpenedSource:
    """A source ready to be read. ``records`` reads it from the start and calls its argument with the number of bytes of each
    read; ``n_bytes`` is their approximate total, for the progress. ``weight`` None: the user gave no weight."""

    name: str
    kind: str
    licence: str
    sha256: str
    n_bytes: int
    records: Callable[[Callable[[int], None]], Iterator[DocumentRecord | BadRecord]]
    weight: float | None = None
    revision: str = ""


@dataclass(frozen=True)
class BuildOptions:
    """``tokens`` is the budget (None: everything); with ``whole_chunks`` the text gets exactly ``tokens // n_ctx`` chunks.

    ``seed`` None keeps the order of the sources. ``least_chars``: shorter documents are left out. ``skip_bad``: broken records
    are counted instead of refused. ``held_out``: share of the documents that goes into a separate text, to measure levels on.
    """

    n_ctx: int = 512
    tokens: int | None = None
    whole_chunks: bool = False
    seed: int | None = 1
    aligned: bool = False
    least_chars: int = 40
    near_duplicates: float = 0.8
    skip_bad: bool = False
    held_out: float = 0.0


@dataclass(frozen=True)
class Rendered:
    """Rendered conversations, with a :class:`BadRecord` for each that failed; ``facts`` of the template used."""

    texts: Sequence[str | BadRecord]
    facts: TemplateFacts


Render = Callable[[Sequence[DocumentRecord], Callable[[int], None]], Rendered]
"""Renders the conversations of records; its second argument is called with the number done. Raises :class:`RunnerError`."""

Near = Callable[[str], bool]
"""Returns whether a text nearly equals an earlier one; a text for which it returns False is remembered."""


@dataclass(frozen=True)
class Built:
    """A built text and its manifest, whose ``text`` the caller fills in. ``at_start``: number of chunks that begin with a
    document. ``held_out``: the text to measure levels on, empty if none was requested."""

    text: str
    manifest: Manifest
    at_start: int | None = None
    held_out: str = ""


@dataclass
class _Tally:
    """Counts of a source's records by outcome."""

    records: int = 0
    bad: int = 0
    short: int = 0
    duplicates: int = 0
    near: int = 0
    long: int = 0
    cut: int = 0


class Builder:
    """State of one build; :meth:`build` runs it."""

    def __init__(
        self,
        sources: Sequence[OpenedSource],
        options: BuildOptions,
        *,
        tokeniser: Tokeniser | None,
        render: Render,
        near: Callable[[], Near] | None,
        sink: Sink,
        stop: Stop,
        model: str = "",
    ) -> None:
        self._sources, self._options, self._tokeniser = tuple(sources), options, tokeniser
        self._render, self._near, self._sink, self._stop, self._model = render, near, sink, stop, model
        self._tallies = [_Tally() for _ in sources]
        self._template: TemplateFacts | None = None
        self._examples: list[str] = []

    def build(self) -> Built:
        """Build the text. Raises :class:`InvalidDataError` for unusable sources, ``InterruptedRunError`` once stopped."""
        limit = self._held_bytes()
        while True:
            reservoirs = self._read(limit)
            documents, held = self._divided(self._documents(reservoirs))
            budget = self._budget(documents)
            choice = self._choose(documents, budget)
            if limit is None or limit >= MAX_BYTES or not _lacking(choice, reservoirs, budget):
                break
            # The held documents were mostly alike or had few tokens: read again and hold more.
            limit = min(4 * limit, MAX_BYTES)
            self._tallies, self._examples = [_Tally() for _ in self._sources], []
        return self._finish(choice, held)

    def _divided(self, documents: Sequence[Sequence[Document]]) -> tuple[list[list[Document]], list[Document]]:
        """The documents to calibrate with, by source, and the held-out ones. Only seed and content decide."""
        options = self._options
        kept: list[list[Document]] = []
        held: list[Document] = []
        for source in documents:
            kept.append([])
            for document in source:
                held_out = lot(options.seed or 0, document.digest) < options.held_out
                (held if held_out else kept[-1]).append(document)
        return kept, held

    def _held_out(self, held: Sequence[Document], choice: ChosenDocuments, composer: Composer) -> str:
        """The held-out text, sized in proportion to the chosen documents and without near duplicates of them.

        Raises :class:`InvalidDataError` if no document is left.
        """
        if not self._options.held_out:
            return ""
        near = self._near() if self._near is not None else None
        if near is not None:
            for document in choice.taken:
                near(document.text)
        room = self._options.held_out * choice.size / (1 - self._options.held_out)
        chosen: list[Document] = []
        for document in held:
            if sum(each.size for each in chosen) >= room:
                break
            if near is None or not near(document.text):
                chosen.append(document)
        if not chosen:
            raise InvalidDataError(
                "No document can be held out",
                f"of {len(held) + len(choice.taken)} documents, the held-out share of {100 * self._options.held_out:g} % has "
                "none that differs from the others",
                "Give more documents or a larger --held-out share; run --evaluate splits a plain text by itself.",
            )
        return composer.joined(chosen)

    @property
    def _weights(self) -> list[float]:
        return [source.weight if source.weight is not None else 1.0 for source in self._sources]

    def _held_bytes(self) -> int | None:
        """Bytes to hold of each source: enough to fill the whole budget from it alone; None without a budget."""
        if self._options.tokens is None:
            return None
        return min(max(_LEAST_HELD, _BYTES_PER_TOKEN * self._options.tokens), MAX_BYTES)

    def _read(self, limit: int | None) -> list[Reservoir]:
        """Read every source once, each into a reservoir."""
        total = sum(source.n_bytes for source in self._sources)
        self._sink(Started(READ, "reading", total, "B"))
        done = 0

        def count(n_bytes: int) -> None:
            nonlocal done
            self._stop.check()
            done += n_bytes
            self._sink(Progress(READ, min(done, total), total))

        reservoirs = [self._read_one(number, limit, count) for number in range(len(self._sources))]
        self._sink(Finished(READ, "done", f"{sum(tally.records for tally in self._tallies)} documents"))
        return reservoirs

    def _read_one(self, number: int, limit: int | None, count: Callable[[int], None]) -> Reservoir:
        source, tally = self._sources[number], self._tallies[number]
        reservoir = Reservoir(self._options.seed, limit)
        for record in source.records(count):
            if isinstance(record, BadRecord):
                self._bad(number, record)
                continue
            tally.records += 1
            if _letters(record) < max(1, self._options.least_chars):
                tally.short += 1
                continue
            reservoir.add(record)
            if limit is None and reservoir.n_bytes > MAX_BYTES:
                raise InvalidDataError(
                    f"{source.name} is too large for one calibration text",
                    f"its documents exceed {human_bytes(MAX_BYTES)}, and a few hundred kilobytes are enough",
                    "Limit how much is taken: --chunks 200 --model MODEL.",
                )
        tally.duplicates = reservoir.duplicates
        if tally.records == 0:
            raise InvalidDataError(
                f"{source.name} contains no documents",
                f"{tally.bad} broken records were skipped and nothing else was found" if tally.bad else "it has no records",
                "Leave it out, or give another source.",
            )
        return reservoir

    def _bad(self, number: int, record: BadRecord) -> None:
        if not self._options.skip_bad:
            raise InvalidDataError(
                f"{record.where} cannot be used", record.why, f"{record.todo} To skip such records: --skip-bad."
            )
        self._tallies[number].bad += 1
        self._examples = [*self._examples, f"{record.where}: {record.why}"][:3]

    def _documents(self, reservoirs: Sequence[Reservoir]) -> list[list[Document]]:
        """The candidates of every source, rendered and counted, in the order in which they are taken."""
        kept: list[tuple[int, DocumentCandidate, str]] = []
        for number, reservoir in enumerate(reservoirs):
            candidates = reservoir.in_order()
            rendered = zip(candidates, self._rendered(number, candidates), strict=True)
            kept += [(number, candidate, text) for candidate, text in rendered if text is not None]
        documents: list[list[Document]] = [[] for _ in reservoirs]
        texts, sizes = self._count([text for _, _, text in kept])
        for (number, each, _), text, size in zip(kept, texts, sizes, strict=True):
            chat = isinstance(each.record.content, Conversation)
            marked = chat or self._options.aligned
            documents[number].append(Document(number, each.digest, each.record.where, text, chat, marked, size))
        return documents

    def _rendered(self, number: int, candidates: Sequence[DocumentCandidate]) -> list[str | None]:
        chats = [candidate.record for candidate in candidates if isinstance(candidate.record.content, Conversation)]
        texts: Iterator[str | BadRecord] = iter(())
        if chats:
            self._sink(Started(RENDER, f"rendering {self._sources[number].name}", len(chats), "dialogues"))
            rendered = self._render(chats, lambda done: self._sink(Progress(RENDER, done, len(chats))))
            self._sink(Finished(RENDER, "done", f"{len(chats)} dialogues"))
            self._template, texts = rendered.facts, iter(rendered.texts)
        found: list[str | None] = []
        for candidate in candidates:
            content = candidate.record.content
            text = content.strip() if isinstance(content, str) else next(texts)
            if isinstance(text, BadRecord):
                self._bad(number, text)
            found.append(text if isinstance(text, str) else None)
        return found

    def _count(self, texts: list[str]) -> tuple[list[str], list[int]]:
        """The texts as they will be written (with ``aligned``, each begins with a control token) and their sizes in tokens,
        separators included (in bytes without a tokenizer)."""
        if self._tokeniser is None:
            return texts, [len(text.encode()) + len(PARTING) for text in texts]
        aligned = self._options.aligned
        standing: list[str] = []
        sizes: list[int] = []
        self._sink(Started(COUNT, "counting tokens", len(texts), "documents"))
        for batch in batches(texts):
            self._stop.check()
            tokens = self._tokeniser.tokenise(batch, parse_special=self._parse_special)
            if aligned:
                batch = [starting(text, found, self._tokeniser.vocabulary) for text, found in zip(batch, tokens, strict=True)]
                tokens = self._tokeniser.tokenise(batch, parse_special=True)
            standing += batch
            sizes += [len(found) + (not aligned) for found in tokens]
            self._sink(Progress(COUNT, len(sizes), len(texts)))
        self._sink(Finished(COUNT, "done", f"{sum(sizes)} tokens"))
        return standing, sizes

    @property
    def _parse_special(self) -> bool:
        return self._template is not None or self._options.aligned

    def _budget(self, documents: Sequence[Sequence[Document]]) -> int | None:
        if self._options.tokens is not None:
            return self._options.tokens
        if any(source.weight is not None for source in self._sources):
            return balanced_budget(self._weights, [sum(each.size for each in source) for source in documents])
        return None

    def _choose(self, documents: Sequence[Sequence[Document]], budget: int | None) -> ChosenDocuments:
        near = self._near() if self._near is not None else None
        looked, total = 0, sum(map(len, documents))

        def is_near(document: Document) -> bool:
            nonlocal looked
            self._stop.check()
            looked += 1
            self._sink(Progress(CHOOSE, looked, total))
            return near is not None and near(document.text)

        self._sink(Started(CHOOSE, "choosing", total, "documents"))
        choice = choose(documents, self._weights, budget, is_near)
        self._sink(Finished(CHOOSE, "done", f"{len(choice.taken)} of {total} documents"))
        return choice

    def _finish(self, choice: ChosenDocuments, held: Sequence[Document]) -> Built:
        self._report_bad()
        options, budget = self._options, self._options.tokens
        composer = Composer(self._tokeniser, options.seed, options.n_ctx, self._parse_special)
        if options.aligned:
            composed = composer.align(choice, budget)
        else:
            composed = composer.compose(choice, budget, whole_chunks=options.whole_chunks)
        for number, tally in enumerate(self._tallies):
            tally.duplicates += choice.duplicates[number]
            tally.near = choice.near_duplicates[number]
            tally.cut = composed.cut.count(number)
            tally.long = sum(1 for each in choice.left[number] if each.chat and each.size > (budget or each.size))
        if not composed.documents:
            self._refuse_empty(choice, budget)
        self._report_shortage(composed)
        held_out = self._held_out(held, choice, composer)
        manifest = self._manifest(composed)
        if held_out:
            digest = hashlib.sha256(held_out.encode()).hexdigest()
            manifest = msgspec.structs.replace(manifest, held_out_sha256=digest)
        return Built(composed.text, manifest, composed.at_start, held_out)

    def _refuse_empty(self, choice: ChosenDocuments, budget: int | None) -> None:
        tallies = self._tallies
        short, long = sum(tally.short for tally in tallies), sum(tally.long for tally in tallies)
        records = sum(tally.records for tally in tallies)
        why = f"{short} of {records} documents are shorter than {self._options.least_chars} letters"
        todo = "Give other sources, or lower --min-chars."
        if long or any(choice.left):
            why += f" and {sum(map(len, choice.left))} are longer than the budget of {budget} tokens"
            todo = "Raise --chunks or --tokens."
        raise InvalidDataError("No documents are left to build a calibration text from", why, todo)

    def _report_bad(self) -> None:
        bad = sum(tally.bad for tally in self._tallies)
        if bad:
            more = "; …" if bad > len(self._examples) else ""
            self._sink(warning(f"{bad} broken record{'s' if bad > 1 else ''} left out: {'; '.join(self._examples)}{more}"))

    def _report_shortage(self, composed: Composed) -> None:
        options, sink = self._options, self._sink
        if options.tokens is not None and composed.tokens is not None and composed.tokens < options.tokens:
            chunks = composed.tokens // options.n_ctx
            wanted = f"{options.tokens // options.n_ctx} chunks" if options.whole_chunks else f"{options.tokens} tokens"
            sink(
                warning(f"The sources are used up: {composed.tokens} tokens, {chunks} chunks of {options.n_ctx}, not {wanted}.")
            )
        used = _sizes(composed, len(self._sources))
        whole = sum(used) or 1
        weights = self._weights
        for number, source in enumerate(self._sources):
            asked, given = weights[number] / sum(weights), used[number] / whole
            if options.tokens is not None and asked - given > _NOTICEABLE:
                shortage = f"{source.name} gives {100 * given:.0f} % of the text instead of {100 * asked:.0f} %"
                sink(warning(f"{shortage}: it has no more documents that fit."))
        for number, tally in enumerate(self._tallies):
            if tally.long:
                many = f"{tally.long} dialogues are" if tally.long > 1 else "1 dialogue is"
                sink(info(f"{self._sources[number].name}: {many} longer than the budget and left out."))

    def _manifest(self, composed: Composed) -> Manifest:
        options = self._options
        data = composed.text.encode()
        used = _sizes(composed, len(self._sources))
        whole = sum(used) or 1
        facts: list[SourceFacts] = []
        for number, (source, tally) in enumerate(zip(self._sources, self._tallies, strict=True)):
            mine = [place for place in composed.places if place.source == number]
            facts.append(
                SourceFacts(
                    name=source.name,
                    kind=source.kind,
                    sha256=source.sha256,
                    licence=source.licence,
                    weight=self._weights[number],
                    share=round(used[number] / whole, 4),
                    records=tally.records,
                    documents=len(mine),
                    bytes=sum(place.n_bytes for place in mine),
                    tokens=used[number] if self._tokeniser is not None else None,
                    bad=tally.bad,
                    short=tally.short,
                    duplicates=tally.duplicates,
                    near_duplicates=tally.near,
                    long=tally.long,
                    cut=tally.cut,
                    revision=source.revision,
                )
            )
        return Manifest(
            text="",
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            parse_special=self._parse_special,
            seed=options.seed if options.seed is not None else 0,
            shuffled=options.seed is not None,
            aligned=options.aligned,
            n_ctx=options.n_ctx,
            tokens=composed.tokens,
            chunks=composed.tokens // options.n_ctx if composed.tokens is not None else None,
            model=self._model,
            template=self._template,
            sources=tuple(facts),
            documents=composed.places,
        )


def _lacking(choice: ChosenDocuments, reservoirs: Sequence[Reservoir], budget: int | None) -> bool:
    """Whether the budget was missed and a source that ran out has more documents than were held."""
    enough = budget is None or choice.size >= (1 - _NOTICEABLE) * budget
    return not enough and any(each.limited and not left for each, left in zip(reservoirs, choice.left, strict=True))


def _sizes(composed: Composed, n_sources: int) -> list[int]:
    """Each source's contribution to a text, in tokens (bytes without a tokenizer)."""
    used = [0] * n_sources
    for document in composed.documents:
        used[document.source] += document.size
    return used


def _letters(record: DocumentRecord) -> int:
    """Number of characters of a document; for a conversation, of its messages' contents."""
    if isinstance(record.content, str):
        return len(record.content.strip())
    return sum(len(str(message.get("content") or "")) for message in record.content.messages)
