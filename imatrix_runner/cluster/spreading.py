"""One task being done by the workers: which unit goes to whom, and what becomes of those that are lost."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from imatrix_runner.cluster.node_facts import NodeFacts
from imatrix_runner.cluster.node_worker import Absent, Problem, ResultInFile, Stopped, Task
from imatrix_runner.cluster.shared_files import BLOCK, SharedFile
from imatrix_runner.cluster.unit_queue import MOST_FAILURES, MOST_LOSSES, UnitQueue
from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, ToolchainError, UsageError
from imatrix_runner.events import Sink, detail, info, warning
from imatrix_runner.files import human_bytes
from imatrix_runner.signals import Stop

LOST_SECONDS = 120.0
"""How long the run waits for any worker, after all were lost."""

POLL_SECONDS = 0.5
"""How long the driver waits for a unit to end before it looks at everything else."""

_STOP_SECONDS = 120.0
_MOST_SENT = 16 << 30
"""Larger files are not sent through Ray's object store: they would take longer than the work is worth."""

_ERRORS: Mapping[int, type[RunnerError]] = {
    kind.exit_code: kind for kind in (UsageError, ToolchainError, EngineError, InvalidDataError, NoSpaceError)
}


@dataclass(frozen=True)
class FetchedFile:
    """A :class:`~.node_worker.ResultInFile` as the driver gets it: the value, and the file's content in blocks with their
    places, fetched as they are used."""

    value: Any
    blocks: Iterator[tuple[int, bytes]]


OnResult = Callable[[int, Any], bool]
"""Called with a unit's number and its result, in any order; returns whether to continue."""

OnNews = Callable[[Mapping[int, float]], None]
"""Called with how much of each unit in work is done."""


@dataclass
class RemoteWorker:
    """A worker as the driver sees it: Ray's handle, its machine, and whether it takes units. ``proof``: of a restarted one."""

    number: int
    handle: Any
    facts: NodeFacts | None = None
    takes: bool = True
    proof: Any = None
    news: Any = None
    partial: Mapping[int, float] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return self.facts.host if self.facts is not None else "a machine"


