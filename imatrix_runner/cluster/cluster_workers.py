"""The workers of a run: started wherever the cluster has room, and proven before they get work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.cluster.node_facts import NodeFacts, share_of_processors, why_left_out
from imatrix_runner.cluster.node_worker import NodeWorker, Task
from imatrix_runner.cluster.spreading import POLL_SECONDS, OnNews, OnResult, RemoteWorker, Spreading, phrase
from imatrix_runner.cluster.unit_queue import AT_ONCE, UnitQueue
from imatrix_runner.errors import ToolchainError
from imatrix_runner.events import Sink, warning
from imatrix_runner.signals import Stop

START_SECONDS = 300.0
"""How long a worker may take to prove its machine: a new machine compiles kernels first."""

JOIN_SECONDS = 20.0
"""How long the run waits for further workers once one is there."""


@dataclass(frozen=True)
class WorkerPlace:
    """A machine with room for ``count`` workers of ``threads`` processors each."""

    node: str
    count: int
    threads: int


class ClusterWorkers:
    """The workers of a run. ``ray``: the module, imported by :func:`~.ray_session.connected`."""

    def __init__(self, ray: Any, options: ClusterOptions, sink: Sink, stop: Stop) -> None:
        self._ray, self._options, self._sink, self._stop = ray, options, sink, stop
        self._workers: list[RemoteWorker] = []
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
            RemoteWorker(number, handle, takes=False, proof=handle.facts.remote()) for number, handle in enumerate(handles)
        ]
        reasons: list[str] = []
        began = time.monotonic()
        while waiting := [worker.proof for worker in self._workers if worker.proof is not None]:
            self._stop.check()
            reasons += self.welcome()
            patience = JOIN_SECONDS if any(worker.takes for worker in self._workers) else START_SECONDS
            if time.monotonic() - began > patience:
                break  # they join when they answer
            self._ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
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

    def _rooms(self) -> list[WorkerPlace]:
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
                why = phrase(error)
            worker.takes = not why
            if why:
                self._workers.remove(worker)
                self._ray.kill(worker.handle)
                reasons.append(f"{worker.host}: {why}")
        for reason in dict.fromkeys(reasons):
            self._sink(warning(f"Left out of the cluster: {reason}"))
        return reasons

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
        Spreading(self._ray, self._workers, self.welcome, self._sink, self._stop, task).run(
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

    def _placed(self, place: WorkerPlace) -> Any:
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


def _no_room(options: ClusterOptions) -> ToolchainError:
    return ToolchainError(
        "The Ray cluster has no room for a worker",
        f"no machine has {_wanted(options)} to give",
        "Give less with --cpus-per-worker or --gpus-per-worker, or add machines: ray start --address=...",
    )


def _wanted(options: ClusterOptions) -> str:
    count = options.cpus_per_worker or 1
    cpus = "1 processor" if count == 1 else f"{count} processors"
    return f"{cpus} and {options.gpus_per_worker:g} GPUs" if options.gpus_per_worker else cpus


def _places(ray: Any, options: ClusterOptions) -> Iterator[WorkerPlace]:
    """The machines with room for workers, by name; what other jobs of the cluster use is not known here."""
    if options.local_workers is not None:
        node = next(node for node in ray.nodes() if node["Alive"])
        threads = options.cpus_per_worker or share_of_processors(options.local_workers)
        yield WorkerPlace(node["NodeID"], options.local_workers, threads)
        return
    for node in sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"])):
        cpus, gpus = int(node["Resources"].get("CPU", 0)), float(node["Resources"].get("GPU", 0))
        count = cpus // options.cpus_per_worker if options.cpus_per_worker else min(cpus, 1)
        if options.gpus_per_worker:
            by_gpu = int(gpus / options.gpus_per_worker)
            count = min(count, by_gpu) if options.cpus_per_worker else by_gpu
        if count:
            yield WorkerPlace(node["NodeID"], count, options.cpus_per_worker or max(1, cpus // count))
