"""Downloads one file from a hub into its cache: retries transient errors, and checks size, content and rate."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from imatrix_runner.downloads import LEAST_BYTES, PACE_SECONDS
from imatrix_runner.errors import DownloadError
from imatrix_runner.events import Progress, Sink
from imatrix_runner.files import human_bytes, sha256
from imatrix_runner.models.hub.advice import LONGEST_WAIT, Asked, explain, is_passing, require_address, retry_after
from imatrix_runner.models.hub.choose_files import RepoFile
from imatrix_runner.signals import Stop

if TYPE_CHECKING:
    import httpx2
    import tenacity
    from typing_extensions import Self

T = TypeVar("T")

STEP = "download"
"""The step that download events carry."""

_TRIES = 3

_MOST_RESTARTS = 3

_BLOCK_BYTES = 1 << 20

_PATIENCE_SECONDS = 120.0

_MODEL_PATIENCE_SECONDS = 1200.0

_MOST_SLOW_MINUTES = 2

ANSWER_SECONDS = 60.0
"""Time limit for one answer of the hub's API, from the request to its last byte."""

_NEVER = float("inf")

_ETAG = re.compile(r"[\w.+=-]{1,200}", re.ASCII)


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network."""
    require_address()
    from huggingface_hub import constants

    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def patiently(work: Callable[[], T], asked: Asked, check: Callable[[], None], seconds: float | None = None) -> T:
    """Run ``work``, up to three times with growing pauses after transient errors; raise others with advice at once.

    ``check`` is called in the meantime, and its exception ends the wait. One try may take ``seconds`` in all (None:
    :data:`ANSWER_SECONDS`), even if data keeps arriving.
    """
    import tenacity

    clock = _Clock(asked, ANSWER_SECONDS if seconds is None else seconds)

    def attempt() -> T:
        from imatrix_runner.models.hub.limits import watch_session

        watch_session(_refuse_long_wait, _refuse_odd_etag)
        with clock:
            return work()

    def watch() -> None:
        check()
        clock.check()

    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=_pause,
        retry=tenacity.retry_if_exception(lambda error: is_passing(error) and not clock.expired),
        reraise=True,
    )
    check()
    try:
        return in_background(partial(tries, attempt), watch)
    except Exception as error:
        explained = explain(error, asked)
        if explained is error:
            raise
        raise explained from error


class _Clock:
    """Time limit for one try, as a context manager; the waiting thread checks it."""

    def __init__(self, asked: Asked, seconds: float) -> None:
        self._asked, self._seconds = asked, seconds
        self._until = _NEVER
        self.expired = False

    def __enter__(self) -> None:
        self._until = time.monotonic() + self._seconds

    def __exit__(self, *_error: object) -> None:
        self._until = _NEVER

    def check(self) -> None:
        if time.monotonic() > self._until:
            from huggingface_hub import close_session

            self.expired = True
            close_session()  # unblocks the reading thread
            raise DownloadError(
                f"{self._asked.host} sends too slowly",
                f"its answer about {self._asked.hub_id.repo} was not complete after {self._seconds:g} s",
                "Run the same command again on a better connection, or at another time.",
            )


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked_for = retry_after(error) if error else None
    return min(asked_for if asked_for is not None else 0.5 * 2**state.attempt_number, LONGEST_WAIT)


def cached_file(asked: Asked, file: RepoFile, commit: str, cache: Path) -> Path | None:
    """The file's copy in the cache; None if it is missing or has another size."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(asked.hub_id.repo, file.name, cache_dir=cache, revision=commit, repo_type=asked.repo_type)
    if not isinstance(found, str):
        return None
    whole = file.size is None or Path(found).stat().st_size == file.size
    return Path(found) if whole else None


