"""``calibration inspect``: facts and findings about a text, optionally with a model's tokenizer and a held-out text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from imatrix_runner.calibration.inspect.findings import Inspection, TextFinding, text_findings
from imatrix_runner.calibration.inspect.inspection import inspect_text
from imatrix_runner.calibration.inspect.overlap import overlap_files
from imatrix_runner.calibration.inspect.token_facts import TokenFacts, inspect_tokens
from imatrix_runner.calibration.tokenisers import find_tokeniser, tokenizer_files
from imatrix_runner.chat.tokenizer_config import read_config
from imatrix_runner.context.context import Context
from imatrix_runner.documents.manifest import Manifest, describes, find_manifest
from imatrix_runner.events import Finished, Progress, Started
from imatrix_runner.extras import CALIBRATION
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from imatrix_runner.safe_text import printable

_SILENT_SECONDS = 2.0
_GGUF_BATCH, _HF_BATCH = 4 << 20, 128 << 10
"""Bytes of text passed to a tokenizer at a time. The tokenizers library needs about a kilobyte of memory per token."""


@dataclass(frozen=True)
class InspectRequest:
    """``model``: a GGUF, directory or hub id whose tokenizer counts tokens (empty: they are not counted). ``against``: a
    held-out text. ``thorough``: also check languages, scripts and near-duplicates, which needs the extra ``calibration``."""

    file: Path
    model: str = ""
    against: Path | None = None
    n_ctx: int = 512
    parse_special: bool = False
    offline: bool = False
    thorough: bool = True


@dataclass(frozen=True)
class Inspected:
    """The facts, the findings from them, and the text's manifest if it still describes the text."""

    inspection: Inspection
    findings: tuple[TextFinding, ...]
    manifest: Manifest | None


def inspect(request: InspectRequest, context: Context) -> Inspected:
    """Gather the facts about a text and the findings from them; nothing is written.

    Raises :class:`InvalidDataError` for a text, a held-out text or a model that cannot be used, and what fetching a tokenizer
    raises.
    """
    if request.thorough:
        CALIBRATION.require("Inspecting a calibration text")
    path = request.file.expanduser()
    manifest = find_manifest(path) if path.is_file() else None
    stale = manifest is not None and not describes(manifest, path)
    built = None if stale else manifest
    size = path.stat().st_size if path.is_file() else 0
    with _Step(context, "read", f"Reading {path.name}", size) as step:
        text = inspect_text(path, _documents(built), step, thorough=request.thorough)
    parse_special = "--parse-special" if request.parse_special else "manifest" if built and built.parse_special else ""
    tokens = _tokens(request, path, parse_special, context) if request.model else None
    overlap = None
    if request.against is not None:
        with _Step(context, "compare", f"Comparing with {request.against.name}", size) as step:
            overlap = overlap_files(path, request.against.expanduser(), step)
    held_out = printable(request.against.name) if request.against is not None else ""
    inspection = Inspection(text, tokens, request.n_ctx, parse_special, built is not None, stale, overlap, held_out)
    return Inspected(inspection, text_findings(inspection), built)


def _documents(manifest: Manifest | None) -> list[tuple[int, int, str]] | None:
    if manifest is None:
        return None
    names = [printable(source.name) for source in manifest.sources]
    places = (place for place in manifest.documents if 0 <= place.source < len(names))
    return [(place.offset, place.n_bytes, names[place.source]) for place in places]


def _tokens(request: InspectRequest, path: Path, parse_special: str, context: Context) -> TokenFacts:
    model = tokenizer_files(request.model, context, offline=request.offline)
    tokeniser = find_tokeniser(model, Runner(context.stop))
    with _Step(context, "count", f"Counting tokens with {model.name}", path.stat().st_size) as step:
        return inspect_tokens(
            path,
            tokeniser,
            request.n_ctx,
            model=str(model),
            parse_special=parse_special,
            trained_context=_trained_context(model),
            batch_bytes=_HF_BATCH if model.is_dir() else _GGUF_BATCH,
            on_bytes=step,
        )


def _trained_context(model: Path) -> int | None:
    """The model's trained context in tokens, from ``<architecture>.context_length`` or config.json; None if not given."""
    if not model.is_dir():
        header = read_header(model)
        return header.integer(f"{header.text('general.architecture')}.context_length")
    config: Any = read_config(model / "config.json")
    inner = config.get("text_config")
    for each in (config, inner if isinstance(inner, dict) else {}):
        value = each.get("max_position_embeddings")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


class _Step:
    """Emits the progress of a step that takes longer than two seconds, and raises when a stop is requested."""

    def __init__(self, context: Context, name: str, title: str, total: int) -> None:
        self._context, self._name, self._title, self._total = context, name, printable(title), float(total)
        self._began = time.monotonic()
        self._shown = False

    def __enter__(self) -> _Step:
        return self

    def __call__(self, done: int) -> None:
        self._context.stop.check()
        if not self._shown and done < self._total and time.monotonic() - self._began > _SILENT_SECONDS:
            self._shown = True
            self._context.sink(Started(self._name, self._title, self._total, "B"))
        if self._shown:
            self._context.sink(Progress(self._name, float(done), self._total))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._shown:
            seconds = time.monotonic() - self._began
            self._context.sink(Finished(self._name, "failed" if error else "done", str(error) if error else "", seconds))
