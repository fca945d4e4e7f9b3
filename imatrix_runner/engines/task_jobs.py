"""The job that computes the requests of tasks with a model, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.engines.jobs import CollectOptions


@dataclass(frozen=True)
class TaskRequest:
    """One request of a task, in the terms of lm-evaluation-harness.

    ``loglikelihood``: how likely ``continuation`` is after ``context``; ``rolling``: how likely all of ``context`` is;
    ``generate``: the most likely continuation of ``context``, up to the first of the texts ``until``, of at most ``n_predict``
    tokens. Control tokens that are written out in the texts are read as control tokens.
    """

    kind: Literal["loglikelihood", "rolling", "generate"]
    context: str
    continuation: str = ""
    until: tuple[str, ...] = ()
    n_predict: int = 0


@dataclass(frozen=True)
class TaskJob:
    """Let ``model`` compute the requests in ``requests`` (a :class:`TaskRequest` on each line, as JSON), and write the outcomes
    to ``out`` (:mod:`~imatrix_runner.engines.files.task_outcomes`). Unfinished work with the same ``fingerprint`` is continued.
    The ``options`` about chunks have no effect."""

    step: str
    model: Path
    requests: Path
    out: Path
    options: CollectOptions
    fingerprint: str
    log: Path | None


@dataclass(frozen=True)
class TaskOutcome:
    """What a model gave for request number ``request`` (from 0). ``value``: ln of the text's probability, ``greedy``: whether
    each of its tokens was the most likely one; ``text``: what was generated, without the text that ended it. ``ended``: the
    model or a text of ``until`` ended it before the limit. ``dropped``: tokens cut off at the beginning, because the model's
    context is shorter.

    A long text takes several ``parts``, of which this is number ``part``; :meth:`add` joins them.
    """

    request: int
    value: float = 0.0
    greedy: bool = True
    text: str = ""
    n_tokens: int = 0
    ended: bool = False
    dropped: int = 0
    part: int = 0
    parts: int = 1

    def add(self, other: TaskOutcome) -> TaskOutcome:
        """This part and another one of the same request."""
        return TaskOutcome(
            self.request,
            self.value + other.value,
            self.greedy and other.greedy,
            n_tokens=self.n_tokens + other.n_tokens,
            dropped=self.dropped + other.dropped,
            parts=self.parts,
        )
