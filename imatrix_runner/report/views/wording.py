"""Formats the figures and times of the report."""

from __future__ import annotations

import math
import re

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.speed_figures import SpeedSetting, TokenRate, describe_rate
from imatrix_runner.report.document import ReportMix, ReportRounding
from imatrix_runner.safe_text import shown

_SMALL = 1e-4
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")


def one_line(text: str) -> str:
    """A text of several lines as one: every run of white space becomes a space."""
    return " ".join(text.split())


def kld(value: float) -> str:
    """At least three significant digits and four decimals: ``0.2620``, ``0.0181``, ``0.00613``."""
    return f"{value:.{_decimals(value)}f}" if _plain(value) else f"{value:.2e}"


def kld_error(estimate: Estimate) -> str:
    """``0.0181 ± 0.0002``."""
    if not _plain(estimate.value):
        return f"{estimate.value:.2e} ± {estimate.error:.1e}"
    return f"{kld(estimate.value)} ± {estimate.error:.{_decimals(estimate.value)}f}"


def figure(value: float) -> str:
    """A figure with four significant digits: ``7.324``, ``18.72``; from 1e5 with two: ``1.2e+05``."""
    if not math.isfinite(value) or abs(value) >= 1e5:
        return f"{value:.2g}"
    return f"{value:.{max(0, 3 - _exponent(value))}f}"


def error(estimate: Estimate) -> str:
    """An estimate's error with the decimals that :func:`figure` gives its value."""
    return f"{estimate.error:.{max(0, 3 - _exponent(estimate.value))}f}" if _plain(estimate.value) else f"{estimate.error:.2g}"


def rate(found: TokenRate) -> str:
    """Tokens per second with their standard error: ``23.4 ± 0.2``."""
    return describe_rate(found)


def speed_setting(setting: SpeedSetting) -> str:
    """What speeds hold for, as a sentence."""
    where = ", ".join(shown(name, 80) for name in (setting.processor, *setting.gpus) if name)
    before = f" with {setting.depth:,} tokens before" if setting.depth else ""
    how = (
        f"{many(setting.threads, 'thread')}, {shown(setting.options, 120)}"
        if setting.options
        else many(setting.threads, "thread")
    )
    return (
        f"Timed on {where} ({how}) as llama-bench does: a prompt of {setting.n_prompt} tokens, {setting.n_gen} tokens "
        f"generated{before}; ± is the standard error."
    )


def cost(value: float) -> str:
    """A KLD that may be very small: ``0.0036``, ``2.6e-06``."""
    return kld(value) if value >= _SMALL else f"{value:.1e}"


def share_of_stock(mix: ReportMix | ReportRounding) -> str:
    """A mix's KLD relative to the stock level's that it was chosen against: ``0.48 ± 0.07 of Q4_K_M``; a dash if unknown."""
    return f"{mix.ratio.value:.2f} ± {mix.ratio.error:.2f} of {shown(mix.stock)}" if mix.ratio is not None else "–"


def share_on_held_out(mix: ReportMix | ReportRounding) -> str:
    """The same on the held-out text, at the mix's size, and in the typical chunk; a dash if it was not compared there."""
    found = mix.held_out
    if found is None:
        return "–"
    return f"{found.figure} of {shown(found.against)}{_typically(found.typical.value if found.typical is not None else None)}"


def share_on_calibration(mix: ReportMix | ReportRounding) -> str:
    """:func:`share_of_stock`, and in the typical chunk: ``0.48 ± 0.07 of Q4_K_M, 0.60 in the typical chunk``."""
    return share_of_stock(mix) + _typically(mix.typical)


def _typically(ratio: float | None) -> str:
    return f", {ratio:.2f} in the typical chunk" if ratio is not None else ""


def types_of(mix: ReportMix) -> str:
    """How many tensors of a mix have each type: ``15 Q5_K, 9 IQ4_XS; 1 without imatrix``; a dash if unknown."""
    counts = sorted(mix.types.items(), key=lambda each: (-each[1], each[0]))
    without = f"{len(mix.unweighted):,} without imatrix" if mix.unweighted else ""
    return "; ".join(filter(None, (", ".join(f"{count} {shown(kind)}" for kind, count in counts), without))) or "–"


def moment(iso: str) -> str:
    """``2026-07-14T11:02:45+00:00`` -> ``2026-07-14 11:02 UTC``; other texts stay as they are."""
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
    """A count with a word for large ones: ``8.03 billion``, ``135 million``, ``71,680``."""
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
