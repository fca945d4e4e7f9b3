"""The report's table of levels: each column's cells, as text and as a value to sort by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from imatrix_runner import safe_text
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.report.document import ReportLevel
from imatrix_runner.report.views import wording

_TAIL: Final = 0.99


@dataclass(frozen=True)
class Cell:
    """A cell. ``value``: the number or text to sort by; empty sorts last."""

    text: str
    value: str = ""


@dataclass(frozen=True)
class ReportColumn:
    """A column of numbers or texts, with its heading and what it means. ``wraps``: its cells may have several lines."""

    key: str
    heading: str
    meaning: str
    cell: Callable[[ReportLevel], Cell | None]
    numeric: bool = True
    wraps: bool = False


@dataclass(frozen=True)
class ReportTable:
    """The columns that are not empty; ``rows``: each level with its cells, in the columns' order."""

    columns: tuple[ReportColumn, ...]
    rows: tuple[tuple[ReportLevel, tuple[Cell, ...]], ...]


def _number(text: str, value: float) -> Cell:
    return Cell(text, repr(float(value)))


def _measured(cell: Callable[[Divergence], Cell | None]) -> Callable[[ReportLevel], Cell | None]:
    return lambda level: cell(level.measured) if level.measured is not None else None


def _bits(level: ReportLevel) -> Cell | None:
    bits = level.bits_per_weight
    return _number(f"{bits:.2f}", bits) if bits is not None else None


def _tail(found: Divergence) -> Cell | None:
    value = found.kld_at.get(_TAIL)
    return _number(wording.kld(value), value) if value is not None else None


def _ratio(level: ReportLevel) -> Cell | None:
    ratio = level.ppl_ratio
    return _number(f"{ratio.value:.4f} ± {ratio.error:.4f}", ratio.value) if ratio is not None else None


def _of_stock(level: ReportLevel) -> Cell | None:
    compared = level.against
    if compared is None or compared.ratio is None:
        return None
    return _number(wording.share_of_stock(compared), compared.ratio.value)


def _fallbacks(level: ReportLevel) -> Cell | None:
    if not level.fallbacks:
        return None
    return _number(f"{level.fallbacks} ({wording.percent(level.fallback_share)})", level.fallbacks)


LEVEL_COLUMNS: Final = (
    ReportColumn(
        "level",
        "Level",
        "llama.cpp's name of the mixture; of a mix, its bits per weight and the level that programs take it for.",
        lambda level: Cell(safe_text.shown(level.label), level.name),
        False,
    ),
    ReportColumn("size", "Size", "all files of the level.", lambda level: _number(human_bytes(level.n_bytes), level.n_bytes)),
    ReportColumn("bits", "Bits/weight", "of the file, averaged over all weights.", _bits),
    ReportColumn(
        "kld",
        "Mean KLD",
        "how far the level's predictions are from the source's, in nats per token, ± its standard error; 0 is the same.",
        _measured(lambda found: _number(wording.kld_error(found.kld), found.kld.value)),
    ),
    ReportColumn(
        "kld99",
        "99 % KLD",
        "99 % of the tokens have a KLD of at most this: how bad the worst tokens are.",
        _measured(_tail),
    ),
    ReportColumn(
        "ppl",
        "PPL",
        "perplexity on the text: how many tokens the level hesitates between. It depends on the text: compare the ratio.",
        _measured(lambda found: _number(wording.figure(found.ppl.value), found.ppl.value)),
    ),
    ReportColumn(
        "ratio",
        "PPL ratio",
        "that perplexity, divided by the source's own, computed exactly. llama-perplexity divides by one read from its file of "
        "logits, which keeps no probability below e^-16: the source looks better there, and every level worse. A ratio below 1 "
        "is chance or a bias, not an improvement; the KLD tells levels apart.",
        _ratio,
    ),
    ReportColumn(
        "same",
        "Same top",
        "share of the tokens for which level and source rank the same token first.",
        _measured(lambda found: _number(wording.percent(found.same_top.value, 2), found.same_top.value)),
    ),
    ReportColumn(
        "dp",
        "Δp RMS",
        "how much the probability of the right token changes, root mean square.",
        _measured(lambda found: _number(wording.percent(found.dp_rms.value, 2), found.dp_rms.value)),
    ),
    ReportColumn(
        "stock",
        "To stock",
        "the KLD of a mix, or of other numbers, relative to that of the stock level it was compared with before it was made, ± "
        "standard error, on the calibration text.",
        _of_stock,
        wraps=True,
    ),
    ReportColumn(
        "generation",
        "Tokens/s",
        "tokens generated per second on the machine named below the table, ± standard error.",
        lambda level: _number(wording.rate(level.speed.generation), level.speed.generation.mean) if level.speed else None,
    ),
    ReportColumn(
        "prompt",
        "Prompt tokens/s",
        "tokens of a prompt read per second there.",
        lambda level: _number(wording.rate(level.speed.prompt), level.speed.prompt.mean) if level.speed else None,
    ),
    ReportColumn(
        "memory",
        "Memory",
        "what llama.cpp allocates there: weights, the context of the longer test, and room to compute.",
        lambda level: _number(human_bytes(level.speed.n_bytes), level.speed.n_bytes) if level.speed else None,
    ),
    ReportColumn(
        "fallbacks", "Fallbacks", "tensors that got another type than the level's, and their share of the weights.", _fallbacks
    ),
    ReportColumn(
        "time",
        "Time",
        "of making it; for levels made in one pass over the model, their share of its time by what they computed.",
        lambda level: _number(human_seconds(level.own_seconds), level.own_seconds) if level.seconds else None,
    ),
)


def level_table(levels: Sequence[ReportLevel]) -> ReportTable:
    """The table of all levels, in their order, without empty columns."""
    rows = [(level, [column.cell(level) for column in LEVEL_COLUMNS]) for level in levels]
    used = [at for at in range(len(LEVEL_COLUMNS)) if any(cells[at] is not None for _, cells in rows)]
    return ReportTable(
        tuple(LEVEL_COLUMNS[at] for at in used),
        tuple((level, tuple(cells[at] or Cell("–") for at in used)) for level, cells in rows),
    )
