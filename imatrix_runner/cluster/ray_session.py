"""The connection to a Ray cluster, and its workers. The only module that imports ray.

Ray places workers, restarts them, notices lost machines, and moves objects. What is decided here is which unit goes to which
worker (:mod:`~imatrix_runner.cluster.unit_queue`).
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.cluster.node_facts import NodeFacts, share_of_processors, why_left_out
from imatrix_runner.cluster.node_worker import Absent, NodeWorker, Problem, ResultInFile, Stopped, Task
from imatrix_runner.cluster.shared_files import BLOCK, SharedFile
from imatrix_runner.cluster.unit_queue import AT_ONCE, MOST_FAILURES, MOST_LOSSES, UnitQueue
from imatrix_runner.environment import neutral_directory
from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, ToolchainError, UsageError
from imatrix_runner.events import Sink, detail, info, warning
from imatrix_runner.extras import RAY
from imatrix_runner.files import human_bytes
from imatrix_runner.signals import Stop, handlers_kept

START_SECONDS = 300.0
"""How long a worker may take to prove its machine: a new machine compiles kernels first."""

JOIN_SECONDS = 20.0
"""How long the run waits for further workers once one is there."""

LOST_SECONDS = 120.0
"""How long the run waits for any worker, after all were lost."""

_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 120.0
_POLL_SECONDS = 0.5
_MOST_SENT = 16 << 30
"""Larger files are not sent through Ray's object store: they would take longer than the work is worth."""

_OBJECTS = 512 << 20
"""Bytes of the object store of ``local:N``, which needs room for a few results at a time."""

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
class _Worker:
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


@dataclass(frozen=True)
class _Place:
    """A machine with room for ``count`` workers of ``threads`` processors each."""

    node: str
    count: int
    threads: int


