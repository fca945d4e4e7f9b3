"""Detects scripts by letters, languages by passage, and code and data; compares domains by their words."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from imatrix_runner.calibration.shingles import units
from imatrix_runner.writing_systems import is_unspaced

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

CODE, SHORT, UNKNOWN = "code", "short", "unknown"
"""Results of :func:`language_of` that are not languages: code or data, too short to identify, and no language likely enough."""

LEAST_LETTERS = 60
"""Passages with fewer letters are not identified. A character of a script without spaces counts as three."""

_LEAST_CHARACTERS = 12

_LEAST_LIKELY, _LEAST_LIKELY_RARE = 0.5, 0.95

_LOOKED_AT = 2000

_NAMES = """af Afrikaans,am Amharic,ar Arabic,as Assamese,az Azerbaijani,be Belarusian,bg Bulgarian,bn Bengali,br Breton,
bs Bosnian,ca Catalan,cs Czech,cy Welsh,da Danish,de German,dz Dzongkha,el Greek,en English,eo Esperanto,es Spanish,
et Estonian,eu Basque,fa Persian,fi Finnish,fo Faroese,fr French,fy Frisian,ga Irish,gd Scottish Gaelic,gl Galician,
grc Ancient Greek,gu Gujarati,ha Hausa,he Hebrew,hi Hindi,hr Croatian,ht Haitian Creole,hu Hungarian,hy Armenian,
id Indonesian,ig Igbo,is Icelandic,it Italian,ja Japanese,jv Javanese,ka Georgian,kk Kazakh,km Khmer,kn Kannada,ko Korean,
ku Kurdish,ky Kyrgyz,la Latin,lb Luxembourgish,ln Lingala,lo Lao,lt Lithuanian,lv Latvian,mg Malagasy,mk Macedonian,
ml Malayalam,mn Mongolian,mr Marathi,ms Malay,mt Maltese,my Burmese,ne Nepali,nl Dutch,nn Norwegian Nynorsk,no Norwegian,
oc Occitan,or Odia,pa Punjabi,pl Polish,ps Pashto,pt Portuguese,qu Quechua,ro Romanian,ru Russian,rw Kinyarwanda,sa Sanskrit,
sd Sindhi,si Sinhala,sk Slovak,sl Slovenian,so Somali,sq Albanian,sr Serbian,sv Swedish,sw Swahili,ta Tamil,te Telugu,
tg Tajik,th Thai,tl Tagalog,tr Turkish,tt Tatar,ug Uyghur,uk Ukrainian,ur Urdu,uz Uzbek,vi Vietnamese,vo Volapük,wa Walloon,
xh Xhosa,yi Yiddish,yo Yoruba,yue Cantonese,zh Chinese,zu Zulu"""

_SPECIAL = {CODE: "code or data", SHORT: "too short to tell", UNKNOWN: "unknown"}

FENCE = re.compile(r"\s*(?:`{3,}[^`]*|~{3,}[^~]*)")
"""A line that begins or ends a fenced block."""

_SYMBOLS = frozenset("{};=<>()[]")

_LINE_STARTS = re.compile(
    r"""\s*(?:
    </?[a-zA-Z!?] | [{}\])]+,?;?\s*$ | \[[\w.\- "]+\]\s*$ | // | /\*\*? | \*/ | --\s | \#(?:!|include|define|if|endif)
    | @\w+[({] | \$\ \w | \\[a-z]+[{\[] | @@\s | \+\+\+\s | ---\s\w
    | \d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d | [A-Z][a-z]{2}\ \d\d\ \d\d:\d\d:\d\d
    | [\w.-]+(?:\[\d+\])?\s*[:?+]?=\s | [A-Z][A-Z0-9-]+[:;=][^\s:] | :?-{3,}:?\s*[|+]
    | (?:import|from|def|class|struct|enum|fn|func|let|const|var|val|package|using|namespace|public|private|static|return|if|for
        |while|else|elif|end|SELECT|FROM|WHERE|INSERT|CREATE|RUN|COPY|ENV|CMD)\b(?=.*[(){};:=\[\]"'./])(?!.*[a-z][.?!]\s*$)
    )""",
    re.VERBOSE,
)

_LINE_ENDS = (";", "{", "}", "},", "[", "],", ");", "/>", "*/", "\\")

_INDENTED_KEY = re.compile(
    r"""\s+(?:-\s+)?[\w"'.-]+\s*[:=](?:\s|$)|\s+-\s|\s+at\s[\w.$]+\(|\s+File\s"|\s+[a-z]{2,6}\s+%\w|\s+\w+:$"""
)

_LONG_LINE = 400


def looks_like_code(passage: str) -> bool:
    """Whether at least half of a passage is code or data: fenced blocks, JSON, and lines that look like a program, table or
    log.

    Measured on the shipped text when it had 232 KB (without fences, by bytes): 0.2 % of its prose, fiction, questions,
    dialogues and 30 languages are taken for code, and 12 % of its mathematics. Recognised are 94 % of its code (assembly and
    settings are missed), 85 % of its data (release notes and mail headers read like prose), and 37 % of transcripts of chats
    and tool calls, which are both.
    """
    bare = passage.strip()
    if bare[:1] in ("{", "[") and bare[-1:] in ("}", "]") and '":' in bare:
        return True
    fenced, code, total = False, 0, 0
    for line in passage.splitlines():
        if not line.strip():
            continue
        total += len(line)
        fence = bool(FENCE.fullmatch(line))
        if fenced or fence or _code_line(line):
            code += len(line)
        fenced ^= fence
    return total > 0 and 2 * code >= total


def _code_line(line: str) -> bool:
    solid = "".join(line.split())
    if len(solid) < 2:
        return not solid.isalpha()
    letters = sum(1 for each in solid if unicodedata.category(each)[0] in "LM") / len(solid)
    if len(line) > _LONG_LINE:
        return letters < 0.4
    symbols = sum(1 for each in solid if each in _SYMBOLS) / len(solid)
    fielded = line.count(",") >= 3 or line.count("|") >= 2 or line.count("\t") >= 2
    return (
        solid.endswith(_LINE_ENDS)
        or symbols >= 0.15
        or letters < 0.4
        or (fielded and letters < 0.75)
        or (line[0] in " \t" and (symbols >= 0.03 or bool(_INDENTED_KEY.match(line))))
        or bool(_LINE_STARTS.match(line))
    )


def language_of(passage: str) -> str:
    """An ISO 639 code, or :data:`CODE`, :data:`SHORT`, :data:`UNKNOWN`, by py3langid's model (loaded once, in 0.7 s).

    Measured on the 62 passages of the shipped text's languages: all 61 in 30 languages are identified correctly; cut to
    their first 60 letters, all but one, which is unknown. Rare languages need a higher probability than common ones, because
    lists of long words and foreign quotations would otherwise be taken for one.
    """
    head = passage[:_LOOKED_AT]
    if sum(map(str.isalnum, head)) < _LEAST_CHARACTERS:
        return SHORT
    if looks_like_code(head):
        return CODE
    if _letters(head) < LEAST_LETTERS:
        return SHORT
    code, likely = _identifier().classify(head)
    if code == "zxx":
        return CODE
    return str(code) if likely >= (_LEAST_LIKELY if code in _names() else _LEAST_LIKELY_RARE) else UNKNOWN


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_name(code: str) -> str:
    """The English name of a language; the code itself if it is not in the list."""
    return _SPECIAL.get(code) or _names().get(code, code)


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    entries = (entry.strip().partition(" ") for entry in _NAMES.split(","))
    return {code: name for code, _, name in entries}


def _letters(text: str) -> int:
    """Number of letters; a character of a script without spaces counts as three."""
    return sum(3 if is_unspaced(each) else 1 for each in text if each.isalpha())


@dataclass(frozen=True)
class ScriptShare:
    """One script: its ISO 15924 ``code`` and name, the number of its ``letters`` in the text, their ``share`` of all letters,
    and the number of ``distinct`` ones."""

    code: str
    name: str
    letters: int
    share: float
    distinct: int


def scripts(counts: npt.NDArray[np.int64]) -> tuple[ScriptShare, ...]:
    """The scripts of a text, the most used first. ``counts`` [0x110000]: number of occurrences of each character.

    Letters and combining marks count; characters common to all scripts (digits, punctuation) do not.
    """
    from fontTools import unicodedata as font_unicodedata

    found: dict[str, list[int]] = {}
    for number in np.flatnonzero(counts).tolist():
        character = chr(number)
        if unicodedata.category(character)[0] not in "LM":
            continue
        code = font_unicodedata.script(character)
        if code not in ("Zyyy", "Zinh", "Zzzz"):
            entry = found.setdefault(code, [0, 0])
            entry[0] += int(counts[number])
            entry[1] += 1
    total = sum(letters for letters, _ in found.values())
    shares = [
        ScriptShare(code, str(font_unicodedata.script_name(code)), letters, letters / total, distinct)
        for code, (letters, distinct) in found.items()
    ]
    return tuple(sorted(shares, key=lambda share: (-share.letters, share.code)))


_BUCKETS_LOG2 = 16

_MOST_DOMAINS = 64

_MOST_BYTES = 4 << 20

_BUFFER = 1 << 16

_SHOWN = 12

_LEAST_SHARE = 0.02


@dataclass(frozen=True)
class Domain:
    """A source or a labelled part: its bytes, and their ``share`` of the bytes of all domains."""

    name: str
    n_bytes: int
    share: float


@dataclass(frozen=True)
class Similarity:
    """Cosine of two domains' word frequencies: words in lower case, each counted as often as it occurs; stop words count too.

    1 for the same distribution of words. It separates languages, code from prose, and kinds of text better than subjects.
    """

    one: str
    other: str
    cosine: float


@dataclass
class _Words:
    n_bytes: int = 0
    taken: int = 0
    waiting: list[str] = field(default_factory=list)
    waiting_size: int = 0
    counts: npt.NDArray[np.int64] | None = None


@dataclass
class Domains:
    """Counts the words of each domain in bounded memory: in 65,536 buckets by hash, of the first 4 MiB of the first 64
    domains."""

    _found: dict[str, _Words] = field(default_factory=dict)

    def add(self, name: str, text: str, n_bytes: int) -> None:
        words = self._found.setdefault(name, _Words())
        words.n_bytes += n_bytes
        if words.taken < _MOST_BYTES and (words.counts is not None or len(self._found) <= _MOST_DOMAINS):
            words.taken += n_bytes
            words.waiting.append(text)
            words.waiting_size += len(text)
            if words.waiting_size > _BUFFER:
                _count(words)

    def shares(self) -> tuple[Domain, ...]:
        """The domains, in the order in which they first occur in the text."""
        total = sum(words.n_bytes for words in self._found.values())
        return tuple(Domain(name, words.n_bytes, words.n_bytes / total) for name, words in self._found.items())

    def similarities(self) -> tuple[Similarity, ...]:
        """All pairs of the 12 largest domains with a share of at least 2 %, the least similar first."""
        vectors = []
        large = [domain for domain in self.shares() if domain.share >= _LEAST_SHARE]
        for domain in sorted(large, key=lambda domain: -domain.n_bytes)[:_SHOWN]:
            words = self._found[domain.name]
            _count(words)
            if words.counts is not None and words.counts.any():
                vectors.append((domain.name, words.counts / np.linalg.norm(words.counts)))
        pairs = [
            Similarity(one, other, float(first @ second))
            for place, (one, first) in enumerate(vectors)
            for other, second in vectors[place + 1 :]
        ]
        return tuple(sorted(pairs, key=lambda pair: pair.cosine))


def _count(words: _Words) -> None:
    if words.waiting:
        hashes = units("\n".join(words.waiting)).hashes >> np.uint64(64 - _BUCKETS_LOG2)
        found = np.bincount(hashes.astype(np.int64), minlength=1 << _BUCKETS_LOG2).astype(np.int64)
        words.counts = found if words.counts is None else words.counts + found
        words.waiting, words.waiting_size = [], 0
