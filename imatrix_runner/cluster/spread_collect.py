"""Collecting an imatrix on many workers: a unit is a range of chunks, and its sums return as the file that one machine would
have written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.cluster.node_worker import Node
from imatrix_runner.cluster.ordered_child import OnUnit, OrderedChild
from imatrix_runner.cluster.shared_files import SharedFile
from imatrix_runner.cluster.worker_rates import worker_name
from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, CollectJob, Perplexity
from imatrix_runner.errors import from_os_error
from imatrix_runner.events import Event, Progress
from imatrix_runner.process import Orders


@dataclass(frozen=True)
class RangeSums:
    """A finished range: the content of its file, times in seconds, perplexity, the features of the processor, the
    worker."""

    chunks: ChunkRange
    content: bytes
    seconds: float
    load_seconds: float
    perplexity: Perplexity
    processor: str
    worker: str

    def placed(self, folder: Path) -> CollectedRange:
        """Write the file into the driver's ``folder``."""
        path = folder / self.chunks.file_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content)
        except OSError as error:
            raise from_os_error(error, "writing the sums of a range", path) from error
        return CollectedRange(self.chunks, path, self.seconds, self.load_seconds, self.perplexity, self.processor)


@dataclass(frozen=True)
class CollectTask:
    """``job`` as the driver would do it; ``files`` of the model, the first of which the job names; its ``text``."""

    job: CollectJob
    files: tuple[SharedFile, ...]
    text: SharedFile

    def open(self, node: Node) -> CollectingWorker:
        model = node.locals(self.files)[0]
        return CollectingWorker(self.job, model, node.local(self.text), node)


class CollectingWorker:
    """A child process with the loaded model, which gets one range after another."""

    def __init__(self, job: CollectJob, model: Path, text: Path, node: Node) -> None:
        folder = node.scratch / "ranges"
        options = replace(job.options, threads=job.options.threads or node.threads)
        self._job = replace(job, model=model, text=text, folder=folder, options=options, log=node.scratch / "log", ordered=True)
        self._node = node
        self._finished_chunks = 0
        self._child: OrderedChild[CollectedRange] = OrderedChild(self._serve)

    def run(self, number: int) -> RangeSums:
        """Compute one range."""
        found = self._child.run(number)
        content = found.path.read_bytes()
        found.path.unlink()
        return RangeSums(
            found.chunks, content, found.seconds, found.load_seconds, found.perplexity, found.processor, worker_name()
        )

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _serve(self, orders: Orders, on_unit: OnUnit[CollectedRange]) -> None:
        def on_range(found: CollectedRange) -> bool:
            self._finished_chunks += found.chunks.count
            on_unit(self._job.ranges.index(found.chunks), found)
            return True

        self._job.folder.mkdir(parents=True, exist_ok=True)
        self._node.engine.collect(self._job, self._relay, on_range, orders)

    def _relay(self, event: Event) -> None:
        """Note how far the range in work is: the child counts the chunks of all ranges."""
        if isinstance(event, Progress) and (current := self._child.current) is not None:
            self._node.note(current, event.done - self._finished_chunks)
