"""``calibration build``: makes a calibration text from documents of many kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option, setting
from imatrix_runner.cli.options import MAKE, TalkOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.cli.work import at_work, print_result
from imatrix_runner.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from imatrix_runner.app.calibration_build import BuildResult, CalibrationRequest
    from imatrix_runner.app.calibration_self import SelfRequest
    from imatrix_runner.documents.manifest import Manifest, SourceFacts

_MODEL, _DOCUMENTS, _SELF = "Tokens and templates", "Documents", "Answers of the model"


@dataclass(frozen=True, kw_only=True)
class BuildTextOptions:
    sources: tuple[str, ...] = argument(nargs=-1, required=False, metavar="SOURCE[=WEIGHT]...")
    out: Path = option("-o", "--output", type=FILE, required=True, metavar="FILE", section=MAKE, help="The text to write.")
    chunks: int | None = option(
        "--chunks", type=click.IntRange(min=1), metavar="N", section=MAKE, help="Take enough text for N chunks."
    )
    tokens: int | None = option(
        "--tokens", type=click.IntRange(min=1), metavar="N", section=MAKE, help="Take N tokens, and as few more as possible."
    )
    held_out: float = option(
        "--held-out",
        type=click.FloatRange(min=0, max=0.5, max_open=False),
        default=0.0,
        metavar="SHARE",
        section=MAKE,
        help="Put this share of the documents into a held-out text instead, which evaluate then measures on (0.1: a tenth).",
    )
    seed: int = option(
        "--seed",
        type=click.IntRange(min=0),
        default=1,
        show_default=True,
        metavar="N",
        section=MAKE,
        help="Seed of the choice and order of documents.",
    )
    shuffle: bool = option(
        "--shuffle/--no-shuffle",
        default=True,
        show_default=True,
        section=MAKE,
        help="Mix the documents, or keep the sources' order.",
    )
    force: bool = option("--force", is_flag=True, section=MAKE, help="Overwrite the output if it exists.")
    dry_run: bool = option("--dry-run", is_flag=True, section=MAKE, help="Do everything except writing files.")
    field: str = option(
        "--field",
        default="",
        metavar="NAME",
        section=_DOCUMENTS,
        help="Take this field of every record (data.text for one inside).",
    )
    min_chars: int = option(
        "--min-chars",
        type=click.IntRange(min=0),
        default=40,
        show_default=True,
        metavar="N",
        section=_DOCUMENTS,
        help="Leave out shorter documents.",
    )
    near_duplicates: float = option(
        "--near-duplicates",
        type=click.FloatRange(min=0, max=1),
        default=0.8,
        show_default=True,
        metavar="SHARE",
        section=_DOCUMENTS,
        help="Leave out documents that share this much with one taken before (0: only equal ones).",
    )
    skip_bad: bool = option(
        "--skip-bad", is_flag=True, section=_DOCUMENTS, help="Leave out records that cannot be used, and count them."
    )
    offline: bool = setting(
        "--offline",
        is_flag=True,
        section=_DOCUMENTS,
        help="Never use the network: only local files and the caches.",
    )
    model: str = option(
        "--model",
        default="",
        metavar="MODEL",
        section=_MODEL,
        help="Model for counting tokens and for its chat template: GGUF, directory or hub id.",
    )
    ctx_size: int = setting(
        "-c",
        "--ctx-size",
        type=click.IntRange(min=16),
        default=512,
        show_default=True,
        metavar="N",
        section=_MODEL,
        help="Tokens per chunk.",
    )
    align: bool = option(
        "--align",
        is_flag=True,
        section=_MODEL,
        help="Begin chunks with documents; only one longer than a chunk continues in the next.",
    )
    template_name: str = option(
        "--chat-template", default="", metavar="NAME", section=_MODEL, help="Name of one of the model's templates."
    )
    chat_template_file: Path | None = option(
        "--chat-template-file",
        type=FILE,
        metavar="FILE",
        section=_MODEL,
        help="Jinja template to use instead of the model's own.",
    )
    own: str = option(
        "--self",
        default="",
        metavar="PROMPTS|shipped",
        section=_SELF,
        help="Let --model answer these prompts (JSON lines or text, or the shipped list), and take its answers.",
    )
    predict: int = option(
        "--predict",
        type=click.IntRange(1, 4096),
        metavar="N",
        default=256,
        show_default=True,
        section=_SELF,
        help="Most tokens of an answer.",
    )
    sampled: int = option(
        "--sampled",
        type=click.IntRange(0, 16),
        metavar="N",
        default=1,
        show_default=True,
        section=_SELF,
        help="Answers drawn with --seed for each prompt, besides the greedy one.",
    )
    temperature: float = option(
        "--temperature",
        type=click.FloatRange(min=0, max=10, min_open=True),
        metavar="T",
        default=0.8,
        show_default=True,
        section=_SELF,
        help="Temperature of drawn answers.",
    )
    top_p: float = option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="P",
        default=0.95,
        show_default=True,
        section=_SELF,
        help="Draw from the likeliest tokens that have this probability together.",
    )
    evaluation: tuple[Path, ...] = option(
        "--evaluation",
        type=FILE,
        multiple=True,
        metavar="FILE",
        section=_SELF,
        help="Prompts or a text to measure on later; prompts that overlap with it are refused.",
    )
    threads: int | None = option(
        "-t", "--threads", type=click.IntRange(min=1), metavar="N", section=_SELF, help="CPU threads (default: all)."
    )
    n_gpu_layers: str = option(
        "-ngl", "--n-gpu-layers", default="", metavar="N", section=_SELF, help="Layers on the GPU: a number, auto or all."
    )
    talk: TalkOptions


@command(
    BuildTextOptions,
    examples=(
        "imatrix-runner calibration build notes/ -o notes.txt",
        "imatrix-runner calibration build --self shipped --model model-BF16.gguf -o own.txt",
        "imatrix-runner calibration build talks.jsonl=3 notes/ shipped=1 -o medical.txt --model model-BF16.gguf --chunks 200",
    ),
)
def build(_invocation: Invocation, options: BuildTextOptions) -> int:
    """Build a calibration text from SOURCEs: mixed by weight, without duplicates, of the size you request.

    A SOURCE is a text, Markdown, JSONL, JSON, CSV or Parquet file, a folder of source code, - for stdin, a data set of a hub
    (org/name[:config[:split]]), or a name from: imatrix-runner calibration list. Dialogues are rendered with the model's
    own chat template. With --self the model's own answers to prompts are a source, too. A manifest next to the text
    records what it was built from.
    """
    from imatrix_runner.app.calibration_build import build as run_build

    request, written = _request(options), not options.dry_run
    with at_work(options.talk) as work:
        result = run_build(request, work.context, dry_run=options.dry_run)
    print_result(
        options.talk,
        lambda: _document(result, written=written),
        lambda console: _print(result, console, written=written),
    )
    return 0


def _request(options: BuildTextOptions) -> CalibrationRequest:
    from imatrix_runner.app.calibration_build import CalibrationRequest
    from imatrix_runner.calibration.build.build_text import BuildOptions

    chunks, tokens, n_ctx = options.chunks, options.tokens, options.ctx_size
    if chunks is not None and tokens is not None:
        raise UsageError("--chunks and --tokens exclude each other", "both say how much to take", "Leave one out.")
    if options.template_name and options.chat_template_file is not None:
        raise UsageError(
            "--chat-template and --chat-template-file exclude each other", "both name a template", "Leave one out."
        )
    return CalibrationRequest(
        options.sources,
        options.out,
        BuildOptions(
            n_ctx=n_ctx,
            tokens=chunks * n_ctx if chunks is not None else tokens,
            whole_chunks=chunks is not None,
            seed=options.seed if options.shuffle else None,
            aligned=options.align,
            least_chars=options.min_chars,
            near_duplicates=options.near_duplicates,
            skip_bad=options.skip_bad,
            held_out=options.held_out,
        ),
        options.model,
        options.chat_template_file,
        options.template_name,
        options.field,
        options.offline,
        options.force,
        _own(options),
    )


def _own(options: BuildTextOptions) -> SelfRequest | None:
    """What ``--self`` asks for; None without it."""
    from imatrix_runner.app.calibration_self import SelfRequest
    from imatrix_runner.engines.jobs import CollectOptions

    if not options.own:
        return None
    return SelfRequest(
        options.own,
        options.predict,
        options.sampled,
        options.temperature,
        options.top_p,
        options.seed,
        options.evaluation,
        CollectOptions(threads=options.threads, n_gpu_layers=options.n_gpu_layers),
    )


def _document(result: BuildResult, *, written: bool) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.cli.views.json_documents import document

    manifest = result.built.manifest
    content = msgspec.to_builtins(manifest)
    del content["documents"], content["schema"], content["version"]
    return document(
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


def _print(result: BuildResult, console: Console, *, written: bool) -> None:
    from rich.table import Table

    from imatrix_runner.files import human_bytes

    manifest = result.built.manifest
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
            f"Dialogues are rendered with {manifest.template.origin} (sha256 {manifest.template.sha256[:12]}); "
            "generation parses their special tokens automatically."
        )
    if manifest.aligned and result.built.at_start is not None:
        console.print(f"{result.built.at_start} of {manifest.chunks} chunks begin at the start of a document.")
    if written:
        console.print(f"Inspect it with: imatrix-runner calibration inspect {result.path}")


def _left_out(source: SourceFacts) -> str:
    counts = (
        (source.bad, "broken"),
        (source.short, "short"),
        (source.duplicates, "duplicate"),
        (source.near_duplicates, "nearly the same"),
        (source.long, "too long"),
    )
    found = [f"{count} {what}" for count, what in counts if count]
    return ", ".join([*found, *([f"{source.cut} cut"] if source.cut else [])]) or "-"


def _size(manifest: Manifest) -> str:
    from imatrix_runner.files import human_bytes

    size = f"{human_bytes(manifest.bytes)}, {len(manifest.documents)} documents"
    if manifest.tokens is None:
        return size
    return f"{size}, {manifest.tokens:,} tokens, {manifest.chunks} chunks of {manifest.n_ctx}"
