"""Which announced models a watch takes: those that the options of ``--watch`` ask for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from imatrix_runner.batch.batch_journal import BatchHistory
from imatrix_runner.batch.check_list import CheckedModel
from imatrix_runner.context.requests import WatchRequest
from imatrix_runner.models.hub import Announcement, WatchedPlace


def is_new(announced: Announcement, place: WatchedPlace, request: WatchRequest, history: BatchHistory) -> bool:
    """Whether a model appeared at a place since the watch began there. What is in a collection, or trends, always counts as
    new; with ``since``, what was created on that day or later."""
    if request.since:
        return not announced.created or announced.created[:10] >= request.since
    if place.kind != "owner":
        return True
    first = history.watched.get(str(place))
    if first is None:
        return False
    return announced.repo.lower() not in {repo.lower() for repo in first.there} and announced.created >= first.oldest


def refusal(announced: Announcement, request: WatchRequest) -> str:
    """Why a model is left out, as a clause; empty if it is taken as far as its announcement says."""
    if request.since and announced.created[:10] < request.since:
        return f"it was created on {announced.created[:10] or 'no known day'}, before {request.since}"
    if announced.problem:
        return announced.problem
    too_large = _too_large(announced.n_params, request)
    names, licences = announced.architectures, announced.licences
    if request.architectures and not _meet(names, request.architectures):
        return f"its architecture is {names[0] if names else 'not announced'}"
    if request.licences and not _meet(licences, request.licences):
        return f"its licence is {', '.join(licences) or 'not announced'}"
    return too_large


def refusal_checked(model: CheckedModel, request: WatchRequest) -> str:
    """The same for what the check of a list found out; the number of weights is known then, also if it was not announced."""
    if model.problem is not None:
        return f"{model.problem.what}: {model.problem.why}"
    return _too_large(model.n_params, request)


def _too_large(n_params: int | None, request: WatchRequest) -> str:
    if request.most_params is None or n_params is None or n_params <= request.most_params:
        return ""
    return f"it has {n_params / 1e9:.3g} B weights, and at most {request.most_params / 1e9:.3g} B are asked for"


def _meet(announced: Sequence[str], wanted: Sequence[str]) -> bool:
    return not {name.casefold() for name in announced}.isdisjoint(name.casefold() for name in wanted)
