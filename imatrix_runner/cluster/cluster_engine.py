"""The embedded engine with its long jobs spread over the workers of a cluster. Everything else is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.cluster.cluster_workers import ClusterWorkers
from imatrix_runner.cluster.in_order import InOrder
from imatrix_runner.cluster.node_facts import NodeFacts, unlike
from imatrix_runner.cluster.node_worker import Task
from imatrix_runner.cluster.ray_session import connected
from imatrix_runner.cluster.shared_files import SharedFile, shared_files
from imatrix_runner.cluster.spread_collect import CollectTask, RangeSums
from imatrix_runner.cluster.spread_errors import ErrorsTask, GroupErrors
from imatrix_runner.cluster.spread_measure import MeasuredUnit, MeasureTask
from imatrix_runner.cluster.spread_pass import PassTask, SpreadPass, folder_probe
from imatrix_runner.cluster.spread_trials import TrialsTask, batches_of, covariance_files
from imatrix_runner.cluster.spreading import OnNews
from imatrix_runner.cluster.worker_rates import WorkerRates
from imatrix_runner.engines.abilities import OnScores
from imatrix_runner.engines.contract import OnRange
from imatrix_runner.engines.cost_jobs import RoundingError, RoundingErrorsJob, TrialResult, TrialsJob, tensor_groups
from imatrix_runner.engines.embedded.bindings import Bindings
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.cost_files import CostFile, reference_of
from imatrix_runner.engines.jobs import CollectJob, PassedLevel, PassFigures, PassJob, Perplexity
from imatrix_runner.engines.measures import RangesJob
from imatrix_runner.engines.pass_units import cut_units
from imatrix_runner.errors import EngineError, from_os_error
from imatrix_runner.events import Metric, Progress, Sink, ignore, info, warning
from imatrix_runner.files import Stamp, stamp
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.process import Orders, Runner

ResultT = TypeVar("ResultT")

_AHEAD = 4
"""Ranges for each worker that may be begun before the first one is done: their sums wait in the driver's folder."""


