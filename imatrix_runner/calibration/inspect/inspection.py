"""Facts about a calibration text: its size, parts, scripts, languages, repetitions and encoding.

The file is read once, in blocks; memory stays bounded whatever its length (1 GiB at most).
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatrix_runner.calibration.build.duplicates import THRESHOLD, NearDuplicates, Repeats
from imatrix_runner.calibration.inspect.languages import (
    FENCE,
    Domain,
    Domains,
    ScriptShare,
    Similarity,
    language_name,
    language_of,
    scripts,
)
from imatrix_runner.calibration.parts import parse_parts
from imatrix_runner.calibration.shingles import codepoints
from imatrix_runner.documents.blocks import TextBlock, Whole, read_blocks
from imatrix_runner.safe_text import printable

LEAST_REPEATED = 12
"""Characters. Shorter lines (without their tags) and passages, such as closing brackets, ``return x`` or a divider, do not
count as repeated."""

_MOST_COMPARED = 20_000
_MOST_COMPARED_BYTES = 64 << 20
_GUESSED_BYTES = 16 << 20
_MOST_PASSAGE = 1 << 14
_EXAMPLE = 80
_TAG = re.compile(r"<[^<>]{1,40}>|\[/?[A-Z_]{1,20}\]")
# UTF-8 that was decoded as Windows-1252 or Latin-1 and encoded again: "é" became "Ã©", "’" became "â€™".
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(rf"Ã[\x80-\xbf{_CP1252}]|Â[\xa0-\xbf]|â€[\x80-\xbf{_CP1252}]|[ÐÑ][\x80-\xbf{_CP1252}]{{1,2}}[ÐÑ]")


@dataclass(frozen=True)
class LanguageShare:
    """A language by its ISO 639 code, or ``code`` (code or data), ``short`` (passages too short to identify), ``unknown``.
    ``share``: of the bytes that were classified."""

    code: str
    name: str
    n_bytes: int
    share: float


@dataclass(frozen=True)
class Repetition:
    """Repetition among the ``n`` lines or passages of at least 12 characters. ``repeated``: how many of them repeat an earlier
    one. ``share``: their share of the text's bytes. ``examples``: text and number of occurrences. ``estimated``: in huge
    texts."""

    n: int
    repeated: int
    share: float
    examples: tuple[tuple[str, int], ...]
    estimated: bool


@dataclass(frozen=True)
class NearRepetition:
    """Passages that equal or nearly equal (Jaccard of 0.8) an earlier one, among the first ``n``, which were compared.
    ``share``: of the bytes of these ``n``. ``examples``: beginnings of the later and of the earlier passage."""

    n: int
    repeated: int
    share: float
    examples: tuple[tuple[str, str], ...]
    all_compared: bool


@dataclass(frozen=True)
class Encoding:
    """Counts of encoding marks (invalid UTF-8 is refused earlier). Line ends: ``crlf``, ``lf`` alone, ``cr`` alone.

    ``replaced``: U+FFFD, which stands for a lost character. ``mojibake``: UTF-8 decoded as Windows-1252 or Latin-1.
    """

    bom: bool
    crlf: int
    lf: int
    cr: int
    replaced: int
    mojibake: int
    mojibake_example: str
    controls: int


@dataclass(frozen=True)
class TextFacts:
    """The facts that need no model. ``compression``: size divided by the size with zlib level 9 (prose: 2.0 to 2.6).

    Words are separated by white space. Passages are blocks between blank lines (a fenced block stays whole; a passage ends with
    its document, and at 16 KiB). Documents come from the manifest (``n_documents`` is None without one). ``domains`` are the
    manifest's sources (``domain_kind`` ``source``) or the labelled parts (``part``; text before the first label belongs to
    none), else empty. ``guessed``: bytes whose language was identified; in a long text an even sample.
    """

    path: Path
    n_bytes: int
    sha256: str
    n_lines: int
    n_characters: int
    n_words: int
    n_passages: int
    n_documents: int | None
    compression: float
    domain_kind: str
    domains: tuple[Domain, ...]
    similarities: tuple[Similarity, ...]
    scripts: tuple[ScriptShare, ...]
    languages: tuple[LanguageShare, ...]
    guessed: int
    lines: Repetition
    passages: Repetition
    near: NearRepetition
    encoding: Encoding

    @property
    def n_examples(self) -> int:
        """Number of documents if known, else of passages."""
        return self.n_passages if self.n_documents is None else self.n_documents


def inspect_text(
    path: Path,
    documents: Sequence[tuple[int, int, str]] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    *,
    thorough: bool = True,
) -> TextFacts:
    """Read ``path`` once and return its facts. ``documents``, if known: offset and length in bytes, and name of the source, of
    each.

    ``thorough``: with languages, scripts and near duplicates, which need :data:`~imatrix_runner.extras.CALIBRATION`.
    ``on_bytes`` is called with the number of bytes read so far, and may raise to stop. Raises :class:`InvalidDataError` if the
    file is not UTF-8 text.
    """
    scanner = _Scanner(path.stat().st_size if path.is_file() else 0, documents, thorough=thorough)
    whole = Whole()
    for block in read_blocks(path, whole, on_bytes=on_bytes):
        scanner.add(block)
    return scanner.facts(path, whole)


class _Scanner:
    """Adds up the facts block by block."""

    def __init__(self, size: int, documents: Sequence[tuple[int, int, str]] | None, *, thorough: bool) -> None:
        self._thorough = thorough
        self._characters = _Characters()
        self._packer = zlib.compressobj(9)
        self._packed = 0
        self._ended = True  # whether the text so far ends with a line end
        self._lines, self._passages = Repeats(), Repeats()
        self._n_passages = 0
        self._near = _Near()
        self._languages = _Guesses(size)
        self._domains = Domains()
        self._documents = None if documents is None else sorted(documents)
        self._offsets = [offset for offset, _, _ in self._documents or ()]
        self._begun = 0  # number of documents that began so far
        self._part = ""
        self._held: list[str] = []
        self._held_from = self._held_bytes = 0
        self._fenced = False

    def add(self, block: TextBlock) -> None:
        self._packed += len(self._packer.compress(block.data))
        self._characters.add(block)
        raws, lines = block.data.split(b"\n"), block.text.split("\n")
        # The first line may be the end of a line too long for one block; after a final line end no line has begun.
        first, last = int(not self._ended and not lines[0]), len(lines) - (not lines[-1])
        offset = block.offset + first
        for raw, line in zip(raws[first:last], lines[first:last], strict=True):
            if line:
                self._line(line, len(raw), offset)
            else:
                self._blank()
            offset += len(raw) + 1
        self._ended = not lines[-1]

    def _line(self, line: str, n_bytes: int, offset: int) -> None:
        if self._begun < len(self._offsets) and offset >= self._offsets[self._begun]:
            self._flush()
            self._begun = bisect_right(self._offsets, offset)
        bare = line.strip()
        if not bare:
            self._blank()
            return
        if len(_unmarked(bare)) >= LEAST_REPEATED:
            self._lines.add(bare, n_bytes + 1)
        if self._documents is None and line.startswith("=== part:") and (label := parse_parts(line)):
            self._flush()
            self._part = label[0].name
            return
        if not self._held:
            self._held_from = offset
        self._held.append(line)
        self._held_bytes += n_bytes + 1
        if FENCE.fullmatch(line):
            self._fenced = not self._fenced
        if self._held_bytes > _MOST_PASSAGE:
            self._flush()

    def _blank(self) -> None:
        # _MOST_PASSAGE bounds a fence that is never closed.
        if self._held and self._fenced:
            self._held.append("")
        elif self._held:
            self._flush()

    def _flush(self) -> None:
        text, n_bytes, offset = "\n".join(self._held), self._held_bytes, self._held_from
        self._held, self._held_bytes, self._fenced = [], 0, False
        if not text:
            return
        self._n_passages += 1
        bare = text.strip()
        if len(bare) >= LEAST_REPEATED:
            self._passages.add(bare, n_bytes)
            if self._thorough:
                self._near.add(bare, n_bytes)
        if self._thorough:
            self._languages.add(text, n_bytes, offset)
        if domain := self._domain(offset):
            self._domains.add(domain, text, n_bytes)

    def _domain(self, offset: int) -> str:
        if self._documents is None:
            return self._part
        place = bisect_right(self._offsets, offset) - 1
        return self._documents[place][2] if place >= 0 else ""

    def facts(self, path: Path, whole: Whole) -> TextFacts:
        self._flush()
        self._packed += len(self._packer.flush())
        characters = self._characters
        domains = self._domains.shares()
        kind = "source" if self._documents is not None else "part"
        return TextFacts(
            path=path,
            n_bytes=whole.n_bytes,
            sha256=whole.sha256,
            n_lines=characters.lf + (not self._ended),
            n_characters=int(characters.counts.sum()),
            n_words=characters.words,
            n_passages=self._n_passages,
            n_documents=len(self._documents) if self._documents is not None else None,
            compression=whole.n_bytes / self._packed,
            domain_kind=kind if domains else "",
            domains=domains,
            similarities=self._domains.similarities(),
            scripts=scripts(characters.counts) if self._thorough else (),
            languages=self._languages.shares(),
            guessed=self._languages.taken,
            lines=_repetition(self._lines, whole.n_bytes),
            passages=_repetition(self._passages, whole.n_bytes),
            near=self._near.facts(self._passages.n),
            encoding=characters.encoding(),
        )


def _repetition(repeats: Repeats, n_bytes: int) -> Repetition:
    examples = tuple((_shown(text), count) for text, count in repeats.examples(3))
    return Repetition(repeats.n, repeats.repeated, repeats.repeated_bytes / n_bytes, examples, repeats.estimated)


def _unmarked(line: str) -> str:
    """A line without tags: ``<|im_start|>assistant`` and ``</li>`` recur in good texts as well."""
    return _TAG.sub("", line).strip() if "<" in line or "[" in line else line


def _shown(text: str) -> str:
    """The beginning of an untrusted text, safe to print on a terminal."""
    plain = " ".join(text[: 4 * _EXAMPLE].split())
    return printable(plain if len(plain) <= _EXAMPLE else plain[: _EXAMPLE - 1] + "…")


class _Characters:
    """Counts characters, words, line ends and encoding errors."""

    def __init__(self) -> None:
        self.counts = np.zeros(0x110000, np.int64)
        self.words = self.lf = self._crlf = self._cr = self._mojibake = 0
        self._example = ""
        self._bom = self._in_word = self._after_cr = False
        # All white space is below U+3001.
        self._spaces = np.array([chr(number).isspace() for number in range(0x3002)])

    def add(self, block: TextBlock) -> None:
        if block.offset == 0:
            self._bom = block.text.startswith("\ufeff")
        letters = codepoints(block.text)
        found = np.bincount(letters)
        self.counts[: len(found)] += found
        solid = ~self._spaces[np.minimum(letters, 0x3001)]
        self.words += int(np.count_nonzero(solid[1:] & ~solid[:-1])) + int(solid[0] and not self._in_word)
        self._in_word = bool(solid[-1])
        self.lf += block.data.count(b"\n")
        self._cr += block.data.count(b"\r")
        self._crlf += block.data.count(b"\r\n") + int(self._after_cr and block.data.startswith(b"\n"))
        self._after_cr = block.data.endswith(b"\r")
        if not block.text.isascii():
            for broken in _MOJIBAKE.finditer(block.text):
                self._mojibake += 1
                if not self._example:
                    start, end = max(0, broken.start() - 15), broken.end() + 15
                    self._example = printable(" ".join(block.text[start:end].split()))

    def encoding(self) -> Encoding:
        controls = self.counts[:32].sum() - self.counts[[9, 10, 12, 13]].sum() + self.counts[127:160].sum()
        return Encoding(
            self._bom,
            self._crlf,
            self.lf - self._crlf,
            self._cr - self._crlf,
            int(self.counts[0xFFFD]),
            self._mojibake,
            self._example,
            int(controls),
        )


class _Near:
    """Compares passages with earlier ones, up to bounds on their number and bytes."""

    def __init__(self) -> None:
        self._finder = NearDuplicates(THRESHOLD, most=_MOST_COMPARED)
        self._beginnings: list[str] = []
        self._bytes = self._repeated = self._repeated_bytes = 0
        self._examples: list[tuple[str, str]] = []

    def add(self, text: str, n_bytes: int) -> None:
        if len(self._beginnings) >= _MOST_COMPARED or self._bytes >= _MOST_COMPARED_BYTES:
            return
        earlier = self._finder.add(text)
        self._beginnings.append(text[: 4 * _EXAMPLE])
        self._bytes += n_bytes
        if earlier is not None:
            self._repeated += 1
            self._repeated_bytes += n_bytes
            if len(self._examples) < 3:
                self._examples.append((_shown(text), _shown(self._beginnings[earlier])))

    def facts(self, n_passages: int) -> NearRepetition:
        n = len(self._beginnings)
        share = self._repeated_bytes / self._bytes if self._bytes else 0.0
        return NearRepetition(n, self._repeated, share, tuple(self._examples), n == n_passages)


class _Guesses:
    """Identifies languages by passage; in a text longer than 16 MiB, of evenly spread passages of about 16 MiB in all."""

    def __init__(self, size: int) -> None:
        self._rate = min(1.0, _GUESSED_BYTES / size) if size else 1.0
        self._bytes: Counter[str] = Counter()
        self.taken = 0

    def add(self, text: str, n_bytes: int, offset: int) -> None:
        if self.taken <= self._rate * offset:
            self.taken += n_bytes
            self._bytes[language_of(text)] += n_bytes

    def shares(self) -> tuple[LanguageShare, ...]:
        ordered = sorted(self._bytes.items(), key=lambda entry: (-entry[1], entry[0]))
        return tuple(LanguageShare(code, language_name(code), count, count / self.taken) for code, count in ordered)
