"""``scripts/bench cluster --simulate``: what a cluster brings for a mixture of 30 billion weights, of which 3 are active.

Unit costs are measured here, in one run, on one layer with the shapes of the large model's (2,048 wide, experts of 768, but 16
of them and a small vocabulary; ``--model demo`` takes the demo model). :mod:`imatrix_runner.advise.cluster_forecast` counts:

* a chunk takes the measured seconds for each token and weight that is active for it;
* a level takes the measured seconds for each number and type, for the types that ``--preset bartowski`` gives the layer's
  tensors, with as many layers, experts and words as the large model has; units are those that the program would cut;
* the errors of rounding to all these types, which a mix needs once, take as long as a level of each; a unit is a tensor;
* a probe of a mix and a chunk of a level take what they take here for each token and active weight;
* the driver's time for a range is measured for each byte of sums;
* loading a model takes the measured start of a worker, and the model's bytes from a disk (``--disk``);
* workers have ``--threads`` processors like one of these, and compute in proportion (``scripts/bench scaling`` has what bounds
  that for levels); results and levels go through one link (``--network``), and all workers see the workspace.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from imatrix_runner.advise.cluster_forecast import (
    LEAST_GAIN,
    ClusterForecast,
    ClusterShape,
    WorkPhase,
    WorkUnit,
    forecast_cluster,
    work_seconds,
)
from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.cluster.node_facts import NodeFacts
from imatrix_runner.cluster.ray_session import connected
from imatrix_runner.engines.cost_jobs import RoundedTensor, Trial, TrialsJob
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, CollectJob, CollectOptions, Perplexity
from imatrix_runner.engines.measures import MeasuredRange, MeasureJob, ReferenceJob
from imatrix_runner.engines.pass_parts import PassWork, WantedPair, WantedPlace
from imatrix_runner.engines.pass_units import cut_units
from imatrix_runner.evaluate.measure_ranges import cut, divided, measured_chunks
from imatrix_runner.events import ignore
from imatrix_runner.files import human_seconds, publish
from imatrix_runner.imatrix import checkpoint as checkpoints
from imatrix_runner.imatrix.checkpoint import Checkpoint
from imatrix_runner.imatrix.chunks import range_chunks
from imatrix_runner.imatrix.formats import prepare_gguf, read
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.imatrix.plan_generation import active_params, matrix_bytes
from imatrix_runner.mixes.measure_costs import PROBE_TOKENS
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.resources import CALIBRATION_TEXT, DEMO_MODEL, resource
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.store import cache_dir
from support.tiny_models import write_llama_gguf

LAYERS, EXPERTS, USED, WIDTH, EXPERT, WORDS = 48, 128, 8, 2048, 768, 151_936
"""The large model's shapes: those of Qwen3-30B-A3B."""

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHOWN = (1, 8, 64)
HELD_OUT_CHUNKS = 64
FEW, MORE = 4, 12


@dataclass(frozen=True)
class UnitCosts:
    """Thread seconds. ``chunk``, ``reference``, ``level`` (measuring one) and ``trial``: for each token and active weight;
    ``types``: for each number, by type; ``other``: for each number that is read, widened and written; ``adding``: the driver's
    for each byte of a range's sums; ``start``: of a worker with its model; ``ray``: until workers are there."""

    chunk: float
    reference: float
    level: float
    trial: float
    types: dict[str, float]
    other: float
    adding: float
    start: float
    ray: float


def timed(work: Any, *arguments: Any) -> float:
    began = time.monotonic()
    work(*arguments)
    return time.monotonic() - began


