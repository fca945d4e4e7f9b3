"""Describes the imatrix that levels were made with: its file, its statistics, and how it was collected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import UNSET

from imatrix_runner.files import read_json, sha256, stamp
from imatrix_runner.imatrix.collection_facts import CalibrationFacts, CollectedFacts, ImatrixInputs
from imatrix_runner.imatrix.formats import MatrixFile, read
from imatrix_runner.imatrix.published.fetch_matrix import MatrixSource
from imatrix_runner.imatrix.statistics import statistics
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.origin import repository_in
from imatrix_runner.report.document import (
    CalibrationSource,
    ReportCalibration,
    ReportCurvePoint,
    ReportExperts,
    ReportFile,
    ReportImatrix,
    ReportTensor,
)
from imatrix_runner.report.facts.gather_model import is_same, last_part
from imatrix_runner.safe_text import printable
from imatrix_runner.steps import imatrix_in
from imatrix_runner.untrusted import whole_number
from imatrix_runner.workspace import Workspace


def describe_imatrix(
    workspace: Workspace, journal: Journal, used: str, level: Path | None, before: ReportImatrix | None = None
) -> ReportImatrix | None:
    """Describe the imatrix ``used``: the input that levels name, ``imatrix.gguf sha256:…`` (empty: the workspace's own). If its
    file is gone, the description comes from the metadata that llama-quantize wrote into ``level``, a finished level's file.

    ``before``: an earlier description, whose statistics are reused if it is of the same file. Raises
    :class:`InvalidDataError` for a file that cannot be read.
    """
    name, wanted = imatrix_in(used)
    path = next(_candidates(workspace, journal, name, wanted), None)
    if path is None:
        return _gone(workspace, journal, name, wanted, level)
    digest = wanted or _digest(path, journal)
    return _described(read(path), digest, collected(workspace, journal, digest), before)


def _candidates(workspace: Workspace, journal: Journal, name: str, wanted: str) -> Iterator[Path]:
    """Files with the wanted content: in the workspace, or where the journal recorded it."""
    for path in (workspace.find_imatrix(), workspace.root / last_part(name) if wanted else None):
        if path is not None and path.is_file() and (not wanted or _digest(path, journal) == wanted):
            yield path
    for place, hashed in journal.hashes().items():
        if hashed.sha256 == wanted and is_same(Path(place), hashed):
            yield Path(place)


def _digest(path: Path, journal: Journal) -> str:
    return journal.known_hash(path) or sha256(path)


def collected(workspace: Workspace, journal: Journal, digest: str) -> StepRecord | None:
    """The record of how the imatrix with this content was collected here; None if it came from elsewhere.

    A record may hold only the file's name and stamp; the digest for that stamp is known from when levels were made.
    """
    hashes = {hashed.stamp: hashed.sha256 for hashed in journal.hashes().values()}
    for record in journal.of_kind("imatrix").values():
        output = record.output
        path = workspace.root / output.name
        known = output.sha256 or hashes.get(output.stamp)
        if not known and path.is_file() and stamp(path) == output.stamp:
            known = sha256(path)
        if known == digest:
            return record
    return None


def _described(file: MatrixFile, digest: str, record: StepRecord | None, before: ReportImatrix | None) -> ReportImatrix:
    matrix = file.matrix
    if before is not None and before.file.sha256 == digest and before.tensors:
        tensors, experts, without_data = before.tensors, before.experts, before.without_data
    else:
        tensors, experts, without_data = _statistics(file)
    source = _published(file.path, digest)
    return ReportImatrix(
        file=ReportFile(printable(file.path.name), file.path.stat().st_size, digest),
        format=file.format,
        entries=len(matrix.entries),
        chunks=matrix.chunk_count,
        chunk_size=matrix.chunk_size,
        datasets=tuple(last_part(name) for name in matrix.datasets),
        made_here=record is not None,
        tokens=matrix.chunk_count * matrix.chunk_size or None,
        tensors=tensors,
        experts=experts,
        without_data=without_data,
        origin=printable(f"{source.repo}@{source.commit}:{source.path}")[:500] if source is not None else "",
        repo=(repository_in(source.repo) if source is not None else None) or "",
        **(_collection(record) if record is not None else {}),
    )


def _statistics(file: MatrixFile) -> tuple[tuple[ReportTensor, ...], tuple[ReportExperts, ...], tuple[str, ...]]:
    found = statistics(file.matrix)
    tensors = tuple(
        ReportTensor(each.layer, each.tensor, each.total, each.active, each.entropy_percent / 100) for each in found.tensors
    )
    experts = tuple(
        ReportExperts(each.layer, each.tensor, each.experts, each.without_tokens, each.fewest, each.median, each.most)
        for each in found.experts
    )
    return tensors, experts, found.without_data


def _collection(record: StepRecord) -> dict[str, Any]:
    """The fields of :class:`ReportImatrix` that the journal's record of a collection gives."""
    facts = record.facts_as(CollectedFacts)
    calibration = facts.calibration
    return {
        "ppl": facts.ppl,
        "ppl_error": facts.ppl_error,
        "stopped": facts.stopped or "",
        "seconds": record.seconds,
        "engine": record.inputs_as(ImatrixInputs).engine,
        "curve": tuple(ReportCurvePoint(each.chunks, each.worst, each.tensor, each.median) for each in facts.curve or ()),
        "calibration": _calibration(calibration, record) if calibration is not None else None,
    }


def _calibration(facts: CalibrationFacts, record: StepRecord) -> ReportCalibration:
    return ReportCalibration(
        name=printable(last_part(facts.path)),
        n_bytes=facts.bytes,
        sha256=facts.sha256,
        manifest=facts.manifest or "",
        parse_special=_parsed_special(record),
        template=facts.template or "",
        sources=tuple(
            CalibrationSource(printable(each.name), each.sha256, printable(each.licence), each.share)
            for each in facts.sources or ()
        ),
    )


def _parsed_special(record: StepRecord) -> bool:
    """Whether special tokens were parsed. Earlier versions recorded it only among the options, before the text's name."""
    facts, inputs = record.facts_as(CollectedFacts), record.inputs_as(ImatrixInputs)
    if facts.parse_special is not UNSET:
        return facts.parse_special
    return "--parse-special" in inputs.options.removesuffix(f"name {facts.dataset}").split()


def _published(path: Path, digest: str) -> MatrixSource | None:
    """Where a published imatrix came from, from the note next to it; None if the note is about another file."""
    note = path.with_suffix(".source.json")
    source = read_json(note, MatrixSource) if note.is_file() else None
    return source if source is not None and source.sha256 == digest else None


def _gone(workspace: Workspace, journal: Journal, name: str, wanted: str, level: Path | None) -> ReportImatrix | None:
    """Describe an imatrix whose file is gone, from what llama-quantize wrote into ``level``; None if its size is unknown."""
    sizes = [hashed.stamp.size for hashed in journal.hashes().values() if hashed.sha256 == wanted]
    if not wanted or not sizes or level is None:
        return None
    record, header = collected(workspace, journal, wanted), read_header(level)
    chunks = header.integer("quantize.imatrix.chunks_count") or 0
    chunk_size = (whole_number(record.inputs_as(ImatrixInputs).context) or 0) if record is not None else 0
    dataset = header.text("quantize.imatrix.dataset")
    return ReportImatrix(
        file=ReportFile(printable(last_part(name)), sizes[0], wanted),
        format="gguf" if record is not None else "",
        entries=header.integer("quantize.imatrix.entries_count") or 0,
        chunks=chunks,
        chunk_size=chunk_size,
        datasets=(last_part(dataset),) if dataset else (),
        made_here=record is not None,
        tokens=chunks * chunk_size or None,
        **(_collection(record) if record is not None else {}),
    )
