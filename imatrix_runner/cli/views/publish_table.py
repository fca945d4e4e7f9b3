"""Shows what was published, or would be, and the document of it for ``--json``."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from imatrix_runner.app.publish import PlannedFile, PublishResult
from imatrix_runner.cli.views.columns import Column, fitted_table
from imatrix_runner.cli.views.json_documents import document, publish_content
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.publish.publisher import FileResult
from imatrix_runner.safe_text import shown

_WORDS = {
    "there": "is there",
    "missing": "to upload",
    "replace": "to replace",
    "in-the-way": "refused: another file of this name",
    "uploaded": "uploaded",
    "failed": "failed",
}
_STYLES = {"there": "dim", "in-the-way": "red", "failed": "red", "uploaded": "green"}

_File = PlannedFile | FileResult


def _state(file: _File) -> str:
    return file.state if isinstance(file, PlannedFile) else file.status


def print_published(result: PublishResult, console: Console) -> None:
    """Print every file with its size and what became of it, and the address."""
    files: tuple[_File, ...] = result.planned or result.files
    columns: list[Column[_File]] = [
        Column("File", lambda file: shown(file.name), left=True),
        Column("Level", lambda file: file.level or None, rank=1, left=True),
        Column("Size", lambda file: human_bytes(file.n_bytes)),
        Column("On the hub", lambda file: _WORDS[_state(file)], left=True),
    ]
    title = f"Would be published to {result.repo}" if result.planned else f"Published to {result.repo}"
    console.print(fitted_table(columns, files, console, title=title, style=lambda file: _STYLES.get(_state(file), "")))
    console.print(Text(_summary(result)))
    if result.collection:
        console.print(Text(f"In the collection {shown(result.collection)}."))
    console.print(Text(result.url))


def _summary(result: PublishResult) -> str:
    if result.planned:
        todo = [file for file in result.planned if file.state in ("missing", "replace")]
        there = sum(file.state == "there" for file in result.planned)
        return f"{len(todo)} files to upload ({human_bytes(sum(file.n_bytes for file in todo))}), {there} there already."
    new = [file for file in result.files if file.status == "uploaded"]
    there = len(result.files) - len(new)
    took = f"{human_bytes(result.n_bytes)} in {human_seconds(result.seconds)}"
    return f"{len(new)} files uploaded ({took}), {there} there already; all checksums verified on the hub."


def publish_document(result: PublishResult, exit_code: int) -> dict[str, Any]:
    """The content of ``--json``."""
    return document("publish", exit_code=exit_code, **publish_content(result))
