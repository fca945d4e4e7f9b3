"""What everything in the report was made from: hashes, versions, texts and licences, in groups."""

from __future__ import annotations

from dataclasses import dataclass

from imatrix_runner.files import human_bytes
from imatrix_runner.report import wording
from imatrix_runner.report.document import Report, ReportModel

_FILES, _PARTS = 64, 200
"""Files of a source, parts of a text that are named."""


@dataclass(frozen=True)
class Fact:
    """A line of how it was made: a name, texts, and a figure or hash in fixed-width letters."""

    name: str
    text: str = ""
    code: str = ""


def source_kind(model: ReportModel) -> str:
    """What figures are measured against: ``BF16``, ``quantised Q8_0``, ``dequantised fp8``."""
    if model.dequantised:
        return wording.shown(f"dequantised {model.dequantised}")
    return wording.shown(f"quantised {model.quantised}" if model.quantised else model.type)


def provenance(report: Report) -> list[tuple[str, list[Fact]]]:
    """What everything was made from, in groups; nothing is named that is not known."""
    groups = [("Source", _source(report)), ("Imatrix", _imatrix(report)), ("Calibration text", _calibration(report))]
    groups += [("Evaluation", _evaluation(report)), ("Programs", _programs(report))]
    return [(name, facts) for name, facts in groups if facts]


def _known(*facts: Fact) -> list[Fact]:
    return [fact for fact in facts if fact.text or fact.code]


def _source(report: Report) -> list[Fact]:
    model = report.model
    licence = model.license_name or model.license
    return _known(
        Fact("Origin", wording.shown(model.origin)),
        Fact("Commit", code=wording.shown(model.commit)),
        Fact(
            "Published as",
            wording.shown(model.dequantised and f"{model.dequantised}, dequantised before these files were made"),
        ),
        Fact("Content", code=wording.shown(model.fingerprint)),
        *(
            Fact("File", f"{wording.shown(file.name)}, {human_bytes(file.n_bytes)}", wording.shown(file.sha256))
            for file in model.files[:_FILES]
        ),
        Fact("Licence", wording.shown(licence)),
    )


def _imatrix(report: Report) -> list[Fact]:
    imatrix = report.imatrix
    if imatrix is None:
        return []
    return _known(
        Fact(
            "File",
            f"{wording.shown(imatrix.file.name)}, {human_bytes(imatrix.file.n_bytes)}",
            wording.shown(imatrix.file.sha256),
        ),
        Fact("Format", f"{wording.shown(imatrix.format)}, {wording.many(imatrix.entries, 'entry', 'entries')}"),
        Fact("From", wording.shown(", ".join(imatrix.datasets))),
        Fact("Made", "here" if imatrix.made_here else "elsewhere: how is not known beyond what the file says"),
        Fact("Origin", wording.shown(imatrix.origin)),
        Fact("Engine", wording.shown(imatrix.engine)),
    )


def _calibration(report: Report) -> list[Fact]:
    text = report.imatrix.calibration if report.imatrix is not None else None
    if text is None:
        return []
    facts = [
        Fact("Text", f"{wording.shown(text.name)}, {human_bytes(text.n_bytes)}", wording.shown(text.sha256)),
        Fact("Manifest", code=wording.shown(text.manifest)),
        Fact("Template", wording.shown(text.template)),
        Fact("Special tokens", "parsed" if text.parse_special else "taken as text"),
    ]
    for source in text.sources[:_PARTS]:
        share = wording.percent(source.share, 0) if source.share is not None else ""
        told = ", ".join(part for part in (wording.shown(source.name), share, wording.shown(source.licence)) if part)
        facts.append(Fact("Part", told, wording.shown(source.sha256)))
    return _known(*facts)


def _evaluation(report: Report) -> list[Fact]:
    found = report.evaluation
    if found is None:
        return []
    overlap = (
        f"{wording.percent(found.overlap, 2)} of it stands in the calibration text too" if found.overlap is not None else ""
    )
    return _known(
        Fact("Text", wording.shown(found.text), wording.shown(found.sha256)),
        Fact("Chunks", f"{found.n_chunks:,} of {found.n_ctx:,} tokens; {found.n_tokens:,} tokens scored"),
        Fact("Overlap", overlap),
        Fact("Reference", code=wording.shown(found.reference)),
        Fact("Source’s PPL", f"{wording.figure(found.ppl.value)} ± {wording.error(found.ppl)}"),
        Fact("Engine", wording.shown(found.engine)),
    )


def _programs(report: Report) -> list[Fact]:
    return _known(
        Fact("Program", wording.shown(report.program)),
        Fact("llama.cpp", wording.shown(report.toolchain)),
        Fact("Report made", wording.moment(report.made)),
    )
