"""Collecting an imatrix on many workers: a unit is a range of chunks, and its sums return as the file that one machine would
have written."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.cluster.node_worker import Node
from imatrix_runner.cluster.shared_files import SharedFile
from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, CollectJob, Perplexity
from imatrix_runner.errors import EngineError, InterruptedRunError, RunnerError, from_os_error
from imatrix_runner.events import Event, Progress
from imatrix_runner.process import Orders


@dataclass(frozen=True)
class RangeSums:
    """A finished range: the content of its file, times in seconds, perplexity."""

    chunks: ChunkRange
    content: bytes
    seconds: float
    load_seconds: float
    perplexity: Perplexity

    def placed(self, folder: Path) -> CollectedRange:
        """Write the file into the driver's ``folder``."""
        path = folder / self.chunks.file_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content)
        except OSError as error:
            raise from_os_error(error, "writing the sums of a range", path) from error
        return CollectedRange(self.chunks, path, self.seconds, self.load_seconds, self.perplexity)


@dataclass(frozen=True)
class CollectTask:
    """``job`` as the driver would do it; ``files`` of the model, the first of which the job names; its ``text``."""

    job: CollectJob
    files: tuple[SharedFile, ...]
    text: SharedFile

    def open(self, node: Node) -> CollectingWorker:
        model, *_ = [node.local(file) for file in self.files]
        return CollectingWorker(self.job, model, node.local(self.text), node)


class CollectingWorker:
    """A child process with the loaded model, which gets one range after another."""

    def __init__(self, job: CollectJob, model: Path, text: Path, node: Node) -> None:
        folder = node.scratch / "ranges"
        options = replace(job.options, threads=job.options.threads or node.threads)
        self._job = replace(job, model=model, text=text, folder=folder, options=options, log=node.scratch / "log", ordered=True)
        self._node = node
        self._orders = Orders()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[CollectedRange]] = {}
        self._finished_chunks = 0
        self._ended: RunnerError | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def run(self, number: int) -> RangeSums:
        """Compute one range. A second call waits for its turn in the child, which need not wait for the caller."""
        future: Future[CollectedRange] = Future()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._waiting[number] = future
            self._orders.give(number)
        found = future.result()
        content = found.path.read_bytes()
        found.path.unlink()
        return RangeSums(found.chunks, content, found.seconds, found.load_seconds, found.perplexity)

    def close(self) -> None:
        """End the child: it stops at its next batch."""
        self._orders.end()
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._job.folder.mkdir(parents=True, exist_ok=True)
            self._node.engine.collect(self._job, self._relay, self._finished, self._orders)
            ended: RunnerError = InterruptedRunError("The worker was closed", "its task is over", "Run the command again.")
        except RunnerError as error:
            ended = error
        except OSError as error:
            ended = from_os_error(error, "making a folder", self._job.folder)
        except BaseException as error:  # noqa: BLE001 - a bug: it has to reach the driver
            ended = EngineError("The worker failed", f"{type(error).__name__}: {error}", "Report it.")
        with self._lock:
            self._ended = ended
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(ended)

    def _finished(self, found: CollectedRange) -> bool:
        with self._lock:
            self._finished_chunks += found.chunks.count
            future = self._waiting.pop(self._job.ranges.index(found.chunks))
        future.set_result(found)
        return True

    def _relay(self, event: Event) -> None:
        """Note how far the range in work is: the child counts the chunks of all ranges."""
        if isinstance(event, Progress):
            with self._lock:
                current = next(iter(self._waiting), None)
                done = event.done - self._finished_chunks
            if current is not None:
                self._node.note(current, done)
