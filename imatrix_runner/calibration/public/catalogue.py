"""Catalogue of public calibration texts: location, licence as far as known, and purpose of each.

None of them is shipped; they are downloaded on request. The facts come from the sets' own cards and from public scripts that
fetch them; sizes are of 2024 to 2026 and may have changed since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from imatrix_runner.errors import UsageError

NOT_STATED = "not stated"

Rows = Literal["documents", "lines"]
"""Meaning of a table's rows: each a document, or each a line of one long text."""

_TEXT_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,120}", re.ASCII)
_MOST_LISTED = 30


@dataclass(frozen=True)
class SetText:
    """One text of a set. ``path``: its path at the source; ``file``: its name in the cache; ``n_bytes``: approximate size."""

    name: str
    path: str
    file: str
    n_bytes: int | None = None


@dataclass(frozen=True)
class WebSource:
    """Plain files at the address ``base``/``path``."""

    base: str


@dataclass(frozen=True)
class HubSource:
    """A data set's repository on the hub. ``suffixes``: of the files that are texts; ``rows``: how tables become text."""

    repo: str
    suffixes: tuple[str, ...] = (".txt",)
    rows: Rows = "documents"


@dataclass(frozen=True)
class CalibrationSet:
    """A set of one or more texts. ``texts``: the known ones; an ``open`` set may have others, which its source lists."""

    name: str
    source: WebSource | HubSource
    texts: tuple[SetText, ...]
    licence: str
    good_for: str
    size: str
    open: bool = False

    @property
    def kind(self) -> str:
        return "web" if isinstance(self.source, WebSource) else "hub"

    @property
    def origin(self) -> str:
        """The address of its web page."""
        if isinstance(self.source, HubSource):
            return f"https://huggingface.co/datasets/{self.source.repo}"
        return _PAGES.get(self.name, self.source.base)

    def named(self, text: str) -> str:
        """The argument that names one of its texts on the command line."""
        return self.name if len(self.texts) == 1 and not self.open else f"{self.name}:{text}"


@dataclass(frozen=True)
class WantedSet:
    """A set and the name of one of its texts; empty if none was given."""

    set: CalibrationSet
    text: str = ""

    def __str__(self) -> str:
        return self.set.named(self.text) if self.text else self.set.name


_GIST = "https://gist.githubusercontent.com/bartowski1182"
_PAGES = {
    "bartowski-v3": "https://gist.github.com/bartowski1182/eb213dccb3571f863da82e99418f81e8",
    "bartowski-v5": "https://gist.github.com/bartowski1182/82ae9b520227f57d79ba04add13d0d0d",
    "exllamav3": "https://github.com/turboderp-org/exllamav3/tree/master/exllamav3/conversion/standard_cal_data",
}


def _plain(file: str, n_bytes: int | None = None) -> SetText:
    """A text that keeps its file name in the cache."""
    return SetText(file.rpartition(".")[0], file, file, n_bytes)


def _table(name: str) -> SetText:
    """A text that is converted from a Parquet file."""
    return SetText(name, f"{name}.parquet", f"{name}.txt")


