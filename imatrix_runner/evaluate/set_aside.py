"""A user's own calibration text, part of which is set aside: levels are then measured on text of its kind, which no matrix saw.

Only ``run`` with a measurement sets a part aside, so ``imatrix generate`` uses all of a text. What was cut is remembered: the
same text stays cut in later runs, and a matrix that was begun with the whole text is finished with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from imatrix_runner.calibration.inspect.overlap import overlap, verdict
from imatrix_runner.context.context import Session
from imatrix_runner.context.requests import RunRequest
from imatrix_runner.documents.corpus import Corpus, open_corpus
from imatrix_runner.documents.manifest import held_out_path
from imatrix_runner.documents.split_text import split_text
from imatrix_runner.events import info
from imatrix_runner.files import atomic_writer, human_bytes, sha256
from imatrix_runner.imatrix.collection_facts import CollectedFacts
from imatrix_runner.journal import StepRecord
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.steps import TEXT_INPUT, step_id
from imatrix_runner.untrusted import UnreadableError, from_json


@dataclass(frozen=True)
class SetAside:
    """A text that was cut, by content: the ``whole``, what was ``kept`` to calibrate with, and what was ``held`` out. ``name``
    is the text's file name."""

    name: str
    whole: str
    kept: str
    held: str


def with_part_set_aside(request: RunRequest, session: Session, scratch: Path) -> RunRequest:
    """The request with the user's calibration text cut in two, where its levels will be measured and no other text was named.

    A dry run, which leaves the workspace alone, has the parts in ``scratch``. Raises what
    :func:`~imatrix_runner.documents.corpus.open_corpus` raises.
    """
    imatrix, measure = request.imatrix, request.measure
    if imatrix.text is None or imatrix.mode not in ("auto", "generate") or _is_foreign(imatrix.mode, session):
        return request
    corpus = open_corpus(imatrix.text)
    if corpus.path.absolute().parent == session.workspace.texts:  # a part itself
        return request
    wants = measure is not None and measure.text is None and measure.base is None
    if corpus.built is not None:  # its documents were held out when it was built, if any
        held = _built_held_out(corpus)
        wants = wants and held is not None
        return replace(request, measure=replace(measure, text=held)) if wants and measure is not None else request
    before, folder = _remembered(session), session.workspace.texts
    if before is None or before.whole != corpus.sha256:
        if not wants or corpus.manifest is not None:
            return request
        if why := _whole_is_in_use(corpus, session):
            session.sink(info(why))
            return request
        before = None
    if before is None or not _matches(before, folder):
        folder = scratch if session.dry_run else folder
        before = _cut(corpus, folder, session)
    if before is None:
        return request
    kept, held = _paths(before, folder)
    _say(before, kept, held, session)
    if wants and measure is not None:
        measure = replace(measure, text=held)
    return replace(request, imatrix=replace(imatrix, text=kept, part_of=corpus.path), measure=measure)


def measuring_text(session: Session) -> Path:
    """The text that levels are measured on by default: the part set aside of the imatrix's text, else the shipped one."""
    before, record = _remembered(session), session.journal.get(step_id("imatrix"))
    if record is not None and (held := _of_recorded(record)) is not None:
        return held
    if before is None or record is None or record.inputs.get(TEXT_INPUT) != f"sha256:{before.kept}":
        return resource(HELD_OUT_TEXT)
    held = _paths(before, session.workspace.texts)[1]
    return held if held.is_file() and sha256(held) == before.held else resource(HELD_OUT_TEXT)


def _built_held_out(corpus: Corpus) -> Path | None:
    """The text that ``calibration build --held-out`` left next to a built one, if it is still there."""
    path = held_out_path(corpus.path)
    wanted = corpus.built.held_out_sha256 if corpus.built is not None else ""
    return path if wanted and path.is_file() and sha256(path) == wanted else None


def _of_recorded(record: StepRecord) -> Path | None:
    """As :func:`_built_held_out`, for the text that a matrix was collected from."""
    calibration = record.facts_as(CollectedFacts).calibration
    path = Path(calibration.path) if calibration is not None else Path()
    if not path.is_file() or not held_out_path(path).is_file():
        return None
    corpus = open_corpus(path)
    return _built_held_out(corpus) if f"sha256:{corpus.sha256}" == record.inputs.get(TEXT_INPUT) else None


def _is_foreign(mode: str, session: Session) -> bool:
    """Whether the workspace holds a matrix that was not made there: it is used, and no text is read."""
    here = session.workspace.find_imatrix() if mode == "auto" else None
    record = session.journal.get(step_id("imatrix"))
    return here is not None and (record is None or record.output.name != here.name)


def _whole_is_in_use(corpus: Corpus, session: Session) -> str:
    """Why the whole text must be used: a matrix of it is there, or half done."""
    record = session.journal.get(step_id("imatrix"))
    if record is not None and record.inputs.get(TEXT_INPUT) == f"sha256:{corpus.sha256}":
        return f"The imatrix was made from all of {corpus.name}, so nothing of it can be measured on."
    if session.workspace.parts.is_dir():
        return f"The imatrix was begun with all of {corpus.name} and goes on with it, so nothing of it can be measured on."
    return ""


def _cut(corpus: Corpus, folder: Path, session: Session) -> SetAside | None:
    """Write both parts into ``folder`` and (but in a dry run) remember them; None where the text cannot be cut."""
    kept, held = split_text(corpus.path.read_text(encoding="utf-8"))
    if not held:
        text = f"{corpus.name} ({human_bytes(corpus.n_bytes)}) is too short to set a part aside to measure on."
        session.sink(info(text))
        return None
    if verdict(overlap(kept, held)) == "void":
        session.sink(info(f"{corpus.name} repeats itself: a part of it set aside would stand in the rest too."))
        return None
    paths = folder / corpus.name, held_out_path(folder / corpus.name)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, (kept, held), strict=True):
        with atomic_writer(path) as handle:
            handle.write(text.encode())
    found = SetAside(corpus.name, corpus.sha256, *map(sha256, paths))
    if not session.dry_run:
        session.journal.remember(set_aside=msgspec.json.encode(found).decode())
    return found


def _say(found: SetAside, kept: Path, held: Path, session: Session) -> None:
    share = held.stat().st_size / max(1, held.stat().st_size + kept.stat().st_size)
    part = f"{100 * share:.0f} % of {found.name} ({human_bytes(held.stat().st_size)})"
    there = held.parent == session.workspace.texts
    session.sink(info(f"{part} is set aside to measure on: {held}" if there else f"{part} will be set aside to measure on."))


def _remembered(session: Session) -> SetAside | None:
    text = session.journal.fact("set_aside")
    try:
        return from_json(text, SetAside) if text else None
    except UnreadableError:
        return None  # cut anew


def _matches(found: SetAside, folder: Path) -> bool:
    kept, held = _paths(found, folder)
    return kept.is_file() and held.is_file() and (sha256(kept), sha256(held)) == (found.kept, found.held)


def _paths(found: SetAside, folder: Path) -> tuple[Path, Path]:
    kept = folder / found.name
    return kept, held_out_path(kept)
