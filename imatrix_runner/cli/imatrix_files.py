"""``imatrix merge`` and ``imatrix convert``: files in, one file out; neither needs a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.options import output_options
from imatrix_runner.cli.settings import SettingsCommand
from imatrix_runner.errors import InvalidDataError

if TYPE_CHECKING:
    from imatrix_runner.imatrix.formats import Format
    from imatrix_runner.imatrix.merge import Made

_FILE = click.Path(path_type=Path, dir_okay=False)
_output = click.option("-o", "--output", "out", type=_FILE, required=True, metavar="FILE", help="The file to write.")
_force = click.option("--force", is_flag=True, help="Overwrite the output if it exists.")
_format = click.option(
    "--format",
    "kind",
    type=click.Choice(["gguf", "dat"]),
    help="Format to write (default: by the output's name, .dat is legacy).",
)


@click.command(cls=SettingsCommand)
@click.argument("files", nargs=-1, required=True, type=_FILE)
@_output
@click.option("--weight", metavar="W1,W2,…", help="Count each file's text so many times, for example 2,1 or 0.7,0.3.")
@_format
@_force
@output_options
def merge(files: tuple[Path, ...], out: Path, weight: str | None, kind: Format | None, force: bool, **options: Any) -> int:
    """Sum the imatrices FILES of one model into one, exactly; formats may be mixed.

    \b
    imatrix-runner imatrix merge code.gguf prose.gguf -o both.gguf --weight 2,1
    """
    from imatrix_runner.imatrix import formats
    from imatrix_runner.imatrix import merge as merging

    weights = merging.parse_weights(weight, len(files)) if weight is not None else None
    made = merging.merge([formats.read(path) for path in files], weights)
    return _write(made, out, _kind(out, kind), files, options, force=force)


@click.command(cls=SettingsCommand)
@click.argument("file", type=_FILE)
@_output
@_format
@click.option("--chunk-size", type=click.IntRange(min=1), metavar="N", help="Tokens per chunk of a legacy file (512).")
@_force
@output_options
def convert(file: Path, out: Path, kind: Format | None, chunk_size: int | None, force: bool, **options: Any) -> int:
    """Write the imatrix FILE in the other format, and say what that format cannot hold.

    \b
    imatrix-runner imatrix convert imatrix.dat -o imatrix.gguf
    """
    from imatrix_runner.imatrix import formats
    from imatrix_runner.imatrix import merge as merging

    to = _kind(out, kind)
    return _write(merging.convert(formats.read(file), to, chunk_size), out, to, (file,), options, force=force)


def _kind(out: Path, kind: Format | None) -> Format:
    return kind or ("dat" if out.suffix.lower() == ".dat" else "gguf")


def _write(made: Made, out: Path, kind: Format, sources: tuple[Path, ...], options: dict[str, Any], *, force: bool) -> int:
    from imatrix_runner.cli.console import stderr_console, stdout_console
    from imatrix_runner.cli.documents import document, imatrix_content, print_document
    from imatrix_runner.imatrix import formats

    is_input = out.exists() and any(path.samefile(out) for path in sources)
    if out.exists() and (is_input or not force):
        raise InvalidDataError(
            f"{out} is there already",
            "it is one of the inputs" if is_input else "files of yours are never overwritten",
            "Choose another name with -o" + ("." if is_input else ", or overwrite it with --force."),
        )
    formats.write(made.matrix, out, kind)
    written = formats.read(out)
    console = stderr_console(quiet=options["quiet"])
    for remark in made.remarks:
        console.print(f"Note: {remark}.", markup=False, style="yellow")
    if options["as_json"]:
        print_document(document("imatrix-file", exit_code=0, imatrix=imatrix_content(written), remarks=list(made.remarks)))
    elif not options["quiet"]:
        stdout_console().print(f"Wrote {out}: {written.describe()}", markup=False)
    return 0
