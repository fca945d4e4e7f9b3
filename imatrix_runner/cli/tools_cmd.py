"""``tools``: llama.cpp's programs, found, built or installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.options import output_options
from imatrix_runner.cli.render import listening
from imatrix_runner.cli.settings import SettingsCommand, setting

if TYPE_CHECKING:
    from imatrix_runner.toolchain.probe import Rejection, Toolchain

_BACKENDS = ("cpu", "cuda", "vulkan", "metal", "hip")
_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.group()
def tools() -> None:
    """llama.cpp's programs: locate, build, install. They convert Hugging Face models and serve --engine binaries."""


@tools.command(cls=SettingsCommand)
@setting("--llama-cpp", type=_DIRECTORY, metavar="DIR", help="Look in this directory only.")
@output_options
def locate(llama_cpp: Path | None, as_json: bool, **_options: Any) -> int:
    """Show which programs are used, what they can do, and why others were turned down."""
    import os

    from imatrix_runner.toolchain.locate import locate as find
    from imatrix_runner.toolchain.locate import require
    from imatrix_runner.toolchain.store import cache_dir

    found = find(llama_cpp, env=os.environ, cache=cache_dir())
    toolchain = require(found)
    _show(toolchain, found.rejected, as_json=as_json)
    return 0


@tools.command(cls=SettingsCommand)
@setting("--backend", type=click.Choice(_BACKENDS), default="cpu", show_default=True, help="What shall compute.")
@click.option("--source", type=_DIRECTORY, metavar="DIR", help="Build this llama.cpp checkout (it is not written to).")
@click.option("--ref", metavar="TAG", help="Build this tag of llama.cpp, fetched with git.")
@click.option("--version", "version", metavar="X.Y.Z", help="Build the llama.cpp inside this version of llama-cpp-python.")
@click.option(
    "-j", "--jobs", type=click.IntRange(min=1), help="Compile so many files at once (default: as cores and memory allow)."
)
@click.option("--force", is_flag=True, help="Build again what is already there.")
@output_options
def build(
    backend: str,
    source: Path | None,
    ref: str | None,
    version: str | None,
    jobs: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **_options: Any,
) -> int:
    """Build llama.cpp's programs, by default from the source inside llama-cpp-python's package. Takes minutes, continues
    after an interruption, and ends in the cache where every command finds it."""
    from imatrix_runner.process import Runner
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.toolchain.build import BuildRequest
    from imatrix_runner.toolchain.build import build as build_toolchain

    request = BuildRequest(backend=backend, source=source, ref=ref, version=version, jobs=jobs, force=force)
    with listening(quiet=quiet, verbose=verbose) as listener:
        runner = Runner()
        with stop_on_signals(runner.stop):
            toolchain = build_toolchain(request, runner, listener.sink)
    if not quiet or as_json:
        _show(toolchain, (), as_json=as_json)
    return 0


@tools.command(cls=SettingsCommand)
@setting("--backend", type=click.Choice(_BACKENDS), default="cpu", show_default=True, help="What shall compute.")
@click.option("--tag", metavar="bNNNN", help="Install this release (default: the latest).")
@click.option("--force", is_flag=True, help="Install again what is already there.")
@output_options
def install(backend: str, tag: str | None, force: bool, as_json: bool, quiet: bool, verbose: bool, **_options: Any) -> int:
    """Install the official release of llama.cpp for this platform, its digest verified."""
    from imatrix_runner.process import Runner
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.toolchain.release import InstallRequest
    from imatrix_runner.toolchain.release import install as install_toolchain

    with listening(quiet=quiet, verbose=verbose) as listener:
        runner = Runner()
        with stop_on_signals(runner.stop):
            toolchain = install_toolchain(InstallRequest(tag=tag, backend=backend, force=force), runner, listener.sink)
    if not quiet or as_json:
        _show(toolchain, (), as_json=as_json)
    return 0


def _show(toolchain: Toolchain, rejected: tuple[Rejection, ...], *, as_json: bool) -> None:
    from imatrix_runner.cli.documents import document, print_document, toolchain_content

    if as_json:
        turned_down = [{"directory": str(entry.directory), "origin": entry.origin, "why": entry.why} for entry in rejected]
        print_document(document("tools", exit_code=0, toolchain=toolchain_content(toolchain), rejected=turned_down))
        return
    from rich.table import Table

    from imatrix_runner.cli.console import stdout_console

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("Version", toolchain.identity())
    table.add_row("Directory", str(toolchain.directory))
    table.add_row("Found by", toolchain.origin)
    table.add_row("Backends", ", ".join(toolchain.backends))
    table.add_row("Devices", ", ".join(toolchain.devices) or "no GPU seen")
    table.add_row("Programs", ", ".join(sorted(toolchain.tools)))
    table.add_row("Converter", str(toolchain.converter) if toolchain.converter else "none (tools build keeps it)")
    table.add_row("Types", ", ".join(kind.name for kind in toolchain.types if not kind.alias_of))
    for entry in rejected:
        table.add_row("Turned down", f"{entry.directory} ({entry.origin}): {entry.why}")
    stdout_console().print(table)