class ClusterWorkers:
    """The workers of a run. ``ray``: the module, imported by :func:`connected`."""

    def __init__(self, ray: Any, options: ClusterOptions, sink: Sink, stop: Stop) -> None:
        self._ray, self._options, self._sink, self._stop = ray, options, sink, stop
        self._workers: list[_Worker] = []
        self._driver: NodeFacts | None = None

    @property
    def facts(self) -> tuple[NodeFacts, ...]:
        """The machines of the workers that are used, one for each worker."""
        return tuple(worker.facts for worker in self._workers if worker.facts is not None and worker.takes)

    @property
    def expected(self) -> int:
        """How many workers have not proven their machine yet."""
        return sum(worker.proof is not None for worker in self._workers)

    def start(self, driver: NodeFacts) -> None:
        """Start a worker wherever there is room, and leave out machines that would not compute what ``driver`` would. Those
        that take longer than others to answer join later.

        Raises :class:`ToolchainError` if none is left.
        """
        self._driver = driver
        places = self._rooms()
        if self._options.lane is not None:  # other lanes take the others
            places = places[self._options.lane :][:1]
        if not places:
            raise _no_room(self._options)
        handles = [self._placed(place) for place in places]
        self._workers = [
            _Worker(number, handle, takes=False, proof=handle.facts.remote()) for number, handle in enumerate(handles)
        ]
        reasons: list[str] = []
        began = time.monotonic()
        while waiting := [worker.proof for worker in self._workers if worker.proof is not None]:
            self._stop.check()
            reasons += self.welcome()
            patience = JOIN_SECONDS if any(worker.takes for worker in self._workers) else START_SECONDS
            if time.monotonic() - began > patience:
                break  # they join when they answer
            self._ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_SECONDS)
        if not any(worker.takes for worker in self._workers):
            raise ToolchainError(
                "No machine of the cluster can compute",
                "; ".join(dict.fromkeys(reasons)) or f"none answered within {START_SECONDS:.0f} s",
                "Install the same imatrix-runner and llama-cpp-python everywhere; see there: imatrix-runner doctor",
            )

    def room(self) -> tuple[int, ...]:
        """The processors of each worker that the cluster has room for. Raises :class:`ToolchainError` for none."""
        if not (rooms := self._rooms()):
            raise _no_room(self._options)
        return tuple(place.threads for place in rooms)

    def _rooms(self) -> list[_Place]:
        """The place of each worker that there is room for."""
        return [place for place in _places(self._ray, self._options) for _ in range(place.count)]

    def welcome(self) -> list[str]:
        """Use the workers that have proven their machines since; returns why others are left out, after saying so."""
        reasons = []
        for worker in [worker for worker in self._workers if worker.proof is not None]:
            if not self._ray.wait([worker.proof], timeout=0)[0]:
                continue
            proof, worker.proof = worker.proof, None
            try:
                facts = worker.facts = self._ray.get(proof)
                assert self._driver is not None
                why = why_left_out(facts, self._driver)
            except self._ray.exceptions.ActorUnavailableError:
                worker.proof = worker.handle.facts.remote()
                continue
            except self._ray.exceptions.RayError as error:
                why = _phrase(error)
            worker.takes = not why
            if why:
                self._workers.remove(worker)
                self._ray.kill(worker.handle)
                reasons.append(f"{worker.host}: {why}")
        for reason in dict.fromkeys(reasons):
            self._sink(warning(f"Left out of the cluster: {reason}"))
        return reasons

    def share_folder(self, folder: Path) -> bool:
        """Whether every worker reads and writes ``folder`` as the same folder; found out with a probe file."""
        if not self._options.shared_files:
            return False
        nonce = secrets.token_hex(16)
        probe = folder / f".cluster-probe-{nonce}"
        answers = [probe.with_name(f"{probe.name}-{worker.number}") for worker in self._workers]
        try:
            probe.write_text(nonce, encoding="utf-8")
            asked = [
                worker.handle.shares_folder.remote(probe, nonce, answer)
                for worker, answer in zip(self._workers, answers, strict=True)
            ]
            seen = self._ray.get(asked, timeout=START_SECONDS)
            written = [answer.is_file() and answer.read_text(encoding="utf-8") == nonce for answer in answers]
            return all(seen) and all(written)
        except (OSError, UnicodeDecodeError, self._ray.exceptions.RayError):
            return False
        finally:
            for path in (probe, *answers):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def spread(
        self,
        task: Task,
        numbers: Sequence[int],
        on_result: OnResult,
        on_news: OnNews,
        *,
        ahead: int | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        """Have every unit done, each by one worker; returns when all are, or when ``on_result`` wants no more. ``ahead`` and
        ``at_once`` as in :class:`~.unit_queue.UnitQueue`.

        A unit of a lost worker is given to another. Raises :class:`RunnerError`: of a unit, of one that has lost
        :data:`~.unit_queue.MOST_LOSSES` workers, if no worker is left, or of a request to stop, for which the units in work end
        at their next batch.
        """
        _Spreading(self._ray, self._workers, self.welcome, self._sink, self._stop, task).run(
            UnitQueue(numbers, ahead=ahead, at_once=at_once), on_result, on_news
        )

    def close(self) -> None:
        """End all workers."""
        asked = [worker.handle.finish.remote() for worker in self._workers]
        self._ray.wait(asked, num_returns=len(asked), timeout=5.0)
        for worker in self._workers:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.handle)
        self._workers = []

    def _placed(self, place: _Place) -> Any:
        strategies = self._ray.util.scheduling_strategies
        # Soft: where the machine is lost, the worker may be restarted on another that has room.
        affinity = strategies.NodeAffinitySchedulingStrategy(node_id=place.node, soft=True)
        actor = self._ray.remote(
            num_cpus=place.threads,
            num_gpus=self._options.gpus_per_worker,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=affinity,
            concurrency_groups={"units": AT_ONCE, "aside": 2},
        )(NodeWorker)
        return actor.remote(place.threads, self._options.shared_files)


class _Spreading:
    """One task being done by the workers."""

    def __init__(
        self,
        ray: Any,
        workers: list[_Worker],
        welcome: Callable[[], object],
        sink: Sink,
        stop: Stop,
        task: Task,
    ) -> None:
        self._ray, self._workers, self._welcome, self._sink, self._stop = ray, workers, welcome, sink, stop
        self._key = secrets.token_hex(8)
        self._task = ray.put(task)
        self._asked: dict[Any, tuple[_Worker, int]] = {}
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
                    time.sleep(_POLL_SECONDS)
                    continue
                lonely_since = None
                for ready in self._ray.wait(list(self._asked), num_returns=1, timeout=_POLL_SECONDS)[0]:
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
            raise EngineError("A worker of the cluster failed", _phrase(error), "Report it.") from error
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

    def _blocks(self, worker: _Worker, file: ResultInFile) -> Iterator[tuple[int, bytes]]:
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
        return _phrase(error)

    def _lost(self, worker: _Worker, number: int, queue: UnitQueue, why: str) -> None:
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

    def _send(self, worker: _Worker, file: SharedFile, why: str) -> None:
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
            self._sink(detail(f"{file.path.name} did not reach {host}: {_phrase(error)}"))

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
            for ready in self._ray.wait(list(self._asked), num_returns=1, timeout=_POLL_SECONDS)[0]:
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


