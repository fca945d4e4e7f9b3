"""Provenance of everything in the report: hashes, versions, texts and licences, in groups."""

from __future__ import annotations

from dataclasses import dataclass

from imatrix_runner import safe_text
from imatrix_runner.files import human_bytes
from imatrix_runner.report.document import Report
from imatrix_runner.report.views import wording

_FILES, _PARTS = 64, 200
"""Most files of a source, and most parts of a text, that are listed."""


@dataclass(frozen=True)
class ProvenanceLine:
    """A line of the provenance: a name, a text, and a hash or other code in a fixed-width font."""

    name: str
    text: str = ""
    code: str = ""


def provenance(report: Report) -> list[tuple[str, list[ProvenanceLine]]]:
    """The provenance in named groups; lines and groups without known facts are left out."""
    groups = [("Source", _source(report)), ("Imatrix", _imatrix(report)), ("Calibration text", _calibration(report))]
    groups += [("Evaluation", _evaluation(report)), ("Programs", _programs(report))]
    return [(name, facts) for name, facts in groups if facts]


def _known(*facts: ProvenanceLine) -> list[ProvenanceLine]:
    return [fact for fact in facts if fact.text or fact.code]


def _source(report: Report) -> list[ProvenanceLine]:
    model = report.model
    licence = model.license_name or model.license
    return _known(
        ProvenanceLine("Origin", safe_text.shown(model.origin)),
        ProvenanceLine("Commit", code=safe_text.shown(model.commit)),
        ProvenanceLine(
            "Published as",
            safe_text.shown(model.dequantised and f"{model.dequantised}, dequantised before these files were made"),
        ),
        ProvenanceLine("Content", code=safe_text.shown(model.fingerprint)),
        *(
            ProvenanceLine("File", f"{safe_text.shown(file.name)}, {human_bytes(file.n_bytes)}", safe_text.shown(file.sha256))
            for file in model.files[:_FILES]
        ),
        ProvenanceLine("Licence", safe_text.shown(licence)),
    )


def _imatrix(report: Report) -> list[ProvenanceLine]:
    imatrix = report.imatrix
    if imatrix is None:
        return []
    return _known(
        ProvenanceLine(
            "File",
            f"{safe_text.shown(imatrix.file.name)}, {human_bytes(imatrix.file.n_bytes)}",
            safe_text.shown(imatrix.file.sha256),
        ),
        ProvenanceLine("Format", f"{safe_text.shown(imatrix.format)}, {wording.many(imatrix.entries, 'entry', 'entries')}"),
        ProvenanceLine("From", safe_text.shown(", ".join(imatrix.datasets))),
        ProvenanceLine("Made", "here" if imatrix.made_here else "elsewhere; only what the file says about it is known"),
        ProvenanceLine("Origin", safe_text.shown(imatrix.origin)),
        ProvenanceLine("Engine", safe_text.shown(imatrix.engine)),
    )


def _calibration(report: Report) -> list[ProvenanceLine]:
    text = report.imatrix.calibration if report.imatrix is not None else None
    if text is None:
        return []
    facts = [
        ProvenanceLine("Text", f"{safe_text.shown(text.name)}, {human_bytes(text.n_bytes)}", safe_text.shown(text.sha256)),
        ProvenanceLine("Manifest", code=safe_text.shown(text.manifest)),
        ProvenanceLine("Template", safe_text.shown(text.template)),
        ProvenanceLine("Special tokens", "parsed" if text.parse_special else "taken as text"),
    ]
    for source in text.sources[:_PARTS]:
        share = wording.percent(source.share, 0) if source.share is not None else ""
        named = ", ".join(part for part in (safe_text.shown(source.name), share, safe_text.shown(source.licence)) if part)
        facts.append(ProvenanceLine("Part", named, safe_text.shown(source.sha256)))
    return _known(*facts)


def _evaluation(report: Report) -> list[ProvenanceLine]:
    found = report.evaluation
    if found is None:
        return []
    overlap = (
        f"{wording.percent(found.overlap, 2)} of it also occurs in the calibration text" if found.overlap is not None else ""
    )
    return _known(
        ProvenanceLine("Text", safe_text.shown(found.text), safe_text.shown(found.sha256)),
        ProvenanceLine("Chunks", f"{found.n_chunks:,} of {found.n_ctx:,} tokens; {found.n_tokens:,} tokens scored"),
        ProvenanceLine("Until", f"an error of {wording.percent(found.until)} of the KLD" if found.until is not None else ""),
        ProvenanceLine("Overlap", overlap),
        ProvenanceLine("Reference", code=safe_text.shown(found.reference)),
        ProvenanceLine("Source’s PPL", f"{wording.figure(found.ppl.value)} ± {wording.error(found.ppl)}"),
        ProvenanceLine("Engine", safe_text.shown(found.engine)),
    )


def _programs(report: Report) -> list[ProvenanceLine]:
    return _known(
        ProvenanceLine("Program", safe_text.shown(report.program)),
        ProvenanceLine("llama.cpp", safe_text.shown(report.toolchain)),
        ProvenanceLine("Report made", wording.moment(report.made)),
    )
