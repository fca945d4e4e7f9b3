"""What a calibration text is, as facts: its size, parts, scripts, languages, repetitions and encoding.

The file is read once, in pieces; memory stays bounded whatever its length (1 GiB at most).
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

from imatrix_runner.calibration.domains import Domain, Domains, Similarity
from imatrix_runner.calibration.duplicates import THRESHOLD, NearDuplicates, Repeats
from imatrix_runner.calibration.languages import FENCE, ScriptShare, language_name, language_of, scripts
from imatrix_runner.calibration.parts import parse_parts
from imatrix_runner.calibration.pieces import Piece, Whole, read_pieces
from imatrix_runner.calibration.shingles import codepoints
from imatrix_runner.models.bounded import printable

LEAST_REPEATED = 12
"""Shorter lines (without their tags) and passages, such as closing brackets, ``return x`` or a divider, may come again without
being counted."""

_MOST_COMPARED = 20_000
_MOST_COMPARED_BYTES = 64 << 20
_GUESSED_BYTES = 16 << 20
_MOST_PASSAGE = 1 << 14
_EXAMPLE = 80
_TAG = re.compile(r"<[^<>]{1,40}>|\[/?[A-Z_]{1,20}\]")
# UTF-8 that was read as Windows-1252 or Latin-1 and written again: "é" has become "Ã©", "’" "â€™".
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(rf"Ã[\x80-\xbf{_CP1252}]|Â[\xa0-\xbf]|â€[\x80-\xbf{_CP1252}]|[ÐÑ][\x80-\xbf{_CP1252}]{{1,2}}[ÐÑ]")


@dataclass(frozen=True)
class LanguageShare:
    """A language by its ISO 639 code, or ``code`` (code or data), ``short`` (passages too short to tell), ``unknown``.
    ``share``: of the bytes that were looked at."""

    code: str
    name: str
    n_bytes: int
    share: float


@dataclass(frozen=True)
class Repetition:
    """Lines or passages of at least 12 characters: how many there are, how many of them had been there before, and the
    ``share`` of the whole text's bytes that those take. ``examples``: text and how often. ``estimated`` in huge texts."""

    n: int
    repeated: int
    share: float
    examples: tuple[tuple[str, int], ...]
    estimated: bool


@dataclass(frozen=True)
class NearRepetition:
    """Passages that are equal or nearly equal (Jaccard of 0.8) to an earlier one, of the first ``n`` that were compared.
    ``share``: of the bytes of these ``n``. ``examples``: beginnings of the later and the earlier passage."""

    n: int
    repeated: int
    share: float
    examples: tuple[tuple[str, str], ...]
    all_compared: bool


@dataclass(frozen=True)
class Encoding:
    """How the text is stored (UTF-8 that is broken is refused before). Line ends: ``crlf``, ``lf`` alone, ``cr`` alone.

    ``replaced``: U+FFFD, a character that was lost before. ``mojibake``: UTF-8 that was read as Latin-1, with an example.
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
    """Everything that needs no model. ``compression``: bytes over their size with zlib level 9 (prose: 2.0 to 2.6).

    ``words`` stand between white space. ``passages`` are blocks between blank lines (a fenced block stays whole; none goes on
    into the next document, nor beyond 16 KiB), ``documents`` what the manifest says. ``domains`` are the manifest's sources
    (``domain_kind`` ``source``) or the labelled parts (``part``; what stands before the first label is no domain), empty where
    there are neither. ``guessed``: bytes whose language was looked at, of a long text an even sample.
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
        """Documents, as far as that is known: otherwise passages."""
        return self.n_passages if self.n_documents is None else self.n_documents