def _wikitext(split: str, file: str, n_bytes: int) -> SetText:
    return SetText(split, f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet", file, n_bytes)


SETS = (
    CalibrationSet(
        "bartowski-v3",
        WebSource(f"{_GIST}/eb213dccb3571f863da82e99418f81e8/raw"),
        (_plain("calibration_datav3.txt", 273_000),),
        NOT_STATED,
        "a general mix by bartowski, kalomaze and Dampf; most published matrices of 2024 and 2025 were made with it",
        "273 KB, 125 to 137 chunks of 512 tokens",
    ),
    CalibrationSet(
        "bartowski-v5",
        WebSource(f"{_GIST}/82ae9b520227f57d79ba04add13d0d0d/raw"),
        (_plain("calibration_datav5.txt", 1_700_000),),
        NOT_STATED,
        "its larger successor; newer published matrices name it",
        "1.7 MB, about 800 chunks of 512 tokens",
    ),
    CalibrationSet(
        "groups-merged",
        # kalomaze first published it in a llama.cpp discussion (#5263); this is the copy that scripts fetch.
        HubSource("froggeric/imatrix"),
        (_plain("groups_merged.txt", 200_000),),
        NOT_STATED,
        "a short general mix with code, by kalomaze; many matrices of 2024 were made with it",
        "200 KB, about 30,000 tokens",
    ),
    CalibrationSet(
        "froggeric",
        # technical.txt is the one that users name; the hub lists the others.
        HubSource("froggeric/imatrix", (".txt", ".raw", ".utf8")),
        (_plain("technical.txt"),),
        NOT_STATED,
        "one text per subject (technical, code, multilingual, wiki, …), to be mixed by weight",
        "several texts",
        open=True,
    ),
    CalibrationSet(
        "eaddario",
        HubSource("eaddario/imatrix-calibration", (".parquet",)),
        tuple(
            _table(f"{topic}_{size}")
            for topic in ("text_all", "text_en", "code", "math", "tools", "combined_all", "combined_en", "combined_math_code")
            for size in ("micro", "tiny", "small", "medium", "large")
        ),
        "MIT (the set; its rows come from FineWeb, Common Crawl and others)",
        "prompts by topic (text in 18 languages, code, math, tools, combined) and size; choose micro, tiny or small",
        "125,000 to 14.5 million tokens each",
        open=True,
    ),
    CalibrationSet(
        "exllamav3",
        # The sizes are those of the same files in exllamav2's packages of 2024.
        WebSource("https://raw.githubusercontent.com/turboderp-org/exllamav3/master/exllamav3/conversion/standard_cal_data"),
        (
            _plain("c4.utf8", 332_173),
            _plain("code.utf8", 248_834),
            _plain("multilingual.utf8", 222_555),
            _plain("technical.utf8", 196_701),
            _plain("tiny.utf8", 261_693),
            _plain("wiki.utf8", 2_093_275),
        ),
        "MIT (the repository; the texts belong to third parties, code.utf8 has its own notices)",
        "ExLlama's standard texts, one per subject, to be mixed by weight",
        "197 KB to 2.1 MB each",
    ),
    CalibrationSet(
        "wikitext-2",
        HubSource("Salesforce/wikitext", (".parquet",), "lines"),
        (
            _wikitext("train", "wiki.train.raw", 10_900_000),
            _wikitext("validation", "wiki.valid.raw", 1_140_000),
            _wikitext("test", "wiki.test.raw", 1_290_000),
        ),
        "CC BY-SA 3.0 and GFDL",
        "encyclopaedic English; perplexities are compared on test, so calibrate on train only",
        "1.3 MB (test), 10.9 MB (train)",
    ),
)


def set_names() -> tuple[str, ...]:
    """The names of the sets on the command line; ``NAME:TEXT`` is one of their texts."""
    return tuple(each.name for each in SETS)


def find_set(name: str) -> WantedSet:
    """The set, and the text if one is given, that ``NAME[:TEXT]`` names. Raises :class:`UsageError`."""
    first, colon, text = name.partition(":")
    for each in SETS:
        if each.name == first:
            if colon and not _TEXT_NAME.fullmatch(text):
                raise _unknown_text(WantedSet(each), text, [known.name for known in each.texts])
            return WantedSet(each, text)
    near = get_close_matches(first.lower(), set_names(), n=1, cutoff=0.5)
    raise UsageError(
        f"No calibration set {name!r} found",
        f"did you mean {near[0]}?" if near else f"the sets are {', '.join(set_names())}",
        "List them with: imatrix-runner calibration list",
    )


def choose_text(wanted: WantedSet, texts: tuple[SetText, ...]) -> SetText:
    """The wanted text out of ``texts``. Raises :class:`UsageError` if it does not exist or the choice is ambiguous."""
    if not wanted.text and len(texts) == 1 and not wanted.set.open:
        return texts[0]
    for text in texts:
        if wanted.text and wanted.text in (text.name, text.file, text.path):
            return text
    names = [text.name for text in texts]
    if wanted.text:
        raise _unknown_text(wanted, wanted.text, names)
    raise UsageError(
        f"{wanted.set.name} has several texts", _listing(names), f"Name one of them, for example: {wanted.set.named(names[0])}"
    )


def listed_texts(chosen: CalibrationSet, names: list[tuple[str, int | None]]) -> tuple[SetText, ...]:
    """The texts of an open set among its repository's files. ``names``: names and sizes as the hub lists them."""
    assert isinstance(chosen.source, HubSource)
    found = []
    for name, size in names:
        suffix = next((suffix for suffix in chosen.source.suffixes if name.lower().endswith(suffix)), None)
        if suffix is None or not _TEXT_NAME.fullmatch(name) or name.lower().startswith(("readme", "licen", "requirements")):
            continue
        # Two files may differ in their suffix alone, so only the usual one is left out of a name.
        short = name[: -len(suffix)] if suffix == chosen.source.suffixes[0] else name
        is_table = suffix == ".parquet"
        found.append(SetText(short, name, f"{short}.txt" if is_table else name, None if is_table else size))
    return tuple(found)


def _unknown_text(wanted: WantedSet, text: str, names: list[str]) -> UsageError:
    near = get_close_matches(text, names, n=1, cutoff=0.5)
    example = f", for example: {wanted.set.named((near or names)[0])}" if names else ""
    return UsageError(f"{wanted.set.name} has no text {text!r}", f"it has {_listing(names)}", f"Name one that it has{example}")


def _listing(names: list[str]) -> str:
    more = len(names) - _MOST_LISTED
    return (", ".join(names[:_MOST_LISTED]) or "none") + (f" and {more} more" if more > 0 else "")
