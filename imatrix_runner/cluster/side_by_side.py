"""The single pass in several processes of this machine, where it has many threads: no Ray, no sums, the same units and ledgers.

Threads of one process share Python's lock. Of kernels that take a millisecond, some dozens of threads hand that lock to each
other as fast as they can (``scripts/bench scaling``), and more of them bring nothing. So each process gets a few threads only.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from imatrix_runner.cluster.node_worker import Node, Task
from imatrix_runner.cluster.shared_files import shared_files
from imatrix_runner.cluster.spread_pass import PassTask, SpreadPass, folder_probe
from imatrix_runner.cluster.spreading import OnNews, OnResult
from imatrix_runner.cluster.unit_queue import AT_ONCE
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import PassedLevel, PassFigures, PassJob
from imatrix_runner.engines.pass_units import cut_units
from imatrix_runner.events import Sink, ignore
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.signals import Stop

THREADS = 16
"""Threads of a process."""

MANY = 3 * THREADS
"""From so many threads on, several processes are worth their start."""

_NEWS_SECONDS = 0.5


class SideBySideEngine(EmbeddedEngine):
    """The embedded engine, whose passes with many threads run in several processes. Everything else is as it was."""

    def one_pass(self, job: PassJob, sink: Sink) -> tuple[tuple[PassedLevel, ...], PassFigures]:
        """Have tensors quantised by several processes if there are threads for them; a last one finishes the levels."""
        threads = job.threads or _processors()
        if threads < MANY:
            return super().one_pass(job, sink)
        prepared = self.prepare_pass(job)
        count = max(1, threads // THREADS)
        units = cut_units(prepared.works, count)
        whole = SpreadPass(job, units, sink)
        if units:
            sources = shared_files([job.sources[0].with_name(name) for name in shard_names(job.sources[0])])
            with folder_probe(job) as probe, scratch_folder() as scratch:
                task = PassTask.of(replace(job, threads=threads // count), units, prepared.slab, sources, probe)
                whole.spread(ProcessWorkers(self, count, scratch, self._runner.stop), task)
        return whole.finish(lambda rest: super(SideBySideEngine, self).one_pass(rest, ignore))


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessWorkers:
    """Some workers of this machine. Each is two threads here that wait for a child process: while it does a unit, the next one
    is ordered already."""

    def __init__(self, engine: EmbeddedEngine, count: int, scratch: Path, stop: Stop) -> None:
        self._engine, self._count, self._scratch, self._stop = engine, count, scratch, stop

    def spread(self, task: Task, numbers: Sequence[int], on_result: OnResult, on_news: OnNews) -> None:
        """Have every unit done; returns when all are, or when ``on_result`` wants no more. Raises the first error."""
        waiting = deque(numbers)
        results: queue.SimpleQueue[tuple[int, Any] | BaseException] = queue.SimpleQueue()
        nodes = [self._node(number) for number in range(min(self._count, len(numbers)))]
        over = threading.Event()

        def serve(node: Node) -> None:
            try:
                standing = task.open(node)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                results.put(error)
                return

            def compute() -> None:
                try:
                    while not over.is_set():
                        try:
                            number = waiting.popleft()
                        except IndexError:
                            return
                        results.put((number, standing.run(number)))
                        node.partial.pop(number, None)
                except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                    results.put(error)

            pair = [threading.Thread(target=compute) for _ in range(AT_ONCE)]
            for thread in pair:
                thread.start()
            over.wait()
            standing.close()
            for thread in pair:
                thread.join()

        threads = [threading.Thread(target=serve, args=(node,)) for node in nodes]
        for thread in threads:
            thread.start()
        try:
            left = len(numbers)
            while left:
                try:
                    result = results.get(timeout=_NEWS_SECONDS)
                except queue.Empty:
                    on_news({number: done for node in nodes for number, done in dict(node.partial).items()})
                    continue
                if isinstance(result, BaseException):
                    raise result
                left -= 1
                if not on_result(*result):
                    return
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _node(self, number: int) -> Node:
        folder = self._scratch / str(number)
        folder.mkdir()
        return Node(self._engine, folder, THREADS, shares=True, stop=self._stop)