def inspect_text(
    path: Path,
    documents: Sequence[tuple[int, int, str]] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> TextFacts:
    """Read ``path`` once and tell what it is. ``documents``, if they are known: of each its offset and length in bytes, and the
    name of its source.

    ``on_bytes`` hears how far it is, and may raise to stop. Raises :class:`InvalidDataError` for what is no UTF-8 text.
    """
    scanner = _Scanner(path.stat().st_size if path.is_file() else 0, documents)
    whole = Whole()
    for piece in read_pieces(path, whole, on_bytes=on_bytes):
        scanner.add(piece)
    return scanner.facts(path, whole)


class _Scanner:
    """Adds up the facts piece by piece."""

    def __init__(self, size: int, documents: Sequence[tuple[int, int, str]] | None) -> None:
        self._characters = _Characters()
        self._packer = zlib.compressobj(9)
        self._packed = 0
        self._ended = True  # the text so far ends with a line end
        self._lines, self._passages = Repeats(), Repeats()
        self._n_passages = 0
        self._near = _Near()
        self._languages = _Guesses(size)
        self._domains = Domains()
        self._documents = None if documents is None else sorted(documents)
        self._offsets = [offset for offset, _, _ in self._documents or ()]
        self._begun = 0  # documents that began so far
        self._part = ""
        self._held: list[str] = []
        self._held_from = self._held_bytes = 0
        self._fenced = False

    def add(self, piece: Piece) -> None:
        self._packed += len(self._packer.compress(piece.data))
        self._characters.add(piece)
        raws, lines = piece.data.split(b"\n"), piece.text.split("\n")
        # What a piece begins with may be the end of a line too long for one piece, and behind a line end nothing has begun.
        first, last = int(not self._ended and not lines[0]), len(lines) - (not lines[-1])
        offset = piece.offset + first
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
        # A fence that is never closed must not make one passage of all that follows: _MOST_PASSAGE ends it.
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
            self._near.add(bare, n_bytes)
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
            scripts=scripts(characters.counts),
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
    """A line without tags: ``<|im_start|>assistant`` and ``</li>`` come again in the best of texts."""
    return _TAG.sub("", line).strip() if "<" in line or "[" in line else line


def _shown(text: str) -> str:
    """The beginning of a stranger's text, fit for a terminal."""
    plain = " ".join(text[: 4 * _EXAMPLE].split())
    return printable(plain if len(plain) <= _EXAMPLE else plain[: _EXAMPLE - 1] + "…")


class _Characters:
    """Counts characters, words and line ends, and what went wrong with them."""

    def __init__(self) -> None:
        self.counts = np.zeros(0x110000, np.int64)
        self.words = self.lf = self._crlf = self._cr = self._mojibake = 0
        self._example = ""
        self._bom = self._in_word = self._after_cr = False
        # Every white space lies below U+3001.
        self._spaces = np.array([chr(number).isspace() for number in range(0x3002)])

    def add(self, piece: Piece) -> None:
        if piece.offset == 0:
            self._bom = piece.text.startswith("\ufeff")
        letters = codepoints(piece.text)
        found = np.bincount(letters)
        self.counts[: len(found)] += found
        solid = ~self._spaces[np.minimum(letters, 0x3001)]
        self.words += int(np.count_nonzero(solid[1:] & ~solid[:-1])) + int(solid[0] and not self._in_word)
        self._in_word = bool(solid[-1])
        self.lf += piece.data.count(b"\n")
        self._cr += piece.data.count(b"\r")
        self._crlf += piece.data.count(b"\r\n") + int(self._after_cr and piece.data.startswith(b"\n"))
        self._after_cr = piece.data.endswith(b"\r")
        if not piece.text.isascii():
            for broken in _MOJIBAKE.finditer(piece.text):
                self._mojibake += 1
                if not self._example:
                    start, end = max(0, broken.start() - 15), broken.end() + 15
                    self._example = printable(" ".join(piece.text[start:end].split()))

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
    """Passages compared with earlier ones, as many as time and memory allow."""

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
    """Languages by passage; of a text longer than 16 MiB evenly spread passages of about as many bytes."""

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
