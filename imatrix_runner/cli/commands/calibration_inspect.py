"""``calibration inspect``: shows facts and findings about a calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option, setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.cli.work import at_work, print_result
from imatrix_runner.safe_text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from imatrix_runner.app.calibration_inspect import Inspected
    from imatrix_runner.calibration.inspect.inspection import Encoding, TextFacts
    from imatrix_runner.calibration.inspect.overlap import Overlap
    from imatrix_runner.calibration.inspect.token_facts import TokenFacts

_SEVERITIES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_ROWS = 10
_EXAMPLE = 80


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    file: Path = argument(type=FILE)
    model: str = option("--model", default="", metavar="MODEL", help="Model whose tokenizer counts: GGUF, directory or hub id.")
    against: Path | None = option(
        "--against", type=FILE, metavar="HELD_OUT", help="Show how much of this held-out text also occurs in FILE."
    )
    ctx_size: int = setting(
        "-c", "--ctx-size", type=click.IntRange(min=1), default=512, show_default=True, metavar="N", help="Tokens per chunk."
    )
    parse_special: bool = setting("--parse-special", is_flag=True, help="Parse control tokens such as <|im_start|>.")
    offline: bool = setting("--offline", is_flag=True, help="Never use the network: only local files and the caches.")
    talk: TalkOptions


@command(
    InspectOptions,
    examples=("imatrix-runner calibration inspect medical.txt --model model-BF16.gguf --against held-out.txt",),
)
def inspect(_invocation: Invocation, options: InspectOptions) -> int:
    """Show what the calibration text FILE consists of and what is wrong with it, each finding with its figure.

    Exit code 6 if it cannot be used: empty, binary, or not UTF-8.
    """
    from imatrix_runner.app.calibration_inspect import InspectRequest
    from imatrix_runner.app.calibration_inspect import inspect as run_inspect

    request = InspectRequest(
        options.file, options.model, options.against, options.ctx_size, options.parse_special, options.offline
    )
    with at_work(options.talk) as work:
        inspected = run_inspect(request, work.context)
    print_result(options.talk, lambda: _document(inspected), lambda console: _print(inspected, console))
    return 0


def _print(inspected: Inspected, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    facts = inspected.inspection
    console.print(Text(printable(str(facts.text.path)), style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    rows = [*_text_rows(facts.text), *(_token_rows(facts.tokens) if facts.tokens is not None else ())]
    if facts.overlap is not None:
        rows.append(("Held out", _held_out(facts.held_out, facts.overlap)))
    for name, value in rows:
        grid.add_row(name, Text(value))
    console.print(grid)
    console.print()
    _print_shares(console, facts.text)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in inspected.findings:
        line = Text(f"{finding.text}.")
        if finding.todo:
            line.append(f"\n{finding.todo}", style="dim")
        table.add_row(Text(finding.severity.capitalize(), style=_SEVERITIES[finding.severity]), line)
    console.print()
    console.print(table)
    if all(finding.severity == "info" for finding in inspected.findings):
        console.print(Text("No problems found.", style="green"))


def _text_rows(text: TextFacts) -> Iterator[tuple[str, str]]:
    from imatrix_runner.files import human_bytes

    yield (
        "Text",
        f"{human_bytes(text.n_bytes)}: {text.n_lines:,} lines, {text.n_words:,} words, {text.n_characters:,} characters",
    )
    if text.n_documents is not None:
        yield "Documents", f"{text.n_documents:,}, by its manifest"
    else:
        yield "Documents", f"{text.n_passages:,} passages (blocks between blank lines; there is no manifest)"
    yield "Compression", f"{text.compression:.2f}-fold (ordinary prose 2.0 to 2.6)"
    yield "Repeated", _repeated(text)
    yield "Encoding", _encoding(text.encoding)


def _repeated(text: TextFacts) -> str:
    near, lines, passages = text.near, text.lines, text.passages
    first = "" if near.all_compared else "the first "
    if not (lines.repeated or passages.repeated or near.repeated):
        compared = "all compared" if near.all_compared else f"{first}{near.n:,} compared"
        return f"none of {lines.n:,} lines, and no passage, not even nearly ({compared})"
    row = f"{'about ' if lines.estimated else ''}{lines.repeated:,} of {lines.n:,} lines ({_percent(lines.share)} of the text)"
    if not near.all_compared:
        row += f", {passages.repeated:,} of {passages.n:,} passages ({_percent(passages.share)})"
    row += f", {near.repeated:,} of {first}{near.n:,} passages at least nearly ({_percent(near.share)})"
    if lines.examples:
        line, count = lines.examples[0]
        row += f"; {count:,}×: {line}"
    elif near.examples:
        row += f"; for example: {near.examples[0][0]}"
    return row


def _encoding(encoding: Encoding) -> str:
    counts = (
        (encoding.lf, "LF"),
        (encoding.crlf, "CRLF"),
        (encoding.cr, "CR"),
        (encoding.replaced, "lost characters (U+FFFD)"),
        (encoding.mojibake, "× perhaps wrongly converted"),
        (encoding.controls, "control characters"),
    )
    found = [f"{count:,} {what}".replace(" ×", "×") for count, what in counts if count]
    return ", ".join(["UTF-8 with a byte order mark" if encoding.bom else "UTF-8", *found])


def _token_rows(tokens: TokenFacts) -> Iterator[tuple[str, str]]:
    chunks = f"{tokens.n_chunks:,} chunks of {tokens.n_ctx}, {tokens.bytes_per_token:.2f} bytes a token"
    yield "Tokens", f"{tokens.n_tokens:,} of {printable(Path(tokens.model).name)}: {chunks}"
    yield "Vocabulary", f"{tokens.n_seen:,} of {tokens.n_vocabulary:,} tokens occur ({_percent(tokens.share_seen)})"
    if tokens.special:
        named = ", ".join(f"{each.text} {each.count:,}×" for each in tokens.special[:4])
        more = f" and {len(tokens.special) - 4} others" if len(tokens.special) > 4 else ""
        how = f"parsed ({tokens.parse_special})" if tokens.parse_special else "not parsed"
        yield "Control", f"{named}{more}; {how}: {tokens.n_parsed:,} tokens parsed, {tokens.n_plain:,} not"


def _held_out(name: str, overlap: Overlap) -> str:
    found = f"{_percent(overlap.share)} of {name} also occurs here ({overlap.n_shingles:,} sequences of 13 words)"
    if overlap.longest:
        example = overlap.example if len(overlap.example) <= _EXAMPLE else overlap.example[: _EXAMPLE - 1] + "…"
        found += f"; longest {overlap.longest:,} characters: {example}"
    return found


def _print_shares(console: Console, text: TextFacts) -> None:
    """Print domains, languages and scripts side by side."""
    from rich.table import Table

    from imatrix_runner.files import human_bytes

    tables = []
    if text.domains:
        heading = "Source" if text.domain_kind == "source" else "Part"
        large = sorted(text.domains, key=lambda each: -each.n_bytes) if len(text.domains) > _ROWS + 1 else text.domains
        rows = [(each.name, human_bytes(each.n_bytes), each.share) for each in large]
        tables.append(_shares(heading, rows, "Bytes"))
    tables.append(_shares("Language", [(each.name, "", each.share) for each in text.languages]))
    if text.scripts:
        tables.append(_shares("Script", [(each.name, f"{each.distinct:,}", each.share) for each in text.scripts], "Letters"))
    row = Table.grid(padding=(0, 4))
    for _ in tables:
        row.add_column(vertical="top")
    row.add_row(*tables)
    console.print(row)


def _shares(heading: str, rows: Sequence[tuple[str, str, float]], figure: str = "") -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=26)
    if figure:
        table.add_column(figure, justify="right", no_wrap=True)
    table.add_column("Share", justify="right", no_wrap=True)
    shown = rows if len(rows) <= _ROWS + 1 else rows[:_ROWS]
    for name, value, share in shown:
        table.add_row(*(Text(cell) for cell in (name, *([value] if figure else []), _percent(share))))
    if left := rows[len(shown) :]:
        more = _percent(sum(share for _, _, share in left))
        table.add_row(*(Text(cell, style="dim") for cell in (f"{len(left)} others", *([""] if figure else []), more)))
    return table


def _percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _document(inspected: Inspected) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.calibration.inspect.overlap import verdict
    from imatrix_runner.cli.views.json_documents import document

    facts = inspected.inspection
    text = msgspec.to_builtins(facts.text, enc_hook=str)
    overlap = facts.overlap
    held_out = None
    if overlap is not None:
        held_out = {"name": facts.held_out, "verdict": verdict(overlap), **msgspec.to_builtins(overlap)}
    tokens = None
    if facts.tokens is not None:
        tokens = {**msgspec.to_builtins(facts.tokens), "share_seen": facts.tokens.share_seen}
    return document(
        "calibration-inspect",
        exit_code=0,
        text=text,
        manifest={"fingerprint": inspected.manifest.fingerprint} if inspected.manifest is not None else None,
        manifest_stale=facts.stale,
        parse_special=facts.parse_special,
        n_ctx=facts.n_ctx,
        tokens=tokens,
        held_out=held_out,
        judgements=[msgspec.to_builtins(finding) for finding in inspected.findings],
    )
