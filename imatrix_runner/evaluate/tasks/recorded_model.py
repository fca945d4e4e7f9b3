"""lm-evaluation-harness's model over an engine of ours, which has computed all requests before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from imatrix_runner.engines.task_jobs import TaskOutcome

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class RecordedModel(LM):  # type: ignore[misc]
    """Answers the requests of ``instances`` with their ``outcomes``, in the same order."""

    def __init__(self, instances: Sequence[Instance], outcomes: Sequence[TaskOutcome]) -> None:
        super().__init__()
        self._outcomes = {id(instance): outcome for instance, outcome in zip(instances, outcomes, strict=True)}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(outcome.value, outcome.greedy) for outcome in self._of(requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [outcome.value for outcome in self._of(requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [outcome.text for outcome in self._of(requests)]

    def _of(self, requests: Sequence[Any]) -> list[TaskOutcome]:
        return [self._outcomes[id(each)] for each in requests]
