"""Prints compared files: what their headers say, how far each is from the source, and which to take at which size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from imatrix_runner.app.compare import ComparedFile, ComparePlan, CompareResult
from imatrix_runner.cli.views.columns import Column, fitted_table
from imatrix_runner.cli.views.failures import print_error
from imatrix_runner.cli.views.json_documents import document, error_content
from imatrix_runner.cli.views.report_table import print_files
from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.clone_recipe import CloneRecipe
from imatrix_runner.evaluate.equal_size import EQUAL_SIZE_RULE, EqualSizeVerdict, SizeChoice
from imatrix_runner.evaluate.other_files import OtherFile
from imatrix_runner.files import human_bytes
from imatrix_runner.report.views.wording import kld_error, percent
from imatrix_runner.safe_text import shown

_MOST_TYPES = 4


@dataclass(frozen=True)
class _Row:
    name: str
    n_bytes: int
    kld: Estimate
    same_top: float | None = None
    verdict: EqualSizeVerdict | None = None


_FILES: tuple[Column[OtherFile], ...] = (
    Column("File", lambda file: shown(file.place), left=True),
    Column("Size", lambda file: human_bytes(file.n_bytes)),
    Column("Bits/weight", lambda file: f"{file.bits_per_weight:.2f}", 2),
    Column("Types", lambda file: _types(file.types), left=True),
    Column("Imatrix", lambda file: _imatrix(file.imatrix), 1, left=True),
)

_MEASURED: tuple[Column[_Row], ...] = (
    Column("File", lambda row: shown(row.name), left=True),
    Column("Size", lambda row: human_bytes(row.n_bytes)),
    Column("Mean KLD", lambda row: kld_error(row.kld)),
    Column("Same top", lambda row: percent(row.same_top) if row.same_top is not None else None, 1),
    Column("Equal size", lambda row: row.verdict.ratio.figure if row.verdict is not None and row.verdict.ratio else None),
    Column("Verdict", lambda row: row.verdict.sentence if row.verdict is not None else "own level", left=True),
)

_CHOICES: tuple[Column[SizeChoice], ...] = (
    Column("From", lambda choice: human_bytes(choice.n_bytes)),
    Column("Take", lambda choice: shown(choice.name), left=True),
    Column("KLD", lambda choice: f"{choice.ratio.figure} of {shown(choice.over)}" if choice.ratio else None, left=True),
)


def print_plan(plan: ComparePlan, console: Console) -> None:
    """Print what the headers of the files say, and what will be measured."""
    if plan.files:
        console.print(fitted_table(_FILES, plan.files, console, title="Files"))
    extent = plan.held_out.extent
    fetch = sum(file.n_bytes for file in plan.files if not file.paths)
    text = f"Measured on {shown(plan.held_out.name)}: {extent.n_chunks} chunks of {extent.n_ctx}"
    own = f"; with {', '.join(plan.levels)} of this workspace" if plan.levels else "; the workspace has no levels"
    fetching = f" {human_bytes(fetch)} to fetch unless they were measured before." if fetch else ""
    console.print(Text(f"{text}{own}.{fetching}", style="dim"))


def print_compared(result: CompareResult, console: Console, *, quiet: bool = False) -> None:
    """Print the table of all files, the smallest first, which to take from which size on, and the errors in three lines each.
    ``quiet``: the errors only."""
    if result.compared and not quiet:
        rows = [_Row(each.level, each.n_bytes, each.kld) for each in result.own]
        rows += [_row(each) for each in result.compared]
        rows.sort(key=lambda row: row.n_bytes)
        console.print(
            fitted_table(
                _MEASURED,
                rows,
                console,
                title="Compared",
                style=lambda row: "green" if row.verdict is not None and row.verdict.outcome == "take it" else "",
            )
        )
        console.print(Text(EQUAL_SIZE_RULE, style="dim"))
        if result.choices:
            console.print(fitted_table(_CHOICES, result.choices, console, title="Which to take"))
        name = shown(result.plan.held_out.name)
        console.print(Text(f"Whether {name} also occurs in the calibration texts of others is not known.", style="dim"))
        if result.report is not None:
            print_files(result.report, console)
    for error in result.failed.values():
        print_error(error, console)


def _row(each: ComparedFile) -> _Row:
    return _Row(each.file.name, each.file.n_bytes, each.figures.kld, each.figures.same_top.value, each.verdict)


def _types(types: Mapping[str, int]) -> str:
    total = max(1, sum(types.values()))
    parts = [f"{name} {percent(count / total, 0)}" for name, count in list(types.items())[:_MOST_TYPES]]
    return ", ".join(parts) + (" …" if len(types) > _MOST_TYPES else "")


def _imatrix(imatrix: Mapping[str, str]) -> str | None:
    if not imatrix:
        return None
    data, chunks = imatrix.get("dataset", ""), imatrix.get("chunks_count", "")
    return shown(
        ", ".join(filter(None, (data.replace("\\", "/").rpartition("/")[2], f"{chunks} chunks" if chunks else ""))), 60
    )


def compare_document(result: CompareResult, exit_code: int) -> dict[str, Any]:
    """``compared``: each file with the figures of a level; ratios have ``value``, ``low`` and ``high``."""
    plan = result.plan
    return document(
        "compare",
        exit_code=exit_code,
        workspace=str(result.workspace.root),
        plan={
            "text": plan.held_out.name,
            "sha256": plan.held_out.sha256,
            "chunks": plan.held_out.extent.n_chunks,
            "context": plan.held_out.extent.n_ctx,
            "files": [_file(file) for file in plan.files],
            "levels": list(plan.levels),
        },
        compared=[
            {
                **_file(each.file),
                "equal_tensors": each.plain,
                "figures": msgspec.to_builtins(each.figures, str_keys=True),
                "verdict": msgspec.to_builtins(each.verdict),
            }
            for each in result.compared
        ],
        own=[{"level": each.level, "bytes": each.n_bytes, "kld": msgspec.to_builtins(each.kld)} for each in result.own],
        choices=[msgspec.to_builtins(choice) for choice in result.choices],
        failed={place: error_content(error) for place, error in result.failed.items()},
        seconds=round(result.seconds, 3),
    )


def _file(file: OtherFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "place": file.place,
        "bytes": file.n_bytes,
        "bits_per_weight": file.bits_per_weight,
        "types": dict(file.types),
        "imatrix": dict(file.imatrix),
        "quantized_by": file.quantized_by or None,
    }


def print_clone(recipe: CloneRecipe, model: str, out: Path | None, console: Console) -> None:
    """Print the tensor types; where they were written, the command that makes the file."""
    if out is None:
        console.print(recipe.as_tensor_types, end="", markup=False, highlight=False, soft_wrap=True)
        return
    console.print(
        Text(f"Make it with: imatrix-runner quantize {model} --levels {recipe.level} --tensor-type-file {out}"), soft_wrap=True
    )


def clone_document(recipe: CloneRecipe, out: Path | None) -> dict[str, Any]:
    return document(
        "clone",
        exit_code=0,
        place=recipe.place,
        level=recipe.level,
        types=dict(recipe.types),
        path=str(out) if out is not None else None,
    )