def download(asked: Asked, file: RepoFile, commit: str, cache: Path, meter: Meter) -> Path:
    """Download a file with the library into its cache; never more than ``file.size`` bytes, if that is known."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    from imatrix_runner.models.hub.limits import paced

    bar: Any = type("_MeteredBar", (_Bar,), {"meter": meter})
    repo = asked.hub_id.repo
    # After a broken transfer the library keeps whole blocks only, and it reports progress per block; its default of 10 MB is as
    # large as a whole imatrix.
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, _BLOCK_BYTES)
    meter.expect(file)
    # A copy of another size is damaged, but the library would use it.
    found = try_to_load_from_cache(repo, file.name, cache_dir=cache, revision=commit, repo_type=asked.repo_type)
    with paced(meter):
        path = Path(
            hf_hub_download(
                repo,
                file.name,
                repo_type=asked.repo_type,
                revision=commit,
                endpoint=asked.endpoint,
                cache_dir=cache,
                force_download=isinstance(found, str),
                tqdm_class=bar,
                library_name="imatrix-runner",
            )
        )
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise _wrong_length(asked, file, size)
    if file.sha256 is not None and (found_sha256 := sha256(path, lambda _bytes: meter.look())) != file.sha256:
        for copy in {path.resolve(), path}:
            copy.unlink(missing_ok=True)  # the library would use it
        raise _wrong_content(asked, file, found_sha256)
    meter.finish(size)
    return path


def _wrong_length(asked: Asked, file: RepoFile, size: int) -> DownloadError:
    return DownloadError(
        f"{file.name} of {asked.hub_id.repo} arrived with the wrong length",
        f"{size} bytes instead of {file.size}; {asked.host} or a proxy sent something else",
        "Run the same command again; if that fails as well, check your proxy and HF_ENDPOINT.",
    )


def _refuse_odd_etag(response: httpx2.Response) -> None:
    """A hook that rejects unsafe etags: the library uses the etag as the name of a file in the cache."""
    for name in ("etag", "x-linked-etag"):
        tag = response.headers.get(name, "").removeprefix("W/").strip('"')
        if tag and not _ETAG.fullmatch(tag):
            raise DownloadError(
                f"{response.url.host} does not answer like a hub",
                f"its etag cannot be the name of a file: {tag[:80]!r}",
                "Check HF_ENDPOINT and your proxy with: imatrix-runner doctor",
            )


def _wrong_content(asked: Asked, file: RepoFile, found: str) -> DownloadError:
    return DownloadError(
        f"{file.name} of {asked.hub_id.repo} arrived with other content than announced",
        f"its SHA-256 is {found}, and {asked.host} announces {file.sha256}; it was removed from the cache",
        "Run the same command again; if that fails as well, check your proxy and HF_ENDPOINT, or tell the repository's owner.",
    )


def _refuse_long_wait(response: httpx2.Response) -> None:
    """A hook that raises for a long ``Retry-After``, because the library would sleep as long as the hub asks."""
    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError("asked to wait", response=response)
    if response.status_code == 429 and (retry_after(error) or 0) > LONGEST_WAIT:
        raise error


class Meter:
    """Reports the progress of all files of a download, and checks for a stop between two blocks.

    It gives up on a connection that delivers no block for twenty minutes (``impatient``: two), or hardly any bytes for three.
    """

    def __init__(self, sink: Sink, stop: Stop, asked: Asked, total: int, *, impatient: bool = False) -> None:
        self._sink, self._stop, self._asked, self._total = sink, stop, asked, total
        self._patience = _PATIENCE_SECONDS if impatient else _MODEL_PATIENCE_SECONDS
        self._moved = time.monotonic()
        self._gave_up: DownloadError | None = None
        self._file = RepoFile("", None)
        self._finished = 0
        self._current = 0
        self._restarts = 0
        self._slow_minutes = 0

    def check(self) -> None:
        """For the waiting thread: raise once a stop was requested or nothing has arrived for too long."""
        self._stop.check()
        if time.monotonic() - self._moved > self._patience:
            from huggingface_hub import close_session

            self._gave_up = self._too_slow(self._patience, _BLOCK_BYTES)
            close_session()  # unblocks the reading thread, so that it removes its unfinished file
            raise self._gave_up

    def _too_slow(self, seconds: float, n_bytes: int) -> DownloadError:
        return DownloadError(
            f"{self._asked.host} sends too slowly",
            f"in {seconds:g} s less than {human_bytes(n_bytes)} of {self._file.name} arrived",
            "Run the same command again on a better connection, or at another time.",
        )

    def slow_minute(self) -> None:
        """Called when the file hardly grew for a minute: continue twice with another connection, then give up."""
        self._go_on()
        self._slow_minutes += 1
        if self._slow_minutes > _MOST_SLOW_MINUTES:
            raise self._too_slow(PACE_SECONDS * self._slow_minutes, LEAST_BYTES * self._slow_minutes)

    def expect(self, file: RepoFile) -> None:
        """Start a new file, or another try of the same."""
        self._go_on()
        self._file = file
        self._moved = time.monotonic()

    def begin(self, initial: int, total: int | None) -> None:
        """Called with the sizes from the answer's headers: refuse more bytes than announced before any is read."""
        if self._file.size is not None and (total or 0) > self._file.size:
            raise _wrong_length(self._asked, self._file, total or 0)
        self._current = initial

    def _go_on(self) -> None:
        """For the working thread: raise if a stop was requested or the waiting thread has given up."""
        self._stop.check()
        if self._gave_up is not None:
            raise self._gave_up

    def look(self) -> None:
        """For the working thread while it reads no data: check for a stop and reset the stall timer."""
        self._go_on()
        self._moved = time.monotonic()

    def add(self, count: int) -> None:
        self._go_on()
        if count < 0:
            # The server cannot resume. The library would start over without end as long as some bytes arrive.
            self._restarts += 1
            if self._restarts > _MOST_RESTARTS:
                raise DownloadError(
                    f"The connection to {self._asked.host} was cut repeatedly",
                    f"the server cannot resume a download, and this one broke off {self._restarts} times",
                    "Run the same command again on a better connection.",
                )
        self._current += count
        self._moved = time.monotonic()
        self._slow_minutes = 0
        if self._file.size is not None and self._current > self._file.size:
            raise _wrong_length(self._asked, self._file, self._current)
        self._sink(Progress(STEP, float(self._finished + self._current), float(self._total)))

    def finish(self, size: int) -> None:
        self._finished += size
        self._current = 0


