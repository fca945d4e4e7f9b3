"""``--show-config``: prints every setting of a command, its value and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from imatrix_runner.cli.settings import FileSettings, Setting

_ORIGINS = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.DEFAULT: "default",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.PROMPT: "prompt",
}


def print_settings(ctx: click.Context) -> None:
    """Print a line for each setting of the command, or with ``--json`` one document."""
    rows = list(_rows(ctx))
    if ctx.params.get("as_json"):
        from imatrix_runner.cli.views.json_documents import document, print_document

        settings = [{"name": name, "value": value, "from": origin} for name, value, origin in rows]
        print_document(document("config", exit_code=0, settings=settings))
        return
    from rich.table import Table

    from imatrix_runner.cli.views.console import stdout_console

    table = Table("Setting", "Value", "From", box=None, pad_edge=False, header_style="bold")
    for name, value, origin in rows:
        table.add_row(name, _shown(value), origin)
    stdout_console().print(table)


def _rows(ctx: click.Context) -> Iterator[tuple[str, Any, str]]:
    """Name, value and origin of every setting."""
    settings: FileSettings = ctx.find_root().meta["imatrix_runner.settings"]
    for option in ctx.command.params:
        if not isinstance(option, Setting) or option.name is None:
            continue
        source = ctx.get_parameter_source(option.name) or ParameterSource.DEFAULT
        origin = _ORIGINS.get(source, "default")
        if source is ParameterSource.DEFAULT_MAP:
            origin = str(settings.path)
        elif source is ParameterSource.ENVIRONMENT:
            origin = f"environment {option.envvar}"
        value = ctx.params.get(option.name)
        yield option.name.replace("_", "-"), str(value) if isinstance(value, Path) else value, origin


def _shown(value: Any) -> str:
    if value is None or value in ("", ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