class Spreading:
    """One task being done by the workers; ``welcome`` lets restarted ones take units again."""

    def __init__(
        self,
        ray: Any,
        workers: list[RemoteWorker],
        welcome: Callable[[], object],
        sink: Sink,
        stop: Stop,
        task: Task,
    ) -> None:
        self._ray, self._workers, self._welcome, self._sink, self._stop = ray, workers, welcome, sink, stop
        self._key = secrets.token_hex(8)
        self._task = ray.put(task)
        self._asked: dict[Any, tuple[RemoteWorker, int]] = {}
        self._sent: dict[Any, set[SharedFile]] = {}  # since a worker was asked

    def run(self, queue: UnitQueue, on_result: OnResult, on_news: OnNews) -> None:
        lonely_since: float | None = None
        try:
            while not queue.over:
                if self._stop.requested:
                    self._stopped(queue, on_result)
                    self._stop.check()
                self._welcome()
                if not self._workers:
                    raise _no_worker()
                self._give(queue)
                if not self._asked:
                    lonely_since = lonely_since or time.monotonic()
                    if time.monotonic() - lonely_since > LOST_SECONDS:
                        raise _no_worker()
                    time.sleep(POLL_SECONDS)
                    continue
                lonely_since = None
                for ready in self._ray.wait(list(self._asked), num_returns=1, timeout=POLL_SECONDS)[0]:
                    if not self._take(ready, queue, on_result):
                        return
                self._hear(on_news)
        finally:
            self._asked.clear()  # their workers close this task when the next one begins

    def _give(self, queue: UnitQueue) -> None:
        """Ask the workers for units: each for one, then each for a second."""
        takers = [worker for worker in self._workers if worker.takes]
        for worker in takers * queue.at_once:
            if (number := queue.take(worker.number, len(takers))) is not None:
                asked = worker.handle.compute.options(concurrency_group="units").remote(self._key, self._task, number)
                self._asked[asked] = (worker, number)
                self._sent[asked] = set()

    def _take(self, ready: Any, queue: UnitQueue, on_result: OnResult) -> bool:
        """Deal with a unit that ended; returns whether to continue."""
        worker, number = self._asked.pop(ready)
        arrived = self._sent.pop(ready)
        try:
            result = self._ray.get(ready)
        except self._ray.exceptions.RayTaskError as error:
            raise EngineError("A worker of the cluster failed", phrase(error), "Report it.") from error
        except self._ray.exceptions.RayError as error:
            self._lost(worker, number, queue, self._why_lost(error))
            return True
        if isinstance(result, Absent):
            if result.file not in arrived:
                self._send(worker, result.file, result.why)
            queue.put_back(number)
            return True
        if isinstance(result, Stopped):
            queue.put_back(number)
            return True
        if isinstance(result, Problem):
            if result.exit_code != EngineError.exit_code or queue.lost(number) >= MOST_FAILURES:
                raise _error_of(result)
            self._sink(warning(f"{result.host}: {result.why}; another worker takes over."))
            return True
        if isinstance(result, ResultInFile):
            try:
                more = on_result(number, FetchedFile(result.value, self._blocks(worker, result)))
            except self._ray.exceptions.RayError as error:
                self._lost(worker, number, queue, self._why_lost(error))
                return True
            queue.done(number)
            return more
        return not queue.done(number) or on_result(number, result)

    def _blocks(self, worker: RemoteWorker, file: ResultInFile) -> Iterator[tuple[int, bytes]]:
        """The content of a worker's file; the next block travels while one is used."""
        fetch = worker.handle.fetch.options(concurrency_group="aside")
        places = range(0, file.size, BLOCK)
        following = fetch.remote(file, 0, BLOCK)
        for place in places:
            block = self._ray.get(following)
            if isinstance(block, Problem):
                raise _error_of(block)
            if place + BLOCK < file.size:
                following = fetch.remote(file, place + BLOCK, BLOCK)
            yield place, block

    def _why_lost(self, error: Exception) -> str:
        kinds = self._ray.exceptions
        if isinstance(error, kinds.OutOfMemoryError):
            return "its machine ran out of memory"
        if isinstance(error, (kinds.ActorDiedError, kinds.ActorUnavailableError, kinds.WorkerCrashedError)):
            return "its process ended, or its machine is gone"
        return phrase(error)

    def _lost(self, worker: RemoteWorker, number: int, queue: UnitQueue, why: str) -> None:
        losses = queue.lost(number)
        if worker.takes:
            self._sink(warning(f"A worker on {worker.host} was lost ({why}); another takes over."))
            worker.takes, worker.partial, worker.news = False, {}, None
            worker.proof = worker.handle.facts.remote()  # answered once Ray has restarted it
        if losses >= MOST_LOSSES:
            raise EngineError(
                f"{losses} workers were lost at the same unit of work",
                why,
                "Give each worker more memory (fewer workers on a machine: --cpus-per-worker), or a smaller -b; what is "
                "finished is kept.",
            )

    def _send(self, worker: RemoteWorker, file: SharedFile, why: str) -> None:
        """Send a file that is not on a worker's machine. Raises :class:`RunnerError`; a worker that is lost meanwhile is
        noticed at its next unit."""
        host = worker.host
        if file.size > _MOST_SENT:
            raise InvalidDataError(
                f"{file.path.name} is not on {host}",
                f"{why}; {human_bytes(file.size)} are too much to be sent",
                "Put it where all machines see it under the same path, or name the model by its hub id.",
            )
        self._sink(info(f"{file.path.name} ({human_bytes(file.size)}) is not on {host}, and is sent there."))
        try:
            for place, block in file.blocks():
                self._stop.check()
                if (problem := self._ray.get(worker.handle.receive.remote(file, place, block))) is not None:
                    raise _error_of(problem)
            for asked, (other, _) in self._asked.items():
                if other is worker:  # it may have missed the same file
                    self._sent[asked].add(file)
        except self._ray.exceptions.RayError as error:
            self._sink(detail(f"{file.path.name} did not reach {host}: {phrase(error)}"))

    def _hear(self, on_news: OnNews) -> None:
        """Ask each worker for its progress without waiting for it."""
        for worker in self._workers:
            if worker.news is not None and self._ray.wait([worker.news], timeout=0)[0]:
                with suppress(self._ray.exceptions.RayError):
                    worker.partial = self._ray.get(worker.news)
                worker.news = None
            if worker.news is None and worker.takes:
                worker.news = worker.handle.news.options(concurrency_group="aside").remote()
        on_news({number: done for worker in self._workers for number, done in worker.partial.items()})

    def _stopped(self, queue: UnitQueue, on_result: OnResult) -> None:
        """Let the units in work end at their next batch, and take what is finished by then."""
        for worker in self._workers:
            worker.handle.stop.options(concurrency_group="aside").remote()
        deadline = time.monotonic() + _STOP_SECONDS
        while self._asked and time.monotonic() < deadline:
            for ready in self._ray.wait(list(self._asked), num_returns=1, timeout=POLL_SECONDS)[0]:
                _, number = self._asked.pop(ready)
                with suppress(self._ray.exceptions.RayError):
                    result = self._ray.get(ready)
                    if isinstance(result, ResultInFile):
                        continue  # its worker is asked to stop
                    if not isinstance(result, (Absent, Stopped, Problem)) and queue.done(number):
                        on_result(number, result)


def _error_of(problem: Problem) -> RunnerError:
    kind = _ERRORS.get(problem.exit_code, EngineError)
    return kind(problem.what, f"on {problem.host}: {problem.why}", problem.todo)


def _no_worker() -> EngineError:
    return EngineError(
        "No worker of the cluster is left",
        f"all were lost, and none came back within {LOST_SECONDS:.0f} s",
        "See the cluster's state with: ray status. Run the same command again: it continues.",
    )


def phrase(error: BaseException) -> str:
    """The first sentence of one of Ray's errors, without its advice."""
    cause = getattr(error, "cause", None)
    text = str(cause or error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if cause is not None else lines[0])[:200] if lines else type(error).__name__
