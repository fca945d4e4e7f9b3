"""``run --publish``: levels are uploaded in a thread as they are finished, while others are made and measured."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from imatrix_runner.app.publish import PublishJob, PublishResult, command_of, publisher_of
from imatrix_runner.context.context import Session
from imatrix_runner.context.requests import PublishRequest
from imatrix_runner.errors import InterruptedRunError, RunnerError, UploadError
from imatrix_runner.events import warning
from imatrix_runner.models.hub import PublishingHub
from imatrix_runner.publish.local_files import ready_level
from imatrix_runner.publish.published_names import planned_paths
from imatrix_runner.quantize.plan import LevelStep
from imatrix_runner.signals import Stop

_POLL_SECONDS = 0.1


class _LinkedStop(Stop):
    """A stop of its own that also follows another."""

    def __init__(self, other: Stop) -> None:
        super().__init__()
        self._other = other

    @property
    def requested(self) -> bool:
        return super().requested or self._other.requested

    def check(self) -> None:
        self._other.check()
        super().check()


class LevelUploads:
    """The uploads of one run. A level that could not be uploaded is tried once more at the end; the run goes on meanwhile."""

    def __init__(self, job: PublishJob, session: Session, stop: Stop) -> None:
        self._job, self._session, self._stop = job, session, stop
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._names: list[str] = []
        self._failed: list[str] = []
        self._template_checked = False
        self._bug: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def check(self, steps: tuple[LevelStep, ...]) -> None:
        """Refuse a plan whose levels cannot be published under their names: these are against a rule, or taken."""
        possible = [step for step in steps if step.state != "fails" and step.files]
        levels = [(step.level.name, step.level.ftype, len(step.files)) for step in possible]
        paths = planned_paths(levels, self._session.workspace.model, self._job.request.name_template)
        todo = [path for step in possible if step.state == "todo" for path in paths[step.level.name]]
        self._job.publisher.refuse_taken(todo)
        for step in possible:
            if len(step.files) == 1:
                self._job.warn_of_size(step.files[0].name, step.facts.n_bytes or 0)

    def begin(self) -> None:
        self._thread.start()

    def add(self, level: str) -> None:
        """A level is finished; called from any thread."""
        self._waiting.put(level)

    def stop(self) -> None:
        """End uploads at once; what is unfinished is uploaded by the next command."""
        self._stop.request()
        self._waiting.put(None)

    def finish(self, began: float) -> PublishResult:
        """Wait for the uploads, and publish what comes with the levels. Raises :class:`UploadError` with the command to type
        if not everything is on the hub."""
        self._waiting.put(None)
        while self._thread.is_alive():
            self._session.stop.check()
            self._thread.join(_POLL_SECONDS)
        if self._bug is not None:
            raise self._bug
        try:
            for name in self._failed:
                self._upload(name)
            report = self._job.report(self._session.runner, self._session.sink, dry_run=False)
            levels = [ready_level(self._session.workspace, self._session.journal, name) for name in self._names]
            last = self._job.last_unit(report, levels)
            self._job.look_through([last])
            return self._job.finish(last, began)
        except InterruptedRunError:
            raise
        except RunnerError as error:
            raise UploadError(
                error.what,
                f"{error.why.rstrip('.')}; the levels are kept",
                f"{error.todo} Publish what is missing with: {command_of(self._session.workspace.root, self._job.request)}",
            ) from error

    def _work(self) -> None:
        while (name := self._waiting.get()) is not None and not self._stop.requested:
            self._names.append(name)
            try:
                self._upload(name)
            except InterruptedRunError:
                return
            except RunnerError as error:
                self._failed.append(name)
                self._session.sink(warning(f"{name} is not published yet, and is tried again at the end: {error}."))
            except BaseException as bug:  # noqa: BLE001 - raised again where the run waits for this thread
                self._bug = bug
                return

    def _upload(self, name: str) -> None:
        level = ready_level(self._session.workspace, self._session.journal, name)
        if not self._template_checked:
            self._template_checked = True
            self._job.tell_of_template([level], self._session.runner)
        self._job.upload(level)


@contextmanager
def level_uploads(request: PublishRequest | None, session: Session) -> Iterator[LevelUploads | None]:
    """Check that the request can be carried out, hours before it is, and yield its uploads; None without a request. Leaving
    this context by an error ends them."""
    if request is None:
        yield None
        return
    stop = _LinkedStop(session.stop)
    hub = PublishingHub(stop, session.sink)
    job = PublishJob(request, session.workspace, session.journal, publisher_of(request, hub, session.sink))
    job.publisher.check()
    uploads = LevelUploads(job, session, stop)
    if not session.dry_run:
        uploads.begin()
    try:
        yield uploads
    finally:
        uploads.stop()


def try_to_finish(uploads: LevelUploads | None) -> tuple[PublishResult | None, RunnerError | None]:
    """What was published, or why not all of it; both None without a request."""
    if uploads is None:
        return None, None
    began = time.monotonic()
    try:
        return uploads.finish(began), None
    except UploadError as error:
        return None, error
