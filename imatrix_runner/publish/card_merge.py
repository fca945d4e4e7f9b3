"""Merges a new model card with the one on the hub, which a person may have edited, section by section. Pure.

A published card ends with a comment that holds a short hash of each section and of each key of its front matter, as they were
generated (:func:`marked`). So the card itself tells which parts a person touched, also after several merges, and nothing else
has to be remembered:

* a part that is as generated becomes the new one, or goes if there is no new one;
* a part that a person edited stays, and one that they removed stays away;
* a part that they added stays where it is;
* a new part comes after the one that it follows in the new card.

Where a part was edited and would have changed, too, the person's stays and a warning names it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from imatrix_runner.safe_text import shown

MOST_CHARACTERS = 1 << 20
"""A longer card on the hub is left as it is."""

_MOST_PARTS = 2000
_COMMENT = "imatrix-runner: parts as generated"
_MARKS = re.compile(rf"\n*<!-- {_COMMENT}((?: [0-9a-f]{{8}}:[0-9a-f]{{8}})*) -->[ \t]*(?:\n|\Z)")
_HEADING = re.compile(r" {0,3}(#{1,2})[ \t]+(.*?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)$")
_KEY = re.compile(r"([A-Za-z_][\w.-]{0,99})[ \t]*:(?:\s|$)")
_TITLE = "title"


@dataclass(frozen=True)
class CardPart:
    """A section with its heading, or a key of the front matter with its value. ``key`` is unique in its card; ``name`` is for
    people; ``text`` has no line break at its end."""

    key: str
    name: str
    text: str

    @property
    def digest(self) -> str:
        """Of the text, whatever editors do to line ends and spaces before them."""
        return _short("\n".join(line.rstrip() for line in self.text.splitlines()).strip())


@dataclass(frozen=True)
class MergedCard:
    """``warnings``: sentences, one for each part that stayed as a person wrote it although the new card has something else."""

    text: str
    warnings: tuple[str, ...] = ()


def marked(card: str) -> str:
    """A generated card with the comment from which a later merge knows what was generated."""
    card = _plain_lines(card)
    front, sections = _split(card)
    return f"{card.rstrip()}\n\n{_marks([*front, *sections])}\n"


def has_marks(card: str) -> bool:
    """Whether a card says what of it was generated."""
    return _found_marks(_plain_lines(card)) is not None


def without_marks(card: str) -> str:
    """A card as it was before :func:`marked`."""
    return _MARKS.sub("\n", _plain_lines(card)).rstrip("\n") + "\n"


def merge_cards(ours: str, theirs: str, base: str = "") -> MergedCard:
    """The generated card ``ours``, without marks, merged into ``theirs`` from the hub. The result has marks.

    ``base``: the last card that was published from here, for a card that has lost its marks; without either, every section of
    ``theirs`` counts as a person's.
    """
    if len(theirs) > MOST_CHARACTERS:
        return MergedCard(theirs, ("The card on the hub is longer than 1 MiB; it stays as it is.",))
    given = theirs
    ours, theirs, base = map(_plain_lines, (ours, theirs, base))
    before = _found_marks(theirs)
    if before is None and base:
        before = _found_marks(base)
        if before is None:
            front, sections = _split(base[:MOST_CHARACTERS])
            before = {_short(part.key): part.digest for part in (*front, *sections)}
    plain = without_marks(theirs)
    our_front, our_sections = _split(ours)
    their_front, their_sections = _split(plain)
    if len(their_front) + len(their_sections) > _MOST_PARTS:
        return MergedCard(theirs, (f"The card on the hub has more than {_MOST_PARTS:,} sections; it stays as it is.",))
    known = before or {}
    warnings: list[str] = []
    front = _merged(our_front, their_front, known, warnings.append, "the metadata key")
    sections = _merged(our_sections, their_sections, known, warnings.append, "the section")
    head = "---\n" + "\n".join(part.text for part in front) + "\n---\n" if front else ""
    body = "\n\n".join(part.text for part in sections if part.text)
    marks = _marks([*our_front, *our_sections])
    text = "\n".join(filter(None, (head, body))) + f"\n\n{marks}\n"
    # A commit for nothing but line ends would be one too many.
    return MergedCard(given if _same_words(text, theirs) else text, tuple(warnings))


def _same_words(text: str, other: str) -> bool:
    """Whether two cards differ in nothing but spaces at the ends of lines, and empty lines."""
    lines, others = ([line.rstrip() for line in each.splitlines() if line.strip()] for each in (text, other))
    return lines == others


def _plain_lines(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _merged(
    ours: Sequence[CardPart], theirs: Sequence[CardPart], known: Mapping[str, str], warn: Callable[[str], None], kind: str
) -> list[CardPart]:
    """Parts of the result, in the order that the person gave them. ``known``: hashes of keys -> of parts as generated."""
    new = {part.key: part for part in ours}
    result: list[CardPart] = []
    for part in theirs:
        was, fresh = known.get(_short(part.key)), new.get(part.key)
        if was == part.digest:
            result += [fresh] if fresh is not None else []
            continue
        result.append(part)
        changed = fresh is None if was is not None else False
        if fresh is not None and fresh.digest not in (was, part.digest):
            changed = True
        if changed:
            why = "edited on the hub" if was is not None else "written on the hub"
            warn(f"The card keeps {kind} {shown(part.name, 80)!r} as it was {why}; the new report has another.")
    present = {part.key for part in theirs}
    for at, part in enumerate(ours):
        if part.key in present or _short(part.key) in known:  # there, or removed by a person
            continue
        places = {each.key: place for place, each in enumerate(result)}
        after = next((places[each.key] for each in reversed(ours[:at]) if each.key in places), -1)
        result.insert(after + 1, part)
    return result


def _split(card: str) -> tuple[list[CardPart], list[CardPart]]:
    """The keys of the front matter, and the sections."""
    lines = card.split("\n")
    front: list[str] = []
    if lines[0].rstrip() == "---":
        end = next((at for at in range(1, len(lines)) if lines[at].rstrip() == "---"), 0)
        if end:
            front, lines = lines[1:end], lines[end + 1 :]
    return _unique(_keys(front)), _unique(_sections(lines))


def _keys(lines: Sequence[str]) -> Iterator[CardPart]:
    """Each top-level key with all lines until the next one. Lines before the first, such as comments, go with it."""
    name, kept = "", list[str]()
    for line in lines:
        found = _KEY.match(line)
        if found is not None and name:
            yield CardPart(f"key {name}", name, "\n".join(kept))
            kept = []
        name = found[1] if found is not None else name
        kept.append(line)
    if kept and "".join(kept).strip():
        yield CardPart(f"key {name}", name, "\n".join(kept))


def _sections(lines: Sequence[str]) -> Iterator[CardPart]:
    """Text before the first heading, then each heading of the first two levels with what follows. Lines in blocks of code and
    in comments are no headings; the first heading of level one is the title, however it is worded."""
    key, name, kept, titled = "", "its beginning", list[str](), False
    for line, is_text in _outside_blocks(lines):
        found = _HEADING.match(line) if is_text else None
        if found is not None:
            if "".join(kept).strip():
                yield CardPart(key, name, "\n".join(kept).strip("\n"))
            is_title = len(found[1]) == 1 and not titled
            titled = titled or is_title
            name = " ".join(found[2].split())
            key, kept = _TITLE if is_title else f"{found[1]} {name.casefold()}", []
        kept.append(line)
    if "".join(kept).strip():
        yield CardPart(key, name, "\n".join(kept).strip("\n"))


def _outside_blocks(lines: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is outside of fenced code and comments."""
    fence, comment = "", False
    for line in lines:
        found = _FENCE.match(line)
        if fence:
            yield line, False
            if found is not None and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif comment:
            yield line, False
            comment = "-->" not in line
        elif found is not None and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
            yield line, False
        else:
            yield line, True
            comment = "<!--" in line and "-->" not in line.rpartition("<!--")[2]


def _unique(parts: Iterator[CardPart]) -> list[CardPart]:
    """The parts, with a number in the key of one that another has, too."""
    counts: Counter[str] = Counter()
    found = []
    for part in parts:
        counts[part.key] += 1
        n = counts[part.key]
        found.append(part if n == 1 else CardPart(f"{part.key}\0{n}", part.name, part.text))
    return found


def _marks(parts: Sequence[CardPart]) -> str:
    return f"<!-- {_COMMENT}{''.join(f' {_short(part.key)}:{part.digest}' for part in parts)} -->"


def _found_marks(card: str) -> dict[str, str] | None:
    """The hashes of parts as generated, by those of their keys; None for a card without marks. The last comment counts."""
    every = _MARKS.findall(card)
    return dict(pair.split(":") for pair in every[-1].split()) if every else None


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