def command(*words: str | Path) -> dict[str, Any]:
    argv = [sys.executable, "-m", "imatrix_runner", *map(str, words), "--json", "-q"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(model: Model, folder: Path) -> tuple[UnitCosts, tuple[PassWork, ...]]:
    """Measure every unit on a model; also return what the levels of the preset make of its tensors."""
    engine, options, text = (
        EmbeddedEngine(find(os.environ, cache_dir()), Runner(), cache_dir()),
        CollectOptions(),
        resource(CALIBRATION_TEXT),
    )
    threads, active, n_ctx = os.cpu_count() or 1, active_params(model), options.n_ctx
    per_chunk = threads / (n_ctx * active)
    found: list[CollectedRange] = []
    ranges = (ChunkRange(0, FEW), ChunkRange(FEW, MORE))
    engine.collect(
        CollectJob("bench", model.path, text, ranges, folder, replace(options, ppl=False), "bench", None),
        ignore,
        lambda one: not found.append(one),
    )
    progress(f"a chunk takes {found[1].seconds / MORE:.3f} s, starting {found[0].load_seconds:.2f} s")
    imatrix = folder / "imatrix.gguf"
    command("imatrix", "generate", model.path, "--chunks", "8", "--work-dir", folder / "imatrix", "-o", imatrix)
    made = command("quantize", model.path, "--imatrix", imatrix, "--preset", "bartowski", "--work-dir", folder / "levels")
    (figures,) = made["passes"]
    levels = {level["level"]: Path(level["files"][0]) for level in made["levels"]}
    n_elements = sum(tensor.n_elements for tensor in model.tensors)
    other = sum(figures[name] for name in ("reading", "widening", "checking", "writing")) / n_elements
    types = {cost["type"]: cost["seconds"] / cost["elements"] for cost in figures["types"] if cost["elements"]}

    def reference(count: int) -> None:
        out = folder / f"reference-{count}"
        engine.make_reference(
            ReferenceJob("bench", model.path, text, ChunkRange(0, count), out, options, "bench", None), ignore
        )

    def level(count: int) -> None:
        base, out = folder / f"reference-{count}", folder / f"scores-{count}"
        engine.measure_level(MeasureJob("bench", levels["Q4_K_M"], base, out, options, "bench", None), ignore)

    def trials(count: int) -> None:
        names = [tensor.name for tensor in model.tensors if "attn_q" in tensor.name or "ffn_down" in tensor.name][:1] * count
        some = tuple(Trial(f"{number}", (RoundedTensor(name, "Q3_K", weighted=False),)) for number, name in enumerate(names))
        job = TrialsJob(
            "bench", model.path, text, tuple(range(8)), some, None, folder / f"trials-{count}", options, "bench", None
        )
        engine.trials(job, ignore)

    between = MORE - FEW
    reference_seconds = -timed(reference, FEW) + timed(reference, MORE)
    level_seconds = -timed(level, FEW) + timed(level, MORE)
    trial_seconds = (-timed(trials, 1) + timed(trials, 4)) / 3 / 8
    progress(f"a chunk of the source {reference_seconds / between:.3f} s, of a level {level_seconds / between:.3f} s")
    costs = UnitCosts(
        per_chunk * found[1].seconds / MORE,
        per_chunk * reference_seconds / between,
        per_chunk * level_seconds / between,
        per_chunk * trial_seconds,
        types,
        other,
        adding(folder),
        found[0].load_seconds,
        starting(engine),
    )
    return costs, works_of(model, levels)


def works_of(model: Model, levels: dict[str, Path]) -> tuple[PassWork, ...]:
    """What a pass has to compute for these levels, from the headers of their files."""
    source = {tensor.name: tensor for tensor in model.tensors}
    wanted: dict[str, dict[str, list[WantedPlace]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for level, path in levels.items():
        for tensor in read_header(path).tensors:
            if tensor.type_name != source[tensor.name].type_name:
                wanted.setdefault(tensor.name, {}).setdefault(tensor.type_name, []).append(WantedPlace(level, 0, 0))
                sizes[tensor.name, tensor.type_name] = tensor.n_bytes
    return tuple(
        PassWork(
            name,
            source[name].n_elements,
            source[name].n_bytes,
            tuple(WantedPair(kind, sizes[name, kind], tuple(places)) for kind, places in types.items()),
        )
        for name, types in wanted.items()
    )


def adding(folder: Path) -> float:
    """The driver's seconds for each byte of a range's sums: read, added to a checkpoint, written, read again."""
    random = np.random.default_rng(1)
    entries = {
        f"blk.{n}.ffn_up_exps.weight": MatrixEntry(random.random((EXPERTS, WIDTH)), np.full(EXPERTS, 100)) for n in range(24)
    }
    ranged, path = folder / "range.gguf", folder / "checkpoint.gguf"
    publish(prepare_gguf(Matrix(entries, 512, 1, ("text",)), ranged, exact=True), ranged)
    state = Checkpoint({})
    seconds = []
    for number in range(4):
        began = time.monotonic()
        matrix = read(ranged, exact=True).matrix
        finished = CollectedRange(ChunkRange(number, 1), ranged, 1.0, 0.0, Perplexity())
        following = state.with_range(finished, matrix, None)
        publish(checkpoints.prepare(following, path), path)
        state = replace(following, matrix=read(path, exact=True).matrix)
        seconds.append(time.monotonic() - began)
    size = ranged.stat().st_size
    progress(f"the driver adds {size / 1e6 / min(seconds[1:]):.0f} MB of sums a second")
    return min(seconds[1:]) / size


def starting(engine: EmbeddedEngine) -> float:
    began = time.monotonic()
    with connected(ClusterOptions("local:1"), ignore, Stop()) as workers:
        workers.start(NodeFacts.of(engine))
        took = time.monotonic() - began
    progress(f"Ray and a worker start in {took:.1f} s")
    return took


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def enlarged(work: PassWork, model: Model) -> list[PassWork]:
    """The large model's tensors that a measured one stands for."""
    experts = model.n_experts or 1
    block = work.tensor.startswith("blk.")
    factor = EXPERTS / experts if "_exps" in work.tensor else 1.0
    if not block:
        vocab = max(tensor.shape[-1] for tensor in model.tensors if tensor.name == "token_embd.weight")
        factor = WORDS / vocab
    elements = round(work.elements * factor)
    pairs = tuple(replace(pair, n_bytes=round(pair.n_bytes * factor)) for pair in work.pairs)
    return [replace(work, elements=elements, source_bytes=round(work.source_bytes * factor), pairs=pairs)] * (
        LAYERS if block else 1
    )


@dataclass(frozen=True)
class Large:
    """The large model: weights, weights active for a token, bytes of its imatrix in float32, and what its levels take."""

    n_params: int
    active: int
    matrix: int
    works: tuple[PassWork, ...]

    @classmethod
    def of(cls, works: Sequence[PassWork], model: Model) -> Large:
        large = tuple(each for work in works for each in enlarged(work, model))
        experts = sum(work.elements for work in large if "_exps" in work.tensor)
        everything = sum(work.elements for work in large)
        columns = 2 * WIDTH + EXPERT
        own = matrix_bytes(model) if not model.n_experts else 4 * EXPERTS * columns
        return cls(everything, everything - experts + experts * USED // EXPERTS - WORDS * WIDTH, own * LAYERS, large)

    @property
    def n_bytes(self) -> int:
        return 2 * self.n_params


def phases(costs: UnitCosts, large: Large, workers: int, options: argparse.Namespace) -> list[WorkPhase]:
    threads, collect = options.threads, CollectOptions()
    token = large.active / threads
    disk = 1e9 * options.disk
    load = costs.start + large.n_bytes / disk
    size = range_chunks(large.active, None, large.matrix, collect, gpu=False)
    sums = 2 * large.matrix
    ranges = cut(options.chunks, size)
    imatrix = [WorkUnit(each.count * collect.n_ctx * token * costs.chunk, sums, sums * costs.adding) for each in ranges]
    levels = {place.level for work in large.works for pair in work.pairs for place in pair.places}
    units = cut_units(large.works, workers)
    pairs = [WorkUnit(sum(_seconds(work, costs) for work in unit) / threads, sum(map(_bytes, unit))) for unit in units]
    n_probes = sum(work.tensor.startswith("blk.") for work in large.works) * 5 // 4
    probe = WorkUnit(PROBE_TOKENS * token * costs.trial, 1000.0, 0.001)
    level_bytes = sum(pair.n_bytes * len(pair.places) for work in large.works for pair in work.pairs) / len(levels)
    chunks = measured_chunks(large.active, large.n_bytes, WORDS, collect, gpu=False)
    whole = [MeasuredRange(one, tuple(range(len(levels)))) for one in cut(HELD_OUT_CHUNKS, min(chunks, options.most))]
    measured = [
        WorkUnit(
            load
            + len(unit.subjects) * (costs.start + level_bytes / disk)
            + unit.chunks.count * collect.n_ctx * token * (costs.reference + len(unit.subjects) * costs.level),
            20.0 * unit.chunks.count * collect.n_ctx / 2 * len(unit.subjects),
            0.01,
        )
        for unit in divided(whole, workers)
    ]
    each = costs.other + sum(costs.types.values())  # a mix needs the errors of every type once
    errors = sorted(
        (WorkUnit(work.elements * each / threads, 10_000.0, 0.001) for work in large.works), key=lambda unit: -unit.seconds
    )
    return [
        WorkPhase("imatrix", tuple(imatrix), load),
        WorkPhase(f"{len(levels)} levels", tuple(pairs), costs.start),
        WorkPhase("errors", tuple(errors), costs.start),
        WorkPhase(f"{n_probes} probes", (probe,) * n_probes, load),
        WorkPhase("measurement", tuple(measured)),
    ]


def _seconds(work: PassWork, costs: UnitCosts) -> float:
    return work.elements * (costs.other + sum(costs.types.get(pair.type.lower(), 0.0) for pair in work.pairs))


def _bytes(work: PassWork) -> float:
    return float(sum(pair.n_bytes * len(pair.places) for pair in work.pairs))


def show(costs: UnitCosts, large: Large, options: argparse.Namespace) -> None:
    print(
        f"{large.n_params / 1e9:.1f} G weights, {large.active / 1e9:.2f} G active, workers with {options.threads} threads, ",
        end="",
    )
    print(f"{options.network:g} Gbit/s, {options.chunks} chunks, Ray {costs.ray:.0f} s")
    print(f"{'':14} {'workers':>8} {'time':>12}  {'bound':10} {'used':>5}  stops at")
    names = [phase.name for phase in phases(costs, large, 1, options)]
    for at, name in enumerate(names):
        table(name, costs, large, options, [at])
    table("all together", costs, large, options, range(len(names)))


def table(name: str, costs: UnitCosts, large: Large, options: argparse.Namespace, chosen: Sequence[int]) -> None:
    def of(workers: int) -> tuple[list[WorkPhase], ClusterShape]:
        everything = phases(costs, large, workers, options)
        return [everything[at] for at in chosen], ClusterShape(workers, options.network * 1e9 / 8, costs.ray)

    seconds = {workers: work_seconds(*of(workers)) for workers in WORKERS}
    stops = next(
        (few for few, many in pairwise(WORKERS) if seconds[many] > seconds[few] * (1 - LEAST_GAIN)),
        WORKERS[-1],
    )
    for number, workers in enumerate(SHOWN):
        forecast: ClusterForecast = forecast_cluster(*of(workers))
        title, end = (name, "") if number == 0 else ("", "")
        end = f"{stops}" if number == len(SHOWN) - 1 else ""
        used = f"{100 * forecast.efficiency:.0f} %"
        print(f"{title:14} {workers:8} {human_seconds(forecast.seconds):>12}  {forecast.bound:10} {used:>5}  {end}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", required=True, help="measure unit costs, and count")
    parser.add_argument("--model", choices=("layer", "demo"), default="layer")
    parser.add_argument("--threads", type=int, default=64, help="processors of each worker")
    parser.add_argument("--network", type=float, default=10.0, help="Gbit/s")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s that a worker loads a model with")
    parser.add_argument("--chunks", type=int, default=2000, help="of the calibration text")
    parser.add_argument("--most", type=int, default=10**6, help="chunks of a range of a measurement at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "layer-BF16.gguf"
        if options.model == "layer":
            write_llama_gguf(path, hidden=WIDTH, layers=1, ff=EXPERT, vocab=2048, experts=16, dtype="bf16", fluent=True)
        else:
            path.write_bytes(resource(DEMO_MODEL).read_bytes())
        model = open_gguf(path, allow_requantize=False)
        costs, works = measure(model, folder)
    show(costs, Large.of(works, model), options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
