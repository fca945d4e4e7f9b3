"""Progress of uploads through Xet, which the library shows on bars of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from imatrix_runner.models.hub.sending import SendMeter

_REPORTER = "XetUploadProgressReporter"


class _Reporter:
    """Takes the place of the library's reporter of Xet uploads, and counts into a meter."""

    def __init__(self, meter: SendMeter) -> None:
        self._meter, self._done = meter, 0
        meter.begin("xet")

    def update_progress(self, group_report: Any, *_items: Any) -> None:
        done = int(getattr(group_report, "total_bytes_completed", 0))
        self._meter.add("xet", max(0, done - self._done))
        self._done = max(done, self._done)

    def close(self) -> None:
        """Nothing to close."""


@contextmanager
def library_progress(meter: SendMeter) -> Iterator[None]:
    """While this context is active, the library draws no bars: uploads through Xet are counted into ``meter`` (those through
    plain HTTP are counted by a hook of its session)."""
    from huggingface_hub.utils import _xet_progress_reporting as library
    from huggingface_hub.utils._runtime import is_xet_available
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

    if not is_xet_available():
        if not are_progress_bars_disabled():
            disable_progress_bars()
        yield
        return
    before = library.XetUploadProgressReporter
    setattr(library, _REPORTER, lambda: _Reporter(meter))
    try:
        yield
    finally:
        setattr(library, _REPORTER, before)
