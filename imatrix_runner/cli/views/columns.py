"""Tables for a terminal of any width: if it is too narrow, the least important columns are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column. ``cell`` returns None for an empty cell; a column of empty cells is not shown. If the terminal is too narrow,
    columns with a ``rank`` are left out, the highest first."""

    heading: str
    cell: Callable[[T], str | Text | None]
    rank: int = 0
    left: bool = False


def fitted_table(
    columns: Sequence[Column[T]],
    rows: Sequence[T],
    console: Console,
    *,
    title: str | None = None,
    style: Callable[[T], str] = lambda _: "",
) -> Table:
    """A table of the columns that are not empty and fit the console. Only the last column wraps; ``style``: of a row."""
    shown = [column for column in columns if any(column.cell(row) is not None for row in rows)]
    wide = console.options.update(max_width=10_000)
    while True:
        table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
        for column in shown:
            table.add_column(column.heading, justify="left" if column.left else "right", no_wrap=column is not columns[-1])
        for row in rows:
            table.add_row(*(_text(column.cell(row)) for column in shown), style=style(row))
        droppable = [column for column in shown if column.rank]
        if not droppable or console.measure(table, options=wide).maximum <= console.width:
            return table
        shown.remove(max(droppable, key=lambda column: column.rank))


def _text(cell: str | Text | None) -> Text:
    """The cell as a Text: rich would parse brackets in a plain string as markup."""
    return cell if isinstance(cell, Text) else Text(cell if cell is not None else "-")


def by_remark(remarks: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The joined names of the levels by remark, in order, so that each remark is printed once."""
    names: dict[str, list[str]] = {}
    for name, remark in remarks:
        names.setdefault(remark, []).append(name)
    return {remark: ", ".join(each) for remark, each in names.items()}
