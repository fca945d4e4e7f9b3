"""The embedded engine with its long jobs spread over the workers of a cluster. Everything else is computed here."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.cluster.node_facts import NodeFacts, unlike
from imatrix_runner.cluster.ray_session import ClusterWorkers, connected
from imatrix_runner.cluster.shared_files import SharedFile
from imatrix_runner.cluster.spread_collect import CollectTask, RangeSums
from imatrix_runner.engines.contract import OnRange
from imatrix_runner.engines.embedded.bindings import Bindings
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import CollectJob, Perplexity
from imatrix_runner.events import Metric, Progress, Sink, info, warning
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.process import Orders, Runner

_AHEAD = 4
"""Ranges for each worker that may be begun before the first one is done: their sums wait in the driver's folder."""


class ClusterEngine(EmbeddedEngine):
    """Spreads the ranges of an imatrix. What is not spread is done by this machine, with the same results."""

    def __init__(self, bindings: Bindings, runner: Runner, cache: Path, workers: ClusterWorkers) -> None:
        super().__init__(bindings, runner, cache)
        self._workers = workers

    def collect(self, job: CollectJob, sink: Sink, on_range: OnRange, orders: Orders | None = None) -> None:
        """Have ranges computed in any order, and pass them on in the job's."""
        if job.ordered:  # the caller's own worker
            super().collect(job, sink, on_range, orders)
            return
        task = CollectTask(job, shared_model(job.model), SharedFile.of(job.text))
        total = sum(chunks.count for chunks in job.ranges)
        waiting: dict[int, RangeSums] = {}
        following, done, said = 0, 0, Perplexity()

        def on_result(number: int, sums: RangeSums) -> bool:
            nonlocal following, done, said
            waiting[number] = sums
            while (ready := waiting.pop(following, None)) is not None:
                following += 1
                done += ready.chunks.count
                said += ready.perplexity
                if said.value is not None:
                    sink(Metric(job.step, "ppl", said.value))
                if not on_range(ready.placed(job.folder)):
                    return False
            return True

        def on_news(partial: Mapping[int, float]) -> None:
            beyond = sum(sums.chunks.count for sums in waiting.values())
            sink(Progress(job.step, min(total, done + beyond + sum(partial.values())), total))

        ahead = _AHEAD * max(1, len(self._workers.facts))
        self._workers.spread(task, range(len(job.ranges)), on_result, on_news, ahead=ahead)


@contextmanager
def cluster_engine(
    bindings: Bindings, runner: Runner, cache: Path, options: ClusterOptions, sink: Sink
) -> Iterator[ClusterEngine]:
    """An engine whose workers are started, and ended afterwards. Raises what :func:`~.ray_session.connected` raises."""
    with ExitStack() as stack:
        driver = NodeFacts.of(EmbeddedEngine(bindings, runner))
        workers = stack.enter_context(connected(options, sink, runner.stop))
        workers.start(driver)
        hosts = {facts.host for facts in workers.facts}
        machines = "1 machine" if len(hosts) == 1 else f"{len(hosts)} machines"
        later = f"; {workers.expected} more may join" if workers.expected else ""
        sink(info(f"Cluster {options.address}: {len(workers.facts)} workers on {machines}{later}."))
        if kinds := unlike(workers.facts):
            sink(
                warning(
                    f"The cluster has {len(kinds)} kinds of processors, whose sums may differ in their last bits: the same "
                    "command gives the same bytes only where all machines are alike."
                )
            )
        yield ClusterEngine(bindings, runner, cache, workers)


def shared_model(path: Path) -> tuple[SharedFile, ...]:
    """The files of a model, the first of which is ``path``."""
    nonce = secrets.token_hex(16)
    return tuple(SharedFile.of(path.with_name(name), nonce) for name in shard_names(path))
