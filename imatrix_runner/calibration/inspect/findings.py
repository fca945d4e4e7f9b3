"""Findings about a calibration text, each with the figure that led to it. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.calibration.inspect.inspection import TextFacts
from imatrix_runner.calibration.inspect.overlap import SOME, VOID, Overlap, verdict
from imatrix_runner.calibration.inspect.token_facts import TokenFacts
from imatrix_runner.documents.corpus import FEW_CHUNKS

Severity = Literal["info", "warning", "error"]

FEW_EXAMPLES = 50
MANY_REPEATED = 0.05
REPETITIVE = 4.0
"""Compression above which a text counts as generated or repetitive; prose has 2.0 to 2.6, logs and tables 3 to 6."""

UNRELATED = 0.5
"""Cosine of word frequencies below which two domains count as unrelated.

Measured: halves of one part of the shipped text have 0.62 (data of many formats) to 0.96 (fiction), a project's Python files
and those of the standard library 0.59, Node.js's manuals of two modules 0.75; prose and code 0.43 to 0.47, prose and data 0.32
to 0.35, two languages 0.00 to 0.29. Subjects in one language are not distinguished: science and fiction have 0.92.
"""

_LARGE, _GENERAL = 0.2, 5
_DAMAGED = 1e-4
"""Share of characters from which damage is a warning; a single broken word may be quoted on purpose."""
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Inspection:
    """All facts about one text. ``parse_special`` and ``built`` (a manifest describes the text) are known without a tokenizer.

    ``stale``: there is a manifest, but the text has changed since. ``held_out``: the name of the held-out text compared with.
    """

    text: TextFacts
    tokens: TokenFacts | None
    n_ctx: int
    parse_special: str = ""
    built: bool = False
    stale: bool = False
    overlap: Overlap | None = None
    held_out: str = ""


@dataclass(frozen=True)
class TextFinding:
    """One finding: its severity, a ``kind`` for programs, the figure that led to it, a sentence for people, and what to do
    (empty if nothing needs to be done)."""

    severity: Severity
    kind: str
    figure: float
    text: str
    todo: str


def text_findings(inspection: Inspection) -> tuple[TextFinding, ...]:
    """All findings, the most severe first."""
    found = [
        *_amount(inspection),
        *_variety(inspection.text),
        *_repetition(inspection.text),
        *_encoding(inspection.text),
        *_special(inspection),
        *_held_out(inspection),
    ]
    order: tuple[Severity, ...] = ("error", "warning", "info")
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def _amount(inspection: Inspection) -> Iterator[TextFinding]:
    text, tokens = inspection.text, inspection.tokens
    if text.n_examples < FEW_EXAMPLES:
        what = "documents" if text.n_documents is not None else "passages (blocks between blank lines)"
        yield TextFinding(
            "warning",
            "few-examples",
            text.n_examples,
            f"{text.n_examples} {what} are few: with fewer than {FEW_EXAMPLES} an imatrix is noisy",
            "Add documents of other kinds and subjects.",
        )
    estimate = int(text.n_bytes / _BYTES_PER_TOKEN) // inspection.n_ctx
    n_chunks = tokens.n_chunks if tokens is not None else estimate
    if n_chunks < FEW_CHUNKS:
        amount = f"{n_chunks} chunks of {inspection.n_ctx} tokens"
        amount = amount if tokens is not None else f"About {amount} (estimated: {_BYTES_PER_TOKEN} bytes per token)"
        missing = (FEW_CHUNKS - n_chunks) * inspection.n_ctx
        yield TextFinding(
            "warning",
            "few-chunks",
            n_chunks,
            f"{amount} are few: published matrices use 125 to 300, and with fewer than {FEW_CHUNKS} an imatrix is noisy",
            f"Add text of about {missing:,} tokens" + (", or count exactly with --model MODEL." if tokens is None else "."),
        )
    trained = tokens.trained_context if tokens is not None else None
    if trained is not None and trained > inspection.n_ctx:
        yield TextFinding(
            "info",
            "short-context",
            inspection.n_ctx,
            f"Chunks of {inspection.n_ctx} tokens are shorter than the {trained:,} the model was trained for; published "
            "measurements saw no difference between 512 and 8192 (ik_llama.cpp #383)",
            "",
        )


def _variety(text: TextFacts) -> Iterator[TextFinding]:
    domains, what = text.domains, "source" if text.domain_kind == "source" else "labelled part"
    if len(domains) == 1:
        yield TextFinding(
            "warning",
            "one-source",
            1,
            f"The whole text comes from one {what} ({domains[0].name}): weights that it does not use look unimportant",
            "Mix in general text, for example: imatrix-runner calibration build YOURS=3 shipped=1 -o mixed.txt",
        )
    unrelated = [pair for pair in text.similarities if pair.cosine < UNRELATED]
    if not unrelated:
        return
    least = unrelated[0]
    pair = f"{least.one} and {least.other} are the least similar (cosine of word frequencies {least.cosine:.2f})"
    if len(domains) >= _GENERAL:
        yield TextFinding(
            "info",
            "general-text",
            len(domains),
            f"A general text of {len(domains)} {what}s, as a general model needs; {pair}",
            "",
        )
        return
    large = {domain.name for domain in domains if domain.share > _LARGE}
    for pair_ in unrelated:
        if {pair_.one, pair_.other} <= large:
            yield TextFinding(
                "warning",
                "unrelated-domains",
                pair_.cosine,
                f"{pair_.one} and {pair_.other} share few words (cosine of their frequencies {pair_.cosine:.2f}; related texts "
                f"have more than {UNRELATED}) and each takes more than {_percent(_LARGE)}: one imatrix serves neither well",
                "For a model of one domain use that domain and some general text; for a general model add more domains.",
            )
            return


def _repetition(text: TextFacts) -> Iterator[TextFinding]:
    exact = False
    for kind, repetition, what in (("repeated-lines", text.lines, "lines"), ("repeated-passages", text.passages, "passages")):
        exact = repetition.share > MANY_REPEATED
        if exact:
            yield TextFinding(
                "warning",
                kind,
                repetition.share,
                f"{_percent(repetition.share)} of the text are {what} that repeat earlier ones ({repetition.repeated:,} of "
                f"{repetition.n:,}): they add weight but no information",
                "Remove them: imatrix-runner calibration build FILE -o unique.txt drops repeated documents.",
            )
            break
    near = text.near
    if near.share > MANY_REPEATED and not exact:
        yield TextFinding(
            "warning",
            "near-duplicates",
            near.share,
            f"{_percent(near.share)} of the text are passages that nearly repeat earlier ones ({near.repeated:,} of "
            + (f"{near.n:,})" if near.all_compared else f"the first {near.n:,})"),
            "Remove them: imatrix-runner calibration build FILE -o unique.txt drops such documents.",
        )
    if text.compression > REPETITIVE:
        yield TextFinding(
            "warning",
            "repetitive",
            text.compression,
            f"It compresses {text.compression:.1f}-fold, ordinary text 2.0- to 2.6-fold: it is generated or repetitive",
            "Use text written by people.",
        )


def _encoding(text: TextFacts) -> Iterator[TextFinding]:
    encoding, n = text.encoding, text.n_characters
    name = shlex.quote(text.path.name)
    if encoding.bom:
        yield TextFinding(
            "warning",
            "bom",
            1,
            "It begins with a byte order mark, which becomes a token",
            f"Remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' {name}",
        )
    damage = (
        ("lost-characters", encoding.replaced, "Characters were lost and replaced by U+FFFD"),
        ("mojibake", encoding.mojibake, f"UTF-8 was apparently read as Latin-1 ({encoding.mojibake_example})"),
        ("control-characters", encoding.controls, "The text contains control characters"),
    )
    for kind, count, what in damage:
        if count and count >= _DAMAGED * n:
            yield TextFinding("warning", kind, count, f"{what}: {count:,}×", "Convert it again from its original encoding.")
        elif count:
            yield TextFinding("info", kind, count, f"{what}: {count:,}×, so rarely that it may be intended", "")
    ends = {"CRLF": encoding.crlf, "LF": encoding.lf, "CR": encoding.cr}
    used = [f"{count:,} {end}" for end, count in ends.items() if count]
    if len(used) > 1:
        yield TextFinding(
            "warning" if min(filter(None, ends.values())) > 0.01 * sum(ends.values()) else "info",
            "mixed-line-ends",
            min(filter(None, ends.values())),
            f"Its line ends are mixed ({', '.join(used)}): the same line becomes different tokens",
            f"Make them uniform: sed -i 's/\\r$//' {name}",
        )


def _special(inspection: Inspection) -> Iterator[TextFinding]:
    tokens = inspection.tokens
    if inspection.stale:
        yield TextFinding(
            "warning",
            "stale-manifest",
            1,
            "Its manifest is ignored, because the text has changed since it was built",
            "Build the text again, or delete the manifest.",
        )
    n = sum(each.count for each in tokens.special) if tokens is not None else 0
    if tokens is None or not n:
        return
    named = ", ".join(f"{each.text} {each.count:,}×" for each in tokens.special[:3])
    if not inspection.parse_special:
        yield TextFinding(
            "warning",
            "special-not-parsed",
            n,
            f"{n:,} control tokens of the model are written out in the text ({named}) and would be read as plain characters",
            "To parse them as control tokens: --parse-special, for inspect and for generate.",
        )
    elif inspection.parse_special != "manifest":
        yield TextFinding(
            "info",
            "special-parsed",
            n,
            f"{n:,} control tokens are parsed ({named}), as {inspection.parse_special} requests; it is not proven to help, and "
            "perplexities with and without it cannot be compared",
            "",
        )


def _held_out(inspection: Inspection) -> Iterator[TextFinding]:
    overlap, name = inspection.overlap, inspection.held_out
    if overlap is None:
        return
    common = f"{_percent(overlap.share)} of {name} ({overlap.n_shingles:,} sequences of 13 words) also occur in this text"
    found = verdict(overlap)
    if found == "void":
        yield TextFinding(
            "error",
            "held-out-void",
            1.0 if overlap.identical else overlap.share,
            f"{name} is this same text: measurements on it are void"
            if overlap.identical
            else f"{common}: measurements on it are void (from {_percent(VOID)} on)",
            "Measure on a text that the calibration has not seen.",
        )
    elif found == "some":
        yield TextFinding(
            "warning",
            "held-out-overlap",
            overlap.share,
            f"{common}: measurements on it are slightly too good (from {_percent(SOME)} on)",
            "Remove the common passages from one of the texts.",
        )
    elif overlap.n_shingles == 0:
        yield TextFinding(
            "warning",
            "held-out-short",
            0,
            f"{name} is too short to compare: it has fewer than 13 words",
            "Use a longer text.",
        )
    else:
        yield TextFinding("info", "held-out-fresh", overlap.share, f"{common}: levels can be measured on it", "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 %", " %")
