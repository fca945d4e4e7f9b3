"""How the report writes figures and strangers' names."""

from __future__ import annotations

import math
import re
import unicodedata

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.models.bounded import printable

_NAME = 200
_TEXT = 20_000
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn the direction of what follows, beyond the end of their own text."""


def shown(text: str, limit: int = _NAME) -> str:
    """A stranger's name or line: one line of bounded length, without control characters."""
    return printable(text[:limit]) + ("…" if len(text) > limit else "")


def one_line(text: str) -> str:
    """A text of several lines as one: every run of white space becomes a space."""
    return " ".join(text.split())


def shown_text(text: str, limit: int = _TEXT) -> str:
    """A stranger's text of several lines, of bounded length. Joiners stay, which many scripts and emoji need."""
    cut = text[:limit].replace("\r\n", "\n")
    kept = (
        character
        if character in "\n\t" or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _TURNING)
        else "\ufffd"
        for character in cut
    )
    return "".join(kept) + ("…" if len(text) > limit else "")


def kld(value: float) -> str:
    """Three digits at least and four decimals at least: ``0.2620``, ``0.0181``, ``0.00613``."""
    return f"{value:.{_decimals(value)}f}" if _plain(value) else f"{value:.2e}"


def kld_error(estimate: Estimate) -> str:
    """``0.0181 ± 0.0002``."""
    if not _plain(estimate.value):
        return f"{estimate.value:.2e} ± {estimate.error:.1e}"
    return f"{kld(estimate.value)} ± {estimate.error:.{_decimals(estimate.value)}f}"


def figure(value: float) -> str:
    """Four digits: ``7.324``, ``18.72``, ``1.2e+05``."""
    if not math.isfinite(value) or abs(value) >= 1e5:
        return f"{value:.2g}"
    return f"{value:.{max(0, 3 - _exponent(value))}f}"


def error(estimate: Estimate) -> str:
    """An estimate's error with the decimals that :func:`figure` gives its value."""
    return f"{estimate.error:.{max(0, 3 - _exponent(estimate.value))}f}" if _plain(estimate.value) else f"{estimate.error:.2g}"


def moment(iso: str) -> str:
    """``2026-07-14T11:02:45+00:00`` -> ``2026-07-14 11:02 UTC``; another text as it is."""
    return f"{iso[:10]} {iso[11:16]} UTC" if _UTC.fullmatch(iso) else shown(iso)


def percent(share: float, decimals: int = 1) -> str:
    """``0.926`` -> ``92.6 %``."""
    return f"{_signed(100 * share, decimals).removeprefix('+')} %"


def points(share: float, decimals: int = 2) -> str:
    """A difference of shares in percentage points, signed: ``+0.42``."""
    return _signed(100 * share, decimals)


def difference(estimate: Estimate) -> str:
    """A difference and its error, both with the decimals of the error's two digits, four at most: ``−0.090 ± 0.016``."""
    decimals = min(4, max(0, 1 - _exponent(estimate.error))) if estimate.error else 4
    return f"{_signed(estimate.value, decimals)} ± {estimate.error:.{decimals}f}"


def signed(value: float) -> str:
    """A difference, signed, with as many decimals as it needs for two digits: ``-0.0013``."""
    return _signed(value, max(2, 1 - _exponent(value)))


def count(number: float) -> str:
    """Large counts as people say them: ``8.03 billion``, ``135 million``, ``71,680``."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def many(number: int, one: str, more: str = "") -> str:
    """``1 chunk``, ``140 chunks``."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0


def _decimals(value: float) -> int:
    return max(4, 2 - _exponent(value))


def _plain(value: float) -> bool:
    return math.isfinite(value) and (value == 0 or 1e-6 <= abs(value) < 1e5)


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+.{decimals}f}"
    return f"{0:.{decimals}f}" if float(text) == 0 else text.replace("-", "−")
