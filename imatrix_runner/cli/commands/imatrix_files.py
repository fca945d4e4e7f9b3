"""``imatrix merge`` and ``imatrix convert``: make one file from others; neither needs a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.cli.work import print_result
from imatrix_runner.errors import InvalidDataError

if TYPE_CHECKING:
    from imatrix_runner.imatrix.merge import Made


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Which file is written, and how."""

    out: Path = option("-o", "--output", type=FILE, required=True, metavar="FILE", help="The file to write.")
    kind: Literal["gguf", "dat"] | None = option(
        "--format",
        type=click.Choice(["gguf", "dat"]),
        help="Format to write (default: by the output's name, .dat is legacy).",
    )
    force: bool = option("--force", is_flag=True, help="Overwrite the output if it exists.")

    @property
    def format(self) -> Literal["gguf", "dat"]:
        return self.kind or ("dat" if self.out.suffix.lower() == ".dat" else "gguf")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    files: tuple[Path, ...] = argument(nargs=-1, required=True, type=FILE)
    weight: str | None = option("--weight", metavar="W1,W2,…", help="Weight of each file, for example 2,1 or 0.7,0.3.")
    output: OutputOptions
    talk: TalkOptions


@command(MergeOptions, examples=("imatrix-runner imatrix merge code.gguf prose.gguf -o both.gguf --weight 2,1",))
def merge(_invocation: Invocation, options: MergeOptions) -> int:
    """Sum the imatrices FILES of one model into one, exactly; formats may be mixed."""
    from imatrix_runner.imatrix import formats
    from imatrix_runner.imatrix import merge as merging

    weights = merging.parse_weights(options.weight, len(options.files)) if options.weight is not None else None
    made = merging.merge([formats.read(path) for path in options.files], weights)
    return _write(made, options.output, options.files, options.talk)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    file: Path = argument(type=FILE)
    chunk_size: int | None = option(
        "--chunk-size", type=click.IntRange(min=1), metavar="N", help="Tokens per chunk of a legacy file (512)."
    )
    output: OutputOptions
    talk: TalkOptions


@command(ConvertOptions, examples=("imatrix-runner imatrix convert imatrix.dat -o imatrix.gguf",))
def convert(_invocation: Invocation, options: ConvertOptions) -> int:
    """Write the imatrix FILE in another format, and report what that format cannot hold."""
    from imatrix_runner.imatrix import formats
    from imatrix_runner.imatrix import merge as merging

    made = merging.convert(formats.read(options.file), options.output.format, options.chunk_size)
    return _write(made, options.output, (options.file,), options.talk)


def _write(made: Made, output: OutputOptions, sources: tuple[Path, ...], talk: TalkOptions) -> int:
    from imatrix_runner.cli.views.console import stderr_console
    from imatrix_runner.cli.views.json_documents import document, imatrix_content
    from imatrix_runner.imatrix import formats

    out = output.out
    is_input = out.exists() and any(path.samefile(out) for path in sources)
    if out.exists() and (is_input or not output.force):
        raise InvalidDataError(
            f"{out} already exists",
            "it is one of the inputs" if is_input else "existing files are not overwritten",
            "Choose another name with -o" + ("." if is_input else ", or overwrite it with --force."),
        )
    formats.write(made.matrix, out, output.format)
    written = formats.read(out)
    console = stderr_console(quiet=talk.quiet)
    for remark in made.remarks:
        console.print(f"Note: {remark}.", markup=False, style="yellow")
    print_result(
        talk,
        lambda: document("imatrix-file", exit_code=0, imatrix=imatrix_content(written), remarks=list(made.remarks)),
        lambda stdout: stdout.print(f"Wrote {out}: {written.describe()}", markup=False),
    )
    return 0
