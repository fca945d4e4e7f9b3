"""Runs requests that change a hub: in a thread that can be stopped, with retries, progress, and the token for the hub alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from imatrix_runner.errors import UploadError
from imatrix_runner.events import Progress, Sink, info
from imatrix_runner.files import human_seconds
from imatrix_runner.models.hub.advice import Asked
from imatrix_runner.models.hub.limits import watch_session
from imatrix_runner.models.hub.transfer import in_background
from imatrix_runner.models.hub.upload_advice import LONGEST_UPLOAD_WAIT, explain_upload, is_bug, passes, pause_of
from imatrix_runner.signals import Stop
from imatrix_runner.untrusted import split_url

if TYPE_CHECKING:
    import httpx2
    import tenacity

T = TypeVar("T")

_TRIES = 5
_LIBRARY_WAITS = 8.0
"""Seconds that the library itself may sleep at a hub's request; longer pauses are waited for here, where a stop ends them."""
_PATIENCE_SECONDS = 1200.0
"""An upload of which nothing has moved for so long is given up."""


class SendMeter:
    """Counts the bytes of files that are sent, reports them as the progress of ``step``, and watches for a stop."""

    def __init__(self, sink: Sink, stop: Stop, asked: Asked, step: str, total: int) -> None:
        self._sink, self._stop, self._asked, self._step, self._total = sink, stop, asked, step, total
        self._lock = threading.Lock()
        self._sent: dict[str, int] = {}
        self._moved = time.monotonic()

    def check(self) -> None:
        """For the waiting thread: raise once a stop was requested or nothing has moved for too long."""
        self._stop.check()
        if time.monotonic() - self._moved > _PATIENCE_SECONDS:
            from huggingface_hub import close_session

            close_session()  # unblocks the sending thread
            raise UploadError(
                f"{self._asked.host} accepts no data",
                f"for {_PATIENCE_SECONDS:g} s nothing could be sent",
                "Run the same command again on a better connection: it uploads only what is missing.",
            )

    def begin(self, what: str) -> None:
        """A request begins to send its body, perhaps not for the first time."""
        self.add(what, -self._sent.get(what, 0))

    def add(self, what: str, count: int) -> None:
        """For the sending thread: so many more bytes of ``what`` were handed over; raises once a stop was requested."""
        self._stop.check()
        with self._lock:
            self._sent[what] = self._sent.get(what, 0) + count
            done = min(sum(self._sent.values()), self._total)
        self._moved = time.monotonic()
        self._sink(Progress(self._step, float(done), float(self._total)))

    def look(self) -> None:
        """Reset the stall timer: something else was done."""
        self._moved = time.monotonic()


def send(work: Callable[[], T], asked: Asked, stop: Stop, sink: Sink, meter: SendMeter | None = None, tries: int = _TRIES) -> T:
    """Run ``work`` in a thread, again after errors that pass; other errors are raised with advice.

    ``work`` begins by looking at the hub, so that it may be repeated. A stop ends the wait at once.
    """
    import tenacity

    hooks = _Hooks(asked, meter)

    def attempt() -> T:
        stop.check()  # it may have been requested during a pause
        hooks.install()
        return work()

    def told(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if meter is not None:
            meter.look()
        if (wait := _pause(state)) >= _LIBRARY_WAITS:
            why = explain_upload(error, asked).what if error is not None else "The upload failed"
            sink(info(f"{why}; the next attempt is in {human_seconds(wait)}."))

    repeated = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(tries),
        wait=_pause,
        retry=tenacity.retry_if_exception(passes),
        before_sleep=told,
        reraise=True,
    )
    check = meter.check if meter is not None else stop.check
    check()
    try:
        return in_background(partial(repeated, attempt), check)
    except Exception as error:
        explained = explain_upload(error, asked)
        if explained is error or is_bug(error):
            raise
        raise explained from error
    finally:
        hooks.remove()


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked_for = pause_of(error)
    return min(asked_for if asked_for is not None else 0.5 * 2**state.attempt_number, LONGEST_UPLOAD_WAIT)


class _Hooks:
    """Hooks of the library's session while something is sent: files are counted, and the token stays at the hub."""

    def __init__(self, asked: Asked, meter: SendMeter | None) -> None:
        self._origin = _origin(asked.endpoint)
        self._meter = meter

    def install(self) -> None:
        """Put them into the session in use; the library makes a new one after a close."""
        from huggingface_hub import get_session

        watch_session(_refuse_long_sleep)
        requests: list[Any] = get_session().event_hooks["request"]
        requests += [self] if self not in requests else []

    def remove(self) -> None:
        """Take them out again: all of the process share the session, and later requests may go to another hub. The lists are
        replaced, because a request of another thread may be going through them."""
        from huggingface_hub import get_session

        hooks = get_session().event_hooks
        hooks["request"] = [hook for hook in hooks["request"] if hook is not self]
        hooks["response"] = [hook for hook in hooks["response"] if hook is not _refuse_long_sleep]

    def __call__(self, request: httpx2.Request) -> None:
        if _origin(str(request.url)) != self._origin:
            request.headers.pop("Authorization", None)
        if request.method == "PUT" and self._meter is not None and not request.url.path.startswith("/api/"):
            request.stream = _counted(request.stream, self._meter, str(request.url))


def _counted(stream: Any, meter: SendMeter, what: str) -> Any:
    import httpx2

    class Counted(httpx2.SyncByteStream):
        """The body of a request, counted block by block."""

        def __iter__(self) -> Iterator[bytes]:
            meter.begin(what)
            for block in stream:
                yield block
                meter.add(what, len(block))

        def close(self) -> None:
            stream.close()

    return Counted()


def _origin(address: str) -> tuple[str, str, int | None]:
    parts = split_url(address)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _refuse_long_sleep(response: httpx2.Response) -> None:
    """A hook that raises where the library would sleep for long: that sleep could not be stopped."""
    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError("asked to wait", response=response)
    if response.status_code in (429, 503) and (pause_of(error) or 0) > _LIBRARY_WAITS:
        raise error
