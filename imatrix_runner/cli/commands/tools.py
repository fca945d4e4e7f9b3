"""``tools``: locates, builds and installs llama.cpp's programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.help_context import PageGroup
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import option, setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FOLDER
from imatrix_runner.cli.work import at_work

if TYPE_CHECKING:
    from imatrix_runner.toolchain.probe import Rejection, Toolchain

_BACKENDS = ("cpu", "cuda", "vulkan", "metal", "hip")


@dataclass(frozen=True, kw_only=True)
class LocateOptions:
    llama_cpp: Path | None = setting("--llama-cpp", type=FOLDER, metavar="DIR", help="Look in this directory only.")
    talk: TalkOptions


@command(LocateOptions)
def locate(_invocation: Invocation, options: LocateOptions) -> int:
    """Show which programs are used, what they can do, and why others were rejected."""
    import os

    from imatrix_runner.toolchain.locate import locate as find
    from imatrix_runner.toolchain.locate import require
    from imatrix_runner.toolchain.store import cache_dir

    found = find(options.llama_cpp, env=os.environ, cache=cache_dir())
    toolchain = require(found)
    _show(toolchain, found.rejected, as_json=options.talk.as_json)
    return 0


@dataclass(frozen=True, kw_only=True)
class BuildProgramsOptions:
    backend: str = setting(
        "--backend", type=click.Choice(_BACKENDS), default="cpu", show_default=True, help="Backend to compute with."
    )
    source: Path | None = option(
        "--source", type=FOLDER, metavar="DIR", help="Build this llama.cpp checkout (it is not written to)."
    )
    ref: str | None = option("--ref", metavar="TAG", help="Build this tag of llama.cpp, fetched with git.")
    version: str | None = option(
        "--version", metavar="X.Y.Z", help="Build the llama.cpp inside this version of llama-cpp-python."
    )
    jobs: int | None = option(
        "-j",
        "--jobs",
        type=click.IntRange(min=1),
        metavar="N",
        help="Compile N files at once (default: as cores and memory allow).",
    )
    force: bool = option("--force", is_flag=True, help="Build again what is already there.")
    talk: TalkOptions


@command(BuildProgramsOptions)
def build(_invocation: Invocation, options: BuildProgramsOptions) -> int:
    """Build llama.cpp's programs, by default from the source inside llama-cpp-python's package. Takes minutes, continues
    after an interruption, and puts them in the cache, where every command finds them."""
    from imatrix_runner.process import Runner
    from imatrix_runner.toolchain.build import BuildRequest
    from imatrix_runner.toolchain.build import build as build_toolchain

    request = BuildRequest(
        backend=options.backend,
        source=options.source,
        ref=options.ref,
        version=options.version,
        jobs=options.jobs,
        force=options.force,
    )
    with at_work(options.talk) as work:
        toolchain = build_toolchain(request, Runner(work.context.stop), work.context.sink)
    if not options.talk.quiet or options.talk.as_json:
        _show(toolchain, (), as_json=options.talk.as_json)
    return 0


@dataclass(frozen=True, kw_only=True)
class InstallProgramsOptions:
    backend: str = setting(
        "--backend", type=click.Choice(_BACKENDS), default="cpu", show_default=True, help="Backend to compute with."
    )
    tag: str | None = option("--tag", metavar="bNNNN", help="Install this release (default: the latest).")
    force: bool = option("--force", is_flag=True, help="Install again what is already there.")
    talk: TalkOptions


@command(InstallProgramsOptions)
def install(_invocation: Invocation, options: InstallProgramsOptions) -> int:
    """Install the official release of llama.cpp for this platform, after verifying its digest."""
    from imatrix_runner.process import Runner
    from imatrix_runner.toolchain.release import InstallRequest
    from imatrix_runner.toolchain.release import install as install_toolchain

    request = InstallRequest(tag=options.tag, backend=options.backend, force=options.force)
    with at_work(options.talk) as work:
        toolchain = install_toolchain(request, Runner(work.context.stop), work.context.sink)
    if not options.talk.quiet or options.talk.as_json:
        _show(toolchain, (), as_json=options.talk.as_json)
    return 0


@click.group(cls=PageGroup)
def tools() -> None:
    """llama.cpp's programs: locate, build, install. They convert Hugging Face models and serve --engine binaries."""


for each in (locate, build, install):
    tools.add_command(each)


def _show(toolchain: Toolchain, rejected: tuple[Rejection, ...], *, as_json: bool) -> None:
    from imatrix_runner.cli.views.json_documents import document, print_document, toolchain_content
    from imatrix_runner.toolchain.capabilities import matrix_support
    from imatrix_runner.toolchain.store import cache_dir

    formats = matrix_support(toolchain, cache_dir())
    if as_json:
        entries = [{"directory": str(entry.directory), "origin": entry.origin, "why": entry.why} for entry in rejected]
        print_document(document("tools", exit_code=0, toolchain=toolchain_content(toolchain, formats), rejected=entries))
        return
    from rich.table import Table

    from imatrix_runner.cli.views.console import stdout_console

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("Version", toolchain.identity())
    table.add_row("Directory", str(toolchain.directory))
    table.add_row("Found by", toolchain.origin)
    table.add_row("Backends", ", ".join(toolchain.backends))
    table.add_row("Devices", ", ".join(toolchain.devices) or "no GPU seen")
    table.add_row("Programs", ", ".join(sorted(toolchain.tools)))
    table.add_row("Imatrix", str(formats))
    table.add_row("Converter", str(toolchain.converter) if toolchain.converter else "none (tools build keeps it)")
    table.add_row("Types", ", ".join(kind.name for kind in toolchain.types if not kind.alias_of))
    for entry in rejected:
        table.add_row("Rejected", f"{entry.directory} ({entry.origin}): {entry.why}")
    stdout_console().print(table)
