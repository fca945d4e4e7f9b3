"""The events of one model among several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from imatrix_runner.events import Event, Finished, Notice, Progress, Saved, Sink, Started

DOWNLOAD_STEP = "download"
"""The step of events of a download."""


@dataclass
class ModelSink:
    """Passes events of one model on with its name, and the progress of its steps to the page."""

    model: str
    sink: Sink
    progressed: Callable[[str, float | None], None]
    downloads: bool
    steps: dict[str, Started] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if isinstance(event, (Started, Progress, Finished)) and event.step == DOWNLOAD_STEP and not self.downloads:
            return  # what is looked up again in the cache
        if isinstance(event, Started):
            self.steps[event.step] = event
            self.progressed(event.title, None)
            event = Started(self._step(event.step), f"{self.model}: {event.title}", event.total, event.unit)
        elif isinstance(event, Progress):
            begun = self.steps.get(event.step)
            total = event.total or (begun.total if begun is not None else None)
            if begun is not None:
                self.progressed(begun.title, min(1.0, event.done / total) if total else None)
            event = Progress(self._step(event.step), event.done, event.total, event.note)
        elif isinstance(event, Finished):
            event = Finished(self._step(event.step), event.status, event.detail, event.seconds)
        elif isinstance(event, Notice):
            event = Notice(event.level, f"{self.model}: {event.text}")
        elif not isinstance(event, Saved):
            return  # metrics of a step have no place among several models
        self.sink(event)

    def _step(self, step: str) -> str:
        return f"{self.model} {step}"