def _phrase(error: BaseException) -> str:
    """The first sentence of one of Ray's errors, without its advice."""
    cause = getattr(error, "cause", None)
    text = str(cause or error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if cause is not None else lines[0])[:200] if lines else type(error).__name__


def _no_room(options: ClusterOptions) -> ToolchainError:
    return ToolchainError(
        "The Ray cluster has no room for a worker",
        f"no machine has {_wanted(options)} to give",
        "Give less with --cpus-per-worker or --gpus-per-worker, or add machines: ray start --address=...",
    )


def _wanted(options: ClusterOptions) -> str:
    cpus = f"{options.cpus_per_worker or 1} processors"
    return f"{cpus} and {options.gpus_per_worker:g} GPUs" if options.gpus_per_worker else cpus


def _places(ray: Any, options: ClusterOptions) -> Iterator[_Place]:
    """The machines with room for workers, by name; what other jobs of the cluster use is not known here."""
    if options.local_workers is not None:
        node = next(node for node in ray.nodes() if node["Alive"])
        threads = options.cpus_per_worker or share_of_processors(options.local_workers)
        yield _Place(node["NodeID"], options.local_workers, threads)
        return
    for node in sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"])):
        cpus, gpus = int(node["Resources"].get("CPU", 0)), float(node["Resources"].get("GPU", 0))
        count = cpus // options.cpus_per_worker if options.cpus_per_worker else min(cpus, 1)
        if options.gpus_per_worker:
            by_gpu = int(gpus / options.gpus_per_worker)
            count = min(count, by_gpu) if options.cpus_per_worker else by_gpu
        if count:
            yield _Place(node["NodeID"], count, options.cpus_per_worker or max(1, cpus // count))


@contextmanager
def connected(options: ClusterOptions, sink: Sink, stop: Stop) -> Iterator[ClusterWorkers]:
    """Connect to the cluster (``local:N`` starts one on this machine), and disconnect at the end. Where this process is
    connected already, that connection is used.

    Raises :class:`ToolchainError` without Ray, for a cluster that cannot be reached, and for one of another version of Ray or
    Python.
    """
    RAY.require("--cluster")
    # Read when ray is imported. It would print its machines' messages to this program's stdout, and report its use.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "(?s).*")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.util.scheduling_strategies

    mine = not ray.is_initialized()
    if mine:
        _initialise(ray, options)
    workers = ClusterWorkers(ray, options, sink, stop)
    try:
        yield workers
    finally:
        workers.close()
        if mine:
            ray.shutdown()


def _initialise(ray: Any, options: ClusterOptions) -> None:
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    _require_answer(options)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
    try:
        with _neutral(), handlers_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the error
            if options.local_workers is not None:
                cpus = options.local_workers * (options.cpus_per_worker or share_of_processors(options.local_workers))
                ray.init(
                    address="local",  # never a cluster that happens to run here
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECTS,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
            else:
                ray.init(address=options.address, **quiet)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        text = _phrase(error)
        if "version" in text.lower():
            raise ToolchainError(
                f"The Ray cluster at {options.address} has another version",
                text,
                "Install the same versions of Python and ray everywhere (here: ray "
                f"{ray.__version__}), then run the same command again.",
            ) from error
        raise _unreachable(options, text) from error


def _require_answer(options: ClusterOptions) -> None:
    """Raise :class:`ToolchainError` where nothing listens: Ray itself would try for minutes."""
    if options.endpoint is None:
        return
    try:
        socket.create_connection(options.endpoint, timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise _unreachable(options, f"nothing answers there ({error.strerror or error})") from error


def _unreachable(options: ClusterOptions, why: str) -> ToolchainError:
    return ToolchainError(
        f"The Ray cluster at {options.address} cannot be reached",
        why,
        "Start one with: ray start --head   (or use --cluster local:2 for two workers on this machine)",
    )


@contextmanager
def _neutral() -> Iterator[None]:
    """Ray lets workers import modules from the driver's working directory, which may hold anyone's files."""
    before = Path.cwd()
    os.chdir(neutral_directory())
    try:
        yield
    finally:
        os.chdir(before)