class ClusterEngine(EmbeddedEngine):
    """Spreads the ranges of an imatrix and of a measurement, the tensors of levels, and trials of roundings. What is not spread
    is done by this machine, with the same results."""

    def __init__(self, bindings: Bindings, runner: Runner, cache: Path, workers: ClusterWorkers) -> None:
        super().__init__(bindings, runner, cache)
        self._workers = workers
        self._models: dict[Path, tuple[tuple[Stamp, ...], tuple[SharedFile, ...]]] = {}

    def collect(self, job: CollectJob, sink: Sink, on_range: OnRange, orders: Orders | None = None) -> None:
        """Have ranges computed in any order, and pass them on in the job's."""
        if job.ordered:  # the caller's own worker
            super().collect(job, sink, on_range, orders)
            return
        task = CollectTask(job, self._model(job.model), SharedFile.of(job.text))
        total = sum(chunks.count for chunks in job.ranges)
        waiting: dict[int, RangeSums] = {}
        following, done, said, rates = 0, 0, Perplexity(), WorkerRates("chunks")

        def on_result(number: int, sums: RangeSums) -> bool:
            nonlocal following, done, said
            waiting[number] = sums
            rates.add(sums.worker, sums.chunks.count)
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
            sink(Progress(job.step, min(total, done + beyond + sum(partial.values())), total, str(rates)))

        ahead = _AHEAD * max(1, len(self._workers.facts))
        self._workers.spread(task, range(len(job.ranges)), on_result, on_news, ahead=ahead)

    def one_pass(self, job: PassJob, sink: Sink) -> tuple[tuple[PassedLevel, ...], PassFigures]:
        """Have tensors quantised by the workers; this machine prepares the levels and finishes them."""
        prepared = self.prepare_pass(job)
        units = cut_units(prepared.works, len(self._workers.facts) + self._workers.expected)
        whole = SpreadPass(job, units, sink)
        if units:
            with folder_probe(job) as probe:
                task = PassTask.of(job, units, prepared.slab, self._model(job.sources[0]), probe)
                whole.spread(self._workers, task)
        return whole.finish(lambda rest: super(ClusterEngine, self).one_pass(rest, ignore))

    @property
    def range_measurer(self) -> ClusterEngine:
        return self

    @property
    def at_once(self) -> int:
        """Ranges of a measurement that are computed at a time: one by each worker, those that are expected included."""
        return len(self._workers.facts) + self._workers.expected

    def measure_ranges(self, job: RangesJob, sink: Sink, on_scores: OnScores) -> None:
        """Have ranges measured in any order."""
        subjects = tuple(self._model(subject.file) for subject in job.subjects)
        task = MeasureTask(job, self._model(job.model), SharedFile.of(job.text), subjects)
        done, missing, rates = 0, set(range(len(job.ranges))), WorkerRates("chunks")

        def on_result(number: int, unit: MeasuredUnit) -> bool:
            nonlocal done
            for scores in unit.scores:
                on_scores(scores)
                done += scores.chunks.count
                rates.add(unit.worker, scores.chunks.count)
            if unit.whole:
                missing.remove(number)
            return True

        def on_news(partial: Mapping[int, float]) -> None:
            more = sum(chunks for number, chunks in partial.items() if number in missing)
            sink(Progress(job.step, min(job.n_chunks, done + more), job.n_chunks, str(rates)))

        # A range takes minutes: it is given to whoever is idle first, not in advance.
        self._workers.spread(task, range(len(job.ranges)), on_result, on_news, at_once=1)
        if missing:
            raise EngineError("A worker of the cluster stopped early", "a range is incomplete", "Run the same command again.")

    def rounding_errors(self, job: RoundingErrorsJob, sink: Sink) -> None:
        """Have tensors rounded in any order, and write their errors in the job's."""
        with closing(CostFile(job.out, job.fingerprint, RoundingError)) as file:
            known = {error.tensor for error in file.records}
            rest = replace(job, tensors=tuple(tensor for tensor in job.tensors if tensor not in known))
            groups, sizes = tensor_groups(rest.tensors), _sizes(job.sources)
            total = sum(sizes.get(tensor.name, 0) for tensor in job.tensors)
            done = total - sum(sizes.get(tensor.name, 0) for tensor in rest.tensors)

            def on_news(partial: Mapping[int, float]) -> None:
                sink(Progress(job.step, min(total, done + sum(partial.values())), total))

            def on_errors(place: int, _errors: GroupErrors) -> None:
                nonlocal done
                done += sum(sizes.get(tensor.name, 0) for tensor in groups[place])

            task = ErrorsTask(rest, self._model(job.sources[0]), *_further_files(job))
            self._write_costs(task, range(len(groups)), job.out, lambda errors: file.append(errors), on_errors, on_news)

    def trials(self, job: TrialsJob, sink: Sink) -> None:
        """Have trials measured in any order, and write their results in the job's."""
        reference_of(job.out).unlink(missing_ok=True)  # a killed job's
        with closing(CostFile(job.out, job.fingerprint, TrialResult)) as file:
            known = {result.trial for result in file.records}
            todo = [place for place, trial in enumerate(job.trials) if trial.name not in known]
            done, each = len(job.trials) - len(todo), batches_of(job)
            total = each * len(job.trials)

            def on_news(partial: Mapping[int, float]) -> None:
                batches = each * done + sum(partial.values())
                sink(Progress(job.step, min(total, batches), total, f"{done}/{len(job.trials)}"))

            def on_trial(_place: int, _result: TrialResult) -> None:
                nonlocal done
                done += 1

            task = TrialsTask(job, self._model(job.model), SharedFile.of(job.text), *_further_files(job))
            self._write_costs(task, todo, job.out, lambda result: file.append([result]), on_trial, on_news)

    def _write_costs(
        self,
        task: Task,
        todo: Sequence[int],
        out: Path,
        append: Callable[[ResultT], None],
        on_unit: Callable[[int, ResultT], None],
        on_news: OnNews,
    ) -> None:
        """Have the units ``todo`` done, and append their results to ``out`` in this order."""
        results: InOrder[ResultT] = InOrder(todo)

        def on_result(number: int, result: ResultT) -> bool:
            on_unit(number, result)
            try:
                for ready in results.add(number, result):
                    append(ready)
            except OSError as error:
                raise from_os_error(error, "writing measured costs", out) from error
            return True

        if todo:
            self._workers.spread(task, todo, on_result, on_news, ahead=_AHEAD * max(1, len(self._workers.facts)))

    def _model(self, path: Path) -> tuple[SharedFile, ...]:
        """The files of a model; of one that did not change the same as before, so that they are sent once."""
        try:
            now = tuple(stamp(path.with_name(name)) for name in shard_names(path))
        except OSError as error:
            raise from_os_error(error, f"reading {path.name}", path) from error
        known = self._models.get(path)
        if known is None or known[0] != now:
            known = self._models[path] = now, shared_model(path)
        return known[1]


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


def _further_files(job: RoundingErrorsJob | TrialsJob) -> tuple[SharedFile | None, tuple[SharedFile, ...]]:
    """The imatrix of a job, and its covariances."""
    imatrix = SharedFile.of(job.imatrix) if job.imatrix is not None else None
    return imatrix, shared_files(covariance_files(job.covariances))


def _sizes(sources: Sequence[Path]) -> dict[str, int]:
    """Elements of each tensor of a model."""
    return {tensor.name: tensor.n_elements for path in sources for tensor in read_header(path).tensors}


def shared_model(path: Path) -> tuple[SharedFile, ...]:
    """The files of a model, the first of which is ``path``."""
    return shared_files([path.with_name(name) for name in shard_names(path)])
