"""The documents that ``batch`` prints with ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from imatrix_runner.app.batch import BatchPlan, BatchResult
from imatrix_runner.app.batch_watch import PlaceLook
from imatrix_runner.batch.batch_list import BatchEntry
from imatrix_runner.batch.check_list import CheckedModel
from imatrix_runner.batch.overview import BatchView
from imatrix_runner.cli.views.json_documents import document


def batch_document(result: BatchResult, exit_code: int) -> dict[str, Any]:
    """A batch's plan, and its end unless it was a dry run."""
    return document(
        "batch",
        exit_code=exit_code,
        plan=_plan(result.plan),
        batch=_view(result.view) if result.view is not None else None,
        seconds=round(result.seconds, 3),
        most_held_bytes=result.most_held,
        looks=[_look(look) for look in result.looks],
    )


def _look(look: PlaceLook) -> dict[str, Any]:
    return {
        "place": str(look.place),
        "listed": look.listed,
        "would_add": [model.entry.model for model in look.fitting],
        "left_out": dict(look.left_out),
        "waiting": look.waiting,
        "first": look.first is not None,
        "problem": look.problem or None,
    }


def view_document(kind: str, view: BatchView) -> dict[str, Any]:
    return document(kind, exit_code=0, batch=_view(view))


def added_document(entries: Sequence[BatchEntry]) -> dict[str, Any]:
    return document("batch-add", exit_code=0, added=[entry.model for entry in entries])


def _plan(plan: BatchPlan) -> dict[str, Any]:
    return {
        "file": str(plan.file),
        "keep": plan.keep,
        "limit_bytes": plan.limit,
        "peak_bytes": plan.peak,
        "expected_seconds": plan.seconds,
        "lanes": plan.lanes,
        "finished": list(plan.finished),
        "do_not_fit": list(plan.misfits),
        "models": [_checked(model, plan) for model in plan.models],
    }


def _checked(model: CheckedModel, plan: BatchPlan) -> dict[str, Any]:
    return {
        "model": model.entry.model,
        "priority": model.entry.priority,
        "name": model.name,
        "kind": model.kind or None,
        "architecture": model.architecture or None,
        "licence": model.licence or None,
        "gated": model.gated,
        "commit": model.commit or None,
        "parameters": model.n_params or None,
        "download_bytes": model.missing,
        "source_bytes": model.source,
        "levels": [{"level": level.name, "about_bytes": level.n_bytes} for level in model.levels],
        "publish": model.repo or None,
        "expected_seconds": plan.model_seconds.get(model.entry.model),
        "notes": list(model.notes),
        "problem": msgspec.to_builtins(model.problem),
    }


def _view(view: BatchView) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(view)
    for model, plain in zip(view.models, found["models"], strict=True):
        plain["levels_made"] = model.n_made
    return found
