"""``imatrix stats``: statistics of an imatrix, as tables, JSON or CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from imatrix_runner.imatrix.formats import MatrixFile
    from imatrix_runner.imatrix.statistics import ExpertStatistics, LayerStatistics, Statistics, TensorStatistics

    Item = TensorStatistics | LayerStatistics | ExpertStatistics


@dataclass(frozen=True)
class StatisticsColumn:
    """A figure in all its forms: ``key`` in JSON, CSV and ``--sort``; ``heading`` and ``form`` in the table."""

    key: str
    heading: str
    form: str
    value: Callable[[Any], int | float | str | None]
    meaning: str
    unit: str = ""

    def cell(self, item: Item) -> str:
        value = self.value(item)
        return "-" if value is None else format(value, self.form) + self.unit


_LAYER = StatisticsColumn("layer", "Layer", "", lambda item: item.layer, "number of the block; - outside the blocks.")
_TENSOR = StatisticsColumn("tensor", "Tensor", "", lambda item: item.tensor, "which weight of the layer.")

# Decimals are those of llama-imatrix --show-statistics.
_TENSOR_COLUMNS = (
    _LAYER,
    _TENSOR,
    StatisticsColumn(
        "sum", "Σ(Act²)", ".2f", lambda item: item.total, "mean squares of all inputs, added: the strength of the signal."
    ),
    StatisticsColumn("min", "Min", ".4f", lambda item: item.minimum, "mean square of the weakest input."),
    StatisticsColumn(
        "max", "Max", ".4f", lambda item: item.maximum, "mean square of the strongest; far above μ is an outlier channel."
    ),
    StatisticsColumn("mean", "μ", ".2f", lambda item: item.mean, "average over the inputs."),
    StatisticsColumn(
        "sigma", "σ", ".2f", lambda item: item.deviation, "standard deviation over the inputs; the more, the less even."
    ),
    StatisticsColumn(
        "active", "Active", ".2f", lambda item: item.active_percent, "inputs above 1e-5, in percent; the rest lie dormant.", "%"
    ),
    StatisticsColumn(
        "n", "N", "d", lambda item: item.elements, "inputs measured: columns, times the experts that saw a token."
    ),
    StatisticsColumn(
        "entropy", "Entropy", ".4f", lambda item: item.entropy, "how widely the signal spreads over the inputs, in bits."
    ),
    StatisticsColumn(
        "entropy_norm",
        "E(norm)",
        ".2f",
        lambda item: item.entropy_percent,
        "entropy in percent of its most; low: a few loud inputs dominate.",
        "%",
    ),
    StatisticsColumn("zd", "ZD", ".2f", lambda item: item.zd_percent, "inputs more than σ above μ, in percent.", "%"),
    StatisticsColumn(
        "cosine",
        "CosSim",
        ".4f",
        lambda item: item.cosine,
        "likeness to the same tensor one layer before; 0 where there is none.",
    ),
)
_LAYER_COLUMNS = (
    _LAYER,
    StatisticsColumn("tensors", "Tensors", "d", lambda item: item.tensors, "tensors with data."),
    StatisticsColumn("n", "N", "d", lambda item: item.elements, "inputs measured in all of them."),
    StatisticsColumn("sum", "μΣ(Act²)", ".2f", lambda item: item.total, "the tensors' Σ(Act²), averaged with N as weight."),
    StatisticsColumn("zd", "μZD", ".4f", lambda item: item.zd_percent, "their ZD, averaged likewise, in percent.", "%"),
    StatisticsColumn(
        "cosine",
        "μCosSim",
        ".4f",
        lambda item: item.cosine,
        "their CosSim, averaged likewise; low where the layer changes much.",
    ),
)
_EXPERT_COLUMNS = (
    _LAYER,
    _TENSOR,
    StatisticsColumn("experts", "Experts", "d", lambda item: item.experts, "experts in the tensor."),
    StatisticsColumn(
        "without_tokens",
        "Untouched",
        "d",
        lambda item: item.without_tokens,
        "experts no token reached, quantised as if all inputs mattered alike.",
    ),
    StatisticsColumn("fewest", "Fewest", "d", lambda item: item.fewest, "tokens of the expert with the fewest."),
    StatisticsColumn("median", "Median", ".10g", lambda item: item.median, "tokens of the expert in the middle."),
    StatisticsColumn("most", "Most", "d", lambda item: item.most, "tokens of the expert with the most."),
)

# Left out one by one, in this order, if the terminal is too narrow: the least informative first.
_DISPENSABLE = ("min", "entropy", "mean", "n", "max", "active", "sigma")


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    file: Path = argument(type=FILE)
    as_csv: bool = option("--csv", is_flag=True, help="Print the tensors' figures as CSV on stdout, with all digits.")
    sort: str = option(
        "--sort",
        type=click.Choice([column.key for column in _TENSOR_COLUMNS]),
        default="sum",
        show_default=True,
        help="Order of the tensors: layer and tensor ascending, figures from the largest.",
    )
    reverse: bool = option("--reverse", is_flag=True, help="Reverse that order.")
    layer: int | None = option("--layer", type=click.IntRange(min=0), metavar="N", help="Show this layer only.")
    talk: TalkOptions


@command(
    StatsOptions,
    examples=(
        "imatrix-runner imatrix stats imatrix.gguf --sort zd",
        "imatrix-runner imatrix stats imatrix.gguf --layer 12",
    ),
)
def stats(_invocation: Invocation, options: StatsOptions) -> int:
    """Show statistics of every tensor, layer and expert in the imatrix FILE (GGUF or legacy .dat).

    The figures are those of llama-imatrix --show-statistics, to the printed digit.
    """
    if options.as_csv and options.talk.as_json:
        raise UsageError("--csv and --json exclude each other", "each is a format of stdout", "Give one of them.")
    from imatrix_runner.imatrix.formats import read
    from imatrix_runner.imatrix.statistics import statistics

    source = read(options.file)
    found = statistics(source.matrix)
    if options.layer is not None:
        found = _only(found, options.layer)
    tensors = _sorted(found.tensors, options.sort, reverse=options.reverse)
    if options.talk.as_json:
        _print_json(source, found, tensors)
    elif options.as_csv:
        _print_csv(tensors)
    else:
        _print_tables(source, found, tensors, options.sort, explain=not options.talk.quiet)
    return 0


def _only(found: Statistics, layer: int) -> Statistics:
    from imatrix_runner.imatrix.statistics import Statistics, locate

    if not any(item.layer == layer for item in found.layers):
        known = [item.layer for item in found.layers]
        there = f"its layers with data are {min(known)} to {max(known)}" if known else "no layer has data"
        raise UsageError(f"This imatrix has no layer {layer}", there, "Give another number, or leave --layer out.")
    return Statistics(
        tuple(item for item in found.tensors if item.layer == layer),
        tuple(item for item in found.layers if item.layer == layer),
        tuple(item for item in found.experts if item.layer == layer),
        tuple(name for name in found.without_data if locate(name)[0] == layer),
    )


def _sorted(tensors: Sequence[TensorStatistics], key: str, *, reverse: bool) -> list[TensorStatistics]:
    """Sort figures from the largest, layers and names ascending, tensors outside the blocks last. Ties stay in layer order."""
    column = next(column for column in _TENSOR_COLUMNS if column.key == key)

    def rank(item: TensorStatistics) -> tuple[bool, Any]:
        value = column.value(item)
        if value is None:
            return True, 0
        return False, value if key in ("layer", "tensor") else -float(value)

    ordered = sorted(tensors, key=rank)
    return ordered[::-1] if reverse else ordered


def _record(item: Item, columns: Sequence[StatisticsColumn]) -> dict[str, Any]:
    return {column.key: column.value(item) for column in columns}


def _print_json(source: MatrixFile, found: Statistics, tensors: Sequence[TensorStatistics]) -> None:
    from imatrix_runner.cli.views.json_documents import document, print_document

    print_document(
        document(
            "imatrix-stats",
            exit_code=0,
            imatrix={
                "path": str(source.path),
                "format": source.format,
                "entries": len(source.matrix.entries),
                "chunks": source.matrix.chunk_count,
                "chunk_size": source.matrix.chunk_size,
                "datasets": list(source.matrix.datasets),
            },
            columns={column.key: column.meaning for column in _TENSOR_COLUMNS},
            tensors=[{"name": item.name, **_record(item, _TENSOR_COLUMNS)} for item in tensors],
            layers=[_record(item, _LAYER_COLUMNS) for item in found.layers],
            experts=[{"name": item.name, **_record(item, _EXPERT_COLUMNS)} for item in found.experts],
            without_data=list(found.without_data),
        )
    )


def _print_csv(tensors: Sequence[TensorStatistics]) -> None:
    import csv
    import sys

    # RFC 4180 wants \r\n; every tool reads \n, and stdout in text mode would make \r\r\n of it on Windows.
    writer = csv.DictWriter(sys.stdout, ["name", *(column.key for column in _TENSOR_COLUMNS)], lineterminator="\n")
    writer.writeheader()
    for item in tensors:
        writer.writerow({"name": item.name, **_record(item, _TENSOR_COLUMNS)})


def _print_tables(
    source: MatrixFile, found: Statistics, tensors: Sequence[TensorStatistics], sort: str, *, explain: bool
) -> None:
    from rich.text import Text

    from imatrix_runner.cli.views.console import stdout_console

    console = stdout_console()
    console.print(Text(f"{source.path}: {source.describe()}"))
    shown = _fitting(console, tensors, keep=sort)
    console.print(_table(f"Tensors, by {sort}", tensors, shown))
    if left_out := ", ".join(column.heading for column in _TENSOR_COLUMNS if column not in shown):
        console.print(Text(f"Too narrow a terminal to show {left_out}: use --csv or a wider one.", style="yellow"))
    _legend(console, shown, wanted=explain)
    if found.layers:
        console.print()
        console.print(_table("Layers", found.layers, _LAYER_COLUMNS))
        _legend(console, _LAYER_COLUMNS[3:], wanted=explain)
    if found.experts:
        console.print()
        console.print(_table("Experts, in tokens of the calibration text", found.experts, _EXPERT_COLUMNS))
        _legend(console, _EXPERT_COLUMNS[3:], wanted=explain)
    if found.without_data:
        console.print()
        console.print(Text(f"Without any data: {', '.join(found.without_data)}", style="yellow"))


def _fitting(console: Console, items: Sequence[Item], *, keep: str) -> list[StatisticsColumn]:
    """The tensors' columns that fit the console, always with ``keep``."""
    shown = list(_TENSOR_COLUMNS)
    unlimited = console.options.update(max_width=10_000)
    for key in _DISPENSABLE:
        if console.measure(_table("", items, shown), options=unlimited).maximum <= console.width:
            break
        shown = [column for column in shown if column.key != key or key == keep]
    return shown


def _table(title: str, items: Sequence[Item], columns: Sequence[StatisticsColumn]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.heading, justify="left" if column.key == "tensor" else "right", no_wrap=True)
    for item in items:
        lacking = getattr(item, "without_tokens", 0) > 0
        table.add_row(*(Text(column.cell(item)) for column in columns), style="yellow" if lacking else "")
    return table


def _legend(console: Console, columns: Sequence[StatisticsColumn], *, wanted: bool) -> None:
    from rich.text import Text

    if wanted:
        for column in columns:
            console.print(Text(f"  {column.heading:<9} {column.meaning}", style="dim"))
