"""The documents of ``--json``: one per command, versioned. Keys may be added; no key changes its meaning."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from imatrix_runner import __version__
from imatrix_runner.app.evaluate import EvaluateResult
from imatrix_runner.app.publish import PublishResult
from imatrix_runner.app.run import RunResult
from imatrix_runner.errors import RunnerError
from imatrix_runner.evaluate.speed_figures import MeasuredSpeed
from imatrix_runner.files import readable
from imatrix_runner.imatrix.collection_facts import CollectedFacts
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.quantize.executor import LevelResult
from imatrix_runner.quantize.plan import LevelStep, MeasureStep, MixingStep, Plan, PredictedKld
from imatrix_runner.toolchain.capabilities import MatrixSupport
from imatrix_runner.toolchain.probe import Toolchain

VERSION = 1


def print_document(document: dict[str, Any]) -> None:
    try:
        data = msgspec.json.encode(document)
    except UnicodeEncodeError:
        data = msgspec.json.encode(_readable(msgspec.to_builtins(document)))
    sys.stdout.write(msgspec.json.format(data, indent=2).decode() + "\n")
    sys.stdout.flush()  # so that a closed pipe is noticed here, where it is handled


def _readable(value: Any) -> Any:
    """The value with bytes that are not UTF-8, as in file names, written as ``\\xe9``."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, dict):
        return {_readable(key): _readable(each) for key, each in value.items()}
    return [_readable(each) for each in value] if isinstance(value, (list, tuple)) else value


def document(kind: str, **content: Any) -> dict[str, Any]:
    """A document with the envelope that all share."""
    return {"schema": f"imatrix-runner/{kind}", "version": VERSION, "program": __version__, **content}


def error_document(error: RunnerError, todo: str) -> dict[str, Any]:
    content = {"kind": error.kind, "what": error.what, "why": error.why, "do": todo}
    return document("error", exit_code=error.exit_code, error=content)


def run_document(result: RunResult, exit_code: int) -> dict[str, Any]:
    model = result.model
    return document(
        "run",
        exit_code=exit_code,
        model={
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.n_params,
            "bytes": model.n_bytes,
            "type": model.main_type,
            "files": [str(path) for path in model.files],
            "source": msgspec.to_builtins(model.source),
        },
        engine=result.engine,
        toolchain=result.toolchain,
        plan=plan_content(result.plan),
        imatrix=imatrix_content(result.imatrix) if result.imatrix is not None else None,
        collected=collected_content(result.collected) if result.collected is not None else None,
        levels=[_level(level) for level in result.levels],
        passes=[msgspec.to_builtins(figures) for figures in result.passes],
        measured=measured_content(result.evaluated) if result.evaluated is not None else None,
        report=[str(path) for path in result.report.paths] if result.report is not None else [],
        published=publish_content(result.published) if result.published is not None else None,
        unpublished=error_content(result.unpublished) if result.unpublished is not None else None,
        seconds=round(result.seconds, 3),
    )


def _measure_step(step: MeasureStep) -> dict[str, Any]:
    """The content of ``measure``; for baselines the document keeps its older name, ``twins``."""
    document: dict[str, Any] = _plain(step)
    document["twins"] = document.pop("baselines")
    return document


def _mixing_step(step: MixingStep) -> dict[str, Any]:
    return {**_plain(step), "rounding_seconds": step.rounding_seconds, "trial_seconds": step.trial_seconds}


def measured_content(result: EvaluateResult) -> dict[str, Any]:
    """``levels`` are the figures of :class:`~imatrix_runner.engines.measures.Divergence` by name."""
    return {
        "levels": {name: _plain(found) for name, found in result.measured.items()},
        "failed": {name: error_content(error) for name, error in result.failed.items()},
        "comparisons": [_plain(pair) for pair in result.comparisons],
        "mixes": [_plain(verdict) for verdict in result.mixes],
        "domain": [_plain(found) for found in result.domain],
        "tasks": [_plain(found) for found in result.tasks],
        "target": _plain(result.target) if result.target is not None else None,
        "speeds": {name: _speed(found) for name, found in result.speeds.items()},
        "speed_pick": _plain(result.fast) if result.fast is not None else None,
        "seconds": round(result.seconds, 3),
    }


def _speed(found: MeasuredSpeed) -> dict[str, Any]:
    rates = {"prompt": found.prompt, "generation": found.generation}
    errors = {name: each.error if each.runs > 1 else None for name, each in rates.items()}
    content: dict[str, Any] = _plain(found)
    return {**content, **{name: {**content[name], "error": errors[name]} for name in rates}, "bytes": found.n_bytes}


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, str_keys=True)