class _Bar:
    """A progress bar for huggingface_hub that reports to a :class:`Meter`: the part of tqdm's interface that it uses."""

    meter: ClassVar[Meter]

    def __init__(self, *, initial: int = 0, total: int | None = None, **_look: object) -> None:
        self.total = total
        self.meter.begin(initial, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def update(self, count: float | None = 1) -> None:
        self.meter.add(int(count or 0))

    def update_transfer(self, count: float | None = 1) -> None:
        """Does nothing: with Xet, bytes transferred are not the file's bytes, and only the latter are reported."""

    def refresh(self) -> None:
        """Does nothing: the views draw progress."""

    def close(self) -> None:
        """Nothing to close."""

    def set_postfix_str(self, _text: str, refresh: bool = True) -> None:
        """Does nothing: the views compute rates."""

    set_transfer_postfix_str = set_postfix_str


R = TypeVar("R")

_POLL_SECONDS = 0.1

_FAREWELL_SECONDS = 2.0


def in_background(work: Callable[[], R], check: Callable[[], None]) -> R:
    """Run ``work`` in a thread and return its result; meanwhile call ``check`` repeatedly, whose exception ends the wait.

    The thread then has two seconds to end and clean up. It is a daemon thread, so it never keeps the process alive.
    """
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([future], timeout=_POLL_SECONDS).done:
        try:
            check()
        except BaseException:
            wait([future], timeout=_FAREWELL_SECONDS)
            raise
    return future.result()
