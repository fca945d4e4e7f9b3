"""``calibration build``: documents from anywhere become one calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.options import output_options
from imatrix_runner.cli.settings import SettingsCommand, setting
from imatrix_runner.errors import UsageError

if TYPE_CHECKING:
    from imatrix_runner.calibration.manifest import Manifest, SourceFacts
    from imatrix_runner.workflow.calibration_build import BuildRequest, BuildResult

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=SettingsCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE[=WEIGHT]...")
@click.option("-o", "--output", "out", type=_FILE, required=True, metavar="FILE", help="The text to write.")
@click.option(
    "--model", default="", metavar="MODEL", help="Whose tokenizer counts and whose template renders: GGUF, directory or hub id."
)
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Take as much as fills N chunks.")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="Take N tokens, and as little more as can be.")
@setting("-c", "--ctx-size", type=click.IntRange(min=16), default=512, show_default=True, metavar="N", help="Tokens per chunk.")
@click.option("--align", is_flag=True, help="Begin chunks with documents; only one longer than a chunk goes on in the next.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, metavar="N", help="Which choice and order.")
@click.option("--shuffle/--no-shuffle", default=True, show_default=True, help="Mix the documents, or keep the sources' order.")
@click.option("--field", default="", metavar="NAME", help="Take this field of every record (data.text for one inside).")
@click.option("--chat-template", "template_name", default="", metavar="NAME", help="One of the model's named templates.")
@click.option("--chat-template-file", type=_FILE, metavar="FILE", help="Another Jinja template than the model's own.")
@click.option(
    "--min-chars", type=click.IntRange(min=0), default=40, show_default=True, metavar="N", help="Leave out shorter documents."
)
@click.option(
    "--near-duplicates",
    type=click.FloatRange(min=0, max=1),
    default=0.8,
    show_default=True,
    metavar="SHARE",
    help="Leave out documents that share so much with one taken before (0: only equal ones).",
)
@click.option(
    "--held-out",
    type=click.FloatRange(min=0, max=0.5, max_open=False),
    default=0.0,
    metavar="SHARE",
    help="Put this share of the documents into FILE.held-out instead, which evaluate then measures on (0.1: a tenth).",
)
@click.option("--skip-bad", is_flag=True, help="Leave out records that cannot be used, and count them.")
@click.option("--force", is_flag=True, help="Overwrite the output if it exists.")
@setting("--offline", is_flag=True, help="Never touch the network: only what is here or in the caches.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@output_options
def build(sources: tuple[str, ...], out: Path, **options: Any) -> int:
    """Build a calibration text from SOURCEs: mixed by weight, without duplicates, of just the size you ask for.

    A SOURCE is a text, Markdown, JSONL, JSON, CSV or Parquet file, a folder of source code, - for stdin, a data set of a hub
    (org/name[:config[:split]]), or a name from: imatrix-runner calibration list. Dialogues are written down with the model's
    own chat template. A manifest beside the text says what it was built from.

    \b
    imatrix-runner calibration build dialogues.jsonl=3 notes/ shipped=1 -o medical.txt --model model-BF16.gguf --chunks 200
    """
    from imatrix_runner.cli.render import listening
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.calibration_build import build as run_build
    from imatrix_runner.workflow.context import Context

    request = _request(sources, out, options)
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)
        with stop_on_signals(context.stop):
            result = run_build(request, context, dry_run=options["dry_run"])
    if options["as_json"]:
        _print_json(result, written=not options["dry_run"])
    elif not options["quiet"]:
        _print(result, written=not options["dry_run"])
    return 0


def _request(sources: tuple[str, ...], out: Path, options: dict[str, Any]) -> BuildRequest:
    from imatrix_runner.calibration.build import BuildOptions
    from imatrix_runner.workflow.calibration_build import BuildRequest

    chunks, tokens, n_ctx = options["chunks"], options["tokens"], options["ctx_size"]
    if chunks is not None and tokens is not None:
        raise UsageError("--chunks and --tokens exclude each other", "both say how much to take", "Leave one out.")
    if options["template_name"] and options["chat_template_file"] is not None:
        raise UsageError(
            "--chat-template and --chat-template-file exclude each other", "both name a template", "Leave one out."
        )
    return BuildRequest(
        sources,
        out,
        BuildOptions(
            n_ctx=n_ctx,
            tokens=chunks * n_ctx if chunks is not None else tokens,
            whole_chunks=chunks is not None,
            seed=options["seed"] if options["shuffle"] else None,
            aligned=options["align"],
            least_chars=options["min_chars"],
            near_duplicates=options["near_duplicates"],
            skip_bad=options["skip_bad"],
            held_out=options["held_out"],
        ),
        options["model"],
        options["chat_template_file"],
        options["template_name"],
        options["field"],
        options["offline"],
        options["force"],
    )


def _print_json(result: BuildResult, *, written: bool) -> None:
    import msgspec

    from imatrix_runner.cli.documents import document, print_document

    manifest = result.built.manifest
    content = msgspec.to_builtins(manifest)
    del content["documents"], content["schema"], content["version"]
    print_document(
        document(
            "calibration-build",
            exit_code=0,
            written=written,
            path=str(result.path),
            manifest_path=str(result.manifest_path),
            held_out_path=str(result.held_out_path) if result.held_out_path is not None else None,
            fingerprint=manifest.fingerprint,
            documents=len(manifest.documents),
            chunks_at_start=result.built.at_start,
            **content,
        )
    )


def _print(result: BuildResult, *, written: bool) -> None:
    from rich.table import Table

    from imatrix_runner.cli.console import stdout_console
    from imatrix_runner.files import human_bytes

    manifest = result.built.manifest
    console = stdout_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("Source", "left"), ("Share", "right"), ("Documents", "right"), ("Bytes", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("Tokens", justify="right")
    table.add_column("Left out")
    for source in manifest.sources:
        tokens = f"{source.tokens:,}" if source.tokens is not None else "-"
        documents = f"{source.documents} of {source.records}"
        table.add_row(
            source.name, f"{100 * source.share:.0f} %", documents, human_bytes(source.bytes), tokens, _left_out(source)
        )
    console.print(table)
    console.print()
    console.print(f"{'Wrote' if written else 'Would write'} {result.path}: {_size(manifest)}")
    if result.held_out_path is not None:
        size = human_bytes(len(result.built.held_out.encode()))
        console.print(f"Held out to measure on: {result.held_out_path}, {size}")
    if manifest.template is not None:
        console.print(
            f"Dialogues are written with {manifest.template.origin} (sha256 {manifest.template.sha256[:12]}); "
            "generation parses their special tokens by itself."
        )
    if manifest.aligned and result.built.at_start is not None:
        console.print(f"{result.built.at_start} of {manifest.chunks} chunks begin with the beginning of a document.")
    if written:
        console.print(f"Look at it with: imatrix-runner calibration inspect {result.path}")


def _left_out(source: SourceFacts) -> str:
    counts = (
        (source.bad, "broken"),
        (source.short, "short"),
        (source.duplicates, "duplicate"),
        (source.near_duplicates, "nearly the same"),
        (source.long, "too long"),
    )
    told = [f"{count} {what}" for count, what in counts if count]
    return ", ".join([*told, *([f"{source.cut} cut"] if source.cut else [])]) or "-"


def _size(manifest: Manifest) -> str:
    from imatrix_runner.files import human_bytes

    size = f"{human_bytes(manifest.bytes)}, {len(manifest.documents)} documents"
    if manifest.tokens is None:
        return size
    return f"{size}, {manifest.tokens:,} tokens, {manifest.chunks} chunks of {manifest.n_ctx}"
