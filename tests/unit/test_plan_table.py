"""The plan on a terminal: columns that fit its width, and no sentence twice."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from imatrix_runner.cli.views.columns import Column, by_remark, fitted_table
from imatrix_runner.cli.views.plan_table import print_plan
from imatrix_runner.engines.jobs import Fallback
from imatrix_runner.engines.levels import Level
from imatrix_runner.imatrix.step import ImatrixStep
from imatrix_runner.quantize.level_facts import LevelFacts
from imatrix_runner.quantize.plan import LevelStep, Plan, State

FALLBACKS = tuple(Fallback(f"blk.{layer}.ffn_down.weight", "q4_K", "q5_0") for layer in range(3))


def _step(name: str, state: State, reason: str = "") -> LevelStep:
    facts = LevelFacts(123 << 20, 4.5, True, FALLBACKS if state == "todo" else (), 0.25, ())
    return LevelStep(Level(name, name), state, reason, (Path(f"m-{name}.gguf"),), {}, facts)


def _printed(width: int) -> str:
    steps = (
        _step("IQ3_XXS", "todo"),
        _step("Q4_K_M", "todo"),
        _step("Q8_0", "up-to-date"),
        _step("IQ2_XXS", "fails", "it needs data"),
        _step("IQ1_S", "fails", "it needs data"),
    )
    plan = Plan(Path("work/m"), "m", ImatrixStep("none", None, "not wanted"), steps, 1 << 40)
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    return stream.getvalue()


@pytest.mark.parametrize("width", [32, 40, 50, 60, 80, 120])
def test_the_state_of_every_level_is_whole_at_any_width(width: int) -> None:
    rows = {line.split()[0]: line for line in _printed(width).splitlines() if line.strip()}
    assert rows["IQ3_XXS"].rstrip().endswith("to do")
    assert rows["Q8_0"].rstrip().endswith("up to date")
    assert "123.00 MiB" in rows["Q8_0"]


def test_a_wide_terminal_shows_every_column() -> None:
    heading = next(line for line in _printed(120).splitlines() if line.startswith("Level"))
    assert heading.split() == ["Level", "Size", "Bits/weight", "Imatrix", "Fallback", "State"]


def test_levels_that_share_a_remark_share_its_line() -> None:
    text = _printed(200)
    assert "IQ2_XXS, IQ1_S will fail: it needs data\n" in text
    assert text.count("because their rows do not divide into blocks") == 1
    assert "IQ3_XXS, Q4_K_M: 3 tensors (25.0% of the weights) get another type" in text


def test_remarks_keep_their_order() -> None:
    assert by_remark([("a", "x"), ("b", "y"), ("c", "x")]) == {"x": "a, c", "y": "b"}


def test_a_cell_with_brackets_is_no_markup() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(fitted_table((Column("Name", str),), ["[red]x[/red]"], console))
    assert "[red]x[/red]" in stream.getvalue()