def error_content(error: RunnerError) -> dict[str, str]:
    return {"kind": error.kind, "what": error.what, "why": error.why, "do": error.todo}


def publish_content(result: PublishResult) -> dict[str, Any]:
    """What ``publish --json`` shows, also within the document of ``run``."""
    return {
        "repo": result.repo,
        "url": result.url,
        "commit": result.commit or None,
        "verified": result.verified,
        "bytes": result.n_bytes,
        "seconds": round(result.seconds, 3),
        "collection": result.collection or None,
        "files": [msgspec.to_builtins(file) for file in result.files],
        "planned": [msgspec.to_builtins(file) for file in result.planned],
    }


def plan_content(plan: Plan) -> dict[str, Any]:
    return {
        "workspace": str(plan.workspace),
        "imatrix": {
            "action": plan.imatrix.action,
            "path": str(plan.imatrix.path) if plan.imatrix.path else None,
            "reason": plan.imatrix.reason,
            "chunks": plan.imatrix.n_chunks,
            "tokens": plan.imatrix.n_tokens,
        },
        "levels": [_planned(step, plan.predicted.get(step.level.name)) for step in plan.levels],
        "measure": _measure_step(plan.measure) if plan.measure is not None else None,
        "mixing": _mixing_step(plan.mixing) if plan.mixing is not None else None,
        "notes": list(plan.notes),
        "new_bytes": plan.new_bytes,
        "free_bytes": plan.free_bytes,
    }


def _planned(step: LevelStep, predicted: PredictedKld | None) -> dict[str, Any]:
    facts = step.facts
    return {
        "level": step.level.name,
        "ftype": step.level.ftype,
        "state": step.state,
        "reason": step.reason,
        "remedy": step.remedy,
        "files": [str(path) for path in step.files],
        "bytes": facts.n_bytes,
        "bits_per_weight": facts.bits_per_weight,
        "needs_imatrix": facts.needs_imatrix,
        "fallbacks": [msgspec.to_builtins(fallback) for fallback in facts.fallbacks],
        "fallback_share": facts.fallback_share,
        "without_weights": list(facts.weightless),
        "unseen": list(facts.unseen),
        "pinned": list(facts.pinned),
        "predicted_kld": _plain(predicted) if predicted is not None else None,
    }


def imatrix_content(file: MatrixFile) -> dict[str, Any]:
    matrix = file.matrix
    return {
        "path": str(file.path),
        "format": file.format,
        "entries": len(matrix.entries),
        "chunks": matrix.chunk_count,
        "chunk_size": matrix.chunk_size,
        "datasets": list(matrix.datasets),
    }


def collected_content(facts: CollectedFacts) -> dict[str, Any]:
    """How an imatrix was collected here. ``stopped``: ``chunks``, ``converged``, ``covered`` or ``text``; each point of the
    ``curve`` has ``chunks``, ``worst``, ``tensor`` and ``median``."""
    names = ("chunks", "ranges", "tokens", "dataset", "ppl", "ppl_error", "ppl_chunks", "stopped", "curve", "calibration")
    plain = msgspec.to_builtins(facts)
    return {name: plain.get(name) for name in names}


def _level(level: LevelResult) -> dict[str, Any]:
    error = level.error
    return {
        "level": level.step.level.name,
        "status": level.status,
        "files": [str(path) for path in level.step.files] if level.status != "failed" else [],
        "bytes": level.n_bytes,
        "bits_per_weight": level.step.facts.bits_per_weight,
        "seconds": round(level.seconds, 3),
        "share": level.share,
        "copied_from": level.copied_from or None,
        "without_weights": list(level.without_weights),
        "error": error_content(error) if error else None,
    }


def toolchain_content(toolchain: Toolchain, formats: MatrixSupport) -> dict[str, Any]:
    return {
        "identity": toolchain.identity(),
        "directory": str(toolchain.directory),
        "origin": toolchain.origin,
        "version": toolchain.version,
        "build": toolchain.build,
        "commit": toolchain.commit,
        "backends": list(toolchain.backends),
        "devices": list(toolchain.devices),
        "programs": {name: str(path) for name, path in sorted(toolchain.tools.items())},
        "converter": str(toolchain.converter) if toolchain.converter else None,
        "types": [kind.name for kind in toolchain.types],
        "imatrix": {"reads": formats.reads, "writes": formats.writes},
    }
