"""``scripts/bench quantize``: all levels in one pass against the loop over llama-quantize, on the same model and threads.

Ours is the whole command in a fresh workspace (planning, verifying, hashing, journal), theirs the sum of bare llama-quantize
processes; both in turn, the order reversed every round; ratios are of medians. In the first round every file is compared byte
for byte. What is done once on a machine (compiling and proving our kernels) is done before. Tables come on stdout as cases are
done, progress on stderr. The exit code is 1 when a goal is missed.

Cases: ``bartowski`` and ``k-quants`` (the presets), ``single`` (Q4_K_M alone, then Q8_0 alone), ``added`` (two levels into a
finished bartowski workspace), ``plan`` (the dry run of 26 levels) and ``memory`` (one tensor larger than --max-buffer-size).
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from imatrix_runner.engines.embedded.bindings import Bindings, find
from imatrix_runner.engines.embedded.native_build import compile_kernels
from imatrix_runner.engines.jobs import Native, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.levels import Level, preset_levels, resolve_levels
from imatrix_runner.engines.llama_cpp.flags import quantize_command
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import child_environment
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from imatrix_runner.workspace import Workspace
from support.tiny_models import DType, write_llama_gguf

CASES = ("bartowski", "k-quants", "single", "added", "plan", "memory")
MODEL = "bench"
GOALS = {"bartowski": 0.55, "k-quants": 0.50, "Q4_K_M": 1.0, "Q8_0": 1.0}
BOUND_GOAL = 0.10
PLAN_GOAL, PLAN_LAYERS = 2.0, 33  # 9 tensors a layer and 3 besides: 300
ADDED = ("IQ3_S", "Q2_K_S")
MEMORY_LEVELS = ("Q8_0", "Q4_0")
MEMORY_MARGIN = 300_000_000
PLAIN = QuantizeOptions()
_COLUMNS = "  {:10} {:>6} {:>6} {:>9} {:>10}  {}"

Pairs = set[tuple[str, str]]
"""Of a tensor and a type it is quantised to."""


@dataclass(frozen=True)
class Took:
    """One process with those it started: wall seconds, and the peak resident bytes of the largest of them."""

    seconds: float
    peak: int


@dataclass(frozen=True)
class Theirs:
    """The loop over llama-quantize: seconds of each level."""

    levels: Mapping[str, float]
    peak: int

    @property
    def seconds(self) -> float:
        return sum(self.levels.values())


@dataclass(frozen=True)
class Ours:
    """One command: ``files`` by level, and what its one pass says it spent."""

    took: Took
    files: Mapping[str, Path]
    figures: Mapping[str, Any]

    @property
    def kernels(self) -> float:
        return float(sum(cost["seconds"] for cost in self.figures["types"]))

    @property
    def bound(self) -> float:
        """Seconds that could not be saved: each distinct pair once, and the tables, spread evenly over the threads."""
        return (self.kernels + float(self.figures["tables"])) / int(self.figures["threads"])

    @property
    def serial(self) -> float:
        """The bound, where no kernel runs while tables are made."""
        return self.kernels / int(self.figures["threads"]) + float(self.figures["tables"])

    @property
    def pairs(self) -> int:
        return sum(int(cost["pairs"]) for cost in self.figures["types"])


@dataclass(frozen=True)
class Bench:
    """What all cases share. ``model`` and ``imatrix`` lie in ``folder``."""

    toolchain: Toolchain
    folder: Path
    model: Path
    imatrix: Path
    threads: int
    rounds: int
    kernels: str


@dataclass(frozen=True)
class Case:
    """``arguments`` name the levels for us. ``before`` and ``after`` stand around our command in every round: they give it a
    directory for workspaces, and clear it away. ``there``: pairs that are in the workspace beforehand."""

    name: str
    levels: tuple[Level, ...]
    arguments: tuple[str, ...]
    before: Callable[[], Path]
    after: Callable[[Path], None]
    options: QuantizeOptions = PLAIN
    there: Pairs = field(default_factory=set)


@dataclass(frozen=True)
class Measured:
    case: Case
    ours: tuple[Ours, ...]
    theirs: tuple[Theirs, ...]
    wanted: int
    distinct: int

    @property
    def typical(self) -> Ours:
        """The round whose seconds are the median (or next to it)."""
        return sorted(self.ours, key=lambda ours: ours.took.seconds)[(len(self.ours) - 1) // 2]


def _levels(count: int) -> str:
    return f"{count} level" if count == 1 else f"{count} levels"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> tuple[Took, str]:
    """A process to its end, and its stdout; the disk is idle when it starts."""
    os.sync()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as talk:
        began = time.monotonic()
        child = subprocess.Popen(argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=talk)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        talk.seek(0)
        said, told = out.read().decode(), talk.read().decode(errors="replace")
    if child.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {child.returncode}: {told[-1500:]}")
    return Took(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)), said


def run_theirs(bench: Bench, case: Case, against: Mapping[str, Path] | None) -> Theirs:
    """llama-quantize level by level, each file deleted when it is made (and, with ``against``, compared)."""
    seconds: dict[str, float] = {}
    peaks: list[int] = []
    out = bench.folder / "theirs.gguf"
    for number, level in enumerate(case.levels, 1):
        options = level.apply(case.options)
        job = QuantizeJob("", bench.model, out, level.ftype, options, bench.imatrix, bench.threads, None)
        command = quantize_command(job, bench.toolchain)
        took, _ = run(command.argv, command.cwd or bench.folder, child_environment())
        seconds[level.name] = took.seconds
        peaks.append(took.peak)
        progress(f"  llama-quantize {number}/{len(case.levels)} {level.name:8} {took.seconds:7.2f} s")
        if against is not None and not filecmp.cmp(out, against[level.name], shallow=False):
            raise SystemExit(f"{case.name}: {level.name} is not the file that llama-quantize writes")
        out.unlink()
    return Theirs(seconds, max(peaks))


def our_command(bench: Bench, arguments: Sequence[str], work: Path) -> list[str]:
    command = [sys.executable, "-m", "imatrix_runner", "quantize", str(bench.model), "--imatrix", str(bench.imatrix)]
    return [
        *command,
        *arguments,
        "-t",
        str(bench.threads),
        *("--work-dir", str(work), "--engine", "embedded"),
        *("--kernels", bench.kernels, "--json"),
    ]


def run_ours(bench: Bench, case: Case, work: Path) -> Ours:
    took, said = run(our_command(bench, case.arguments, work), bench.folder, os.environ)
    document = json.loads(said)
    files = {level["level"]: Path(level["files"][0]) for level in document["levels"] if level["status"] == "done"}
    if missing := [level.name for level in case.levels if level.name not in files]:
        raise SystemExit(f"{case.name}: {', '.join(missing)} not made")
    (figures,) = document["passes"]
    progress(f"  imatrix-runner {_levels(len(files))} {took.seconds:7.2f} s, the pass {figures['seconds']:.2f} s")
    return Ours(took, files, figures)


def pairs_of(bench: Bench, files: Mapping[str, Path]) -> list[tuple[str, str]]:
    """What had to be quantised for these levels, from the headers of the model and of the levels."""
    source = {tensor.name: tensor.type_name for tensor in read_header(bench.model).tensors}
    tensors = (tensor for file in files.values() for tensor in read_header(file).tensors)
    return [(tensor.name, tensor.type_name) for tensor in tensors if tensor.type_name != source[tensor.name]]


def measure(bench: Bench, case: Case) -> Measured:
    ours: list[Ours] = []
    theirs: list[Theirs] = []
    needed: list[tuple[str, str]] = []
    for number in range(bench.rounds):
        progress(f"{case.name}, {_levels(len(case.levels))}, round {number + 1} of {bench.rounds}")
        if number % 2:
            theirs.append(run_theirs(bench, case, None))
        work = case.before()
        ours.append(run_ours(bench, case, work))
        needed = pairs_of(bench, ours[-1].files)
        if number % 2 == 0:
            theirs.append(run_theirs(bench, case, None if number else ours[-1].files))
        case.after(work)
    return Measured(case, tuple(ours), tuple(theirs), len(needed), len(set(needed) - case.there))


def show(measured: Measured, goal: float | None, ours: Set[str]) -> dict[str, Any]:
    """Print a case's table; its figures, with ``missed``: the goals that were. ``ours``: the types that our kernels make."""
    case, typical, figures = measured.case, measured.typical, measured.typical.figures
    stock = statistics.median(theirs.seconds for theirs in measured.theirs)
    seconds = statistics.median(ours.took.seconds for ours in measured.ours)
    ratio = seconds / stock
    missed = [f"ratio {ratio:.3f}, goal {goal}"] if goal is not None and ratio > goal else []
    print(f"\n{case.name}: {_levels(len(case.levels))}, {figures['threads']} threads, medians of {len(measured.ours)}")
    print(f"  llama-quantize {stock:.2f} s   imatrix-runner {seconds:.2f} s   ratio {ratio:.3f}{_goal(goal, bool(missed))}")
    computed, share = typical.pairs, typical.pairs / max(1, measured.wanted)
    print(f"  pairs computed {computed} of {measured.wanted} wanted ({share:.1%}); distinct and new {measured.distinct}")
    if computed != measured.distinct:
        missed.append(f"{computed} pairs computed, {measured.distinct} distinct and new")
    print(_COLUMNS.format("type", "pairs", "wanted", "seconds", "ns/weight", "kernel"))
    for cost in sorted(figures["types"], key=lambda cost: -cost["seconds"]):
        rate = cost["seconds"] / max(1, cost["elements"]) * 1e9
        whose = "ours" if cost["type"] in ours else "ggml"
        print(_COLUMNS.format(cost["type"], cost["pairs"], cost["wanted"], f"{cost['seconds']:.2f}", f"{rate:.1f}", whose))
    gaps = {
        "pass": statistics.median(_above(ours.figures["seconds"], ours.bound) for ours in measured.ours),
        "serial": statistics.median(_above(ours.figures["seconds"], ours.serial) for ours in measured.ours),
        "command": statistics.median(_above(ours.took.seconds, ours.bound) for ours in measured.ours),
    }
    bound_goal = BOUND_GOAL if case.arguments[0] == "--preset" else None
    if bound_goal is not None and gaps["pass"] > bound_goal:
        missed.append(f"the pass is {gaps['pass']:.1%} above the bound, goal {bound_goal:.0%}")
    bound = (
        f"bound {typical.bound:.2f} s = (kernels {typical.kernels:.2f} + tables {figures['tables']:.2f}) / {figures['threads']}"
    )
    told = "" if bound_goal is None else _goal(bound_goal, gaps["pass"] > bound_goal)
    print(f"  {bound}; above it: the pass ({figures['seconds']:.2f} s) {gaps['pass']:+.1%}{told}, ", end="")
    print(f"the command {gaps['command']:+.1%}")
    if figures["tables"] > 0.1:
        # ggml makes them under a lock that every call of a kernel takes.
        print(f"    with the tables made by one thread, and nothing beside: the pass {gaps['serial']:+.1%}")
    parts = {name: figures[name] for name in ("reading", "widening", "checking", "writing")}
    print("  seconds of threads besides: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()), flush=True)
    return {
        "levels": [level.name for level in case.levels],
        "stock": stock,
        "ours": seconds,
        "ratio": ratio,
        "goal": goal,
        "pairs": {"computed": computed, "wanted": measured.wanted, "distinct": measured.distinct, "share": share},
        "bound": typical.bound,
        "serial": typical.serial,
        "above": gaps,
        "rounds": {
            "stock": [{"seconds": theirs.seconds, "levels": theirs.levels, "peak": theirs.peak} for theirs in measured.theirs],
            "ours": [_round(ours) for ours in measured.ours],
        },
        "missed": missed,
    }


def _round(ours: Ours) -> dict[str, Any]:
    return {
        "seconds": ours.took.seconds,
        "peak": ours.took.peak,
        "bound": ours.bound,
        "serial": ours.serial,
        "pass": ours.figures,
    }


def _above(seconds: float, bound: float) -> float:
    return seconds / bound - 1 if bound else 0.0


def _goal(goal: float | None, missed: bool) -> str:
    return "" if goal is None else f" (goal {goal:.2f}: {'MISSED' if missed else 'met'})"


def preset(bench: Bench, name: str, keep: Path | None) -> Case:
    """``keep``: where the workspace of the last round shall stay, for others to build on."""
    levels, _ = preset_levels(name, bench.toolchain.types)

    def after(work: Path) -> None:
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            work.rename(keep)
        else:
            shutil.rmtree(work)

    return Case(name, levels, ("--preset", name), _fresh(bench), after)


def named(bench: Bench, names: Sequence[str]) -> Case:
    levels = resolve_levels(names, bench.toolchain.types)
    return Case(" and ".join(names), levels, ("--levels", ",".join(names)), _fresh(bench), shutil.rmtree)


def _fresh(bench: Bench) -> Callable[[], Path]:
    return lambda: Path(tempfile.mkdtemp(prefix="work-", dir=bench.folder))


def added(bench: Bench, kept: Path) -> Case:
    """Into the finished workspace in ``kept``, which is made if it is not there; after each round it is as before."""
    base = preset(bench, "bartowski", kept)
    if not kept.is_dir():
        progress("a finished bartowski workspace to add to")
        work = base.before()
        run_ours(bench, base, work)
        base.after(work)
    workspace = Workspace(kept / MODEL, MODEL)
    journal = workspace.journal.read_bytes()
    files = {level.name: workspace.root / f"{MODEL}-{level.name}.gguf" for level in base.levels}

    def after(_work: Path) -> None:
        workspace.journal.write_bytes(journal)
        for name in ADDED:
            (workspace.root / f"{MODEL}-{name}.gguf").unlink()
            workspace.ledger(name).unlink()

    return replace(named(bench, ADDED), name="added", before=lambda: kept, after=after, there=set(pairs_of(bench, files)))


def plan(bench: Bench) -> dict[str, Any]:
    """Seconds of planning all of a preset's levels, against as many dry runs of llama-quantize."""
    levels, _ = preset_levels("bartowski", bench.toolchain.types)
    command = our_command(bench, ("--preset", "bartowski", "--dry-run"), bench.folder / "none")
    ours: list[float] = []
    stock: list[float] = []
    for number in range(bench.rounds):
        progress(f"plan, round {number + 1} of {bench.rounds}")
        ours.append(run(command, bench.folder, os.environ)[0].seconds)
        stock.append(0.0)
        for level in levels:
            job = QuantizeJob("", bench.model, bench.model, level.ftype, level.apply(PLAIN), bench.imatrix, bench.threads, None)
            dry = quantize_command(job, bench.toolchain, dry_run=True)
            stock[-1] += run(dry.argv, dry.cwd or bench.folder, child_environment())[0].seconds
    seconds, theirs = statistics.median(ours), statistics.median(stock)
    tensors = len(read_header(bench.model).tensors)
    missed = [f"planning took {seconds:.2f} s, goal {PLAN_GOAL} s"] if seconds > PLAN_GOAL else []
    print(f"\nplan: {len(levels)} levels of {tensors} tensors, medians of {bench.rounds}")
    print(f"  imatrix-runner --dry-run {seconds:.2f} s{_goal(PLAN_GOAL, bool(missed))}   ", end="")
    print(f"{len(levels)} llama-quantize --dry-run {theirs:.2f} s", flush=True)
    rounds = {"stock": stock, "ours": ours}
    figures = {"ours": seconds, "stock": theirs, "goal": PLAN_GOAL, "tensors": tensors, "rounds": rounds, "missed": missed}
    return {"levels": [level.name for level in levels], **figures}


def memory(bench: Bench, megabytes: int, ours: Set[str]) -> dict[str, Any]:
    """Peaks when a tensor is larger than what may be held; of our processes that of the largest counts."""
    largest = max(read_header(bench.model).tensors, key=lambda tensor: tensor.n_elements)
    if (largest.n_bytes or 0) <= megabytes << 20:
        raise SystemExit(f"{largest.name} is no larger than --max-buffer-size {megabytes}: give more --experts")
    options = QuantizeOptions(max_buffer_size=megabytes)
    case = named(bench, MEMORY_LEVELS)
    case = replace(case, name="memory", options=options, arguments=(*case.arguments, "--max-buffer-size", str(megabytes)))
    measured = measure(bench, case)
    peak, theirs = max(ours.took.peak for ours in measured.ours), max(stock.peak for stock in measured.theirs)
    limit = (megabytes << 20) + MEMORY_MARGIN
    figures = show(measured, None, ours)
    if peak > limit:
        figures["missed"].append(f"peak {peak / 1e6:.0f} MB, goal {limit / 1e6:.0f} MB")
    size = f"{(largest.n_bytes or 0) / 1e6:.0f} MB, {4 * largest.n_elements / 1e6:.0f} MB as float32"
    print(f"  --max-buffer-size {megabytes} ({megabytes * 1.048576:.0f} MB), {largest.name} {largest.shape}: {size}")
    print(f"  peak resident: imatrix-runner's largest process {peak / 1e6:.0f} MB", end="")
    print(f" (goal {limit / 1e6:.0f}: {'MISSED' if peak > limit else 'met'}), llama-quantize {theirs / 1e6:.0f} MB", flush=True)
    return {**figures, "peak": {"ours": peak, "stock": theirs, "goal": limit, "tensor": largest.n_elements}}


def write_model(folder: Path, shape: Mapping[str, int], dtype: DType, extra: Mapping[str, tuple[int, ...]]) -> None:
    """A random llama and an imatrix with an entry for each of its weights: mean squares that are lognormal, as real ones are,
    about."""
    import numpy as np

    from imatrix_runner.imatrix.formats import write_gguf
    from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry

    folder.mkdir()
    path = folder / f"{MODEL}-{dtype.upper()}.gguf"
    write_llama_gguf(path, **shape, dtype=dtype, extra=extra)  # type: ignore[arg-type]
    draw = np.random.default_rng(0)
    chunks, chunk_size = 100, 512
    entries: dict[str, MatrixEntry] = {}
    for tensor in read_header(path).tensors:
        if len(tensor.shape) > 1:
            experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
            counts = np.full(experts, chunks * chunk_size // experts, np.int64)
            means = draw.lognormal(-1.0, 1.0, (experts, tensor.shape[0])) * draw.lognormal(0.0, 1.0)
            entries[tensor.name] = MatrixEntry(means * counts[:, None], counts)
    write_gguf(Matrix(entries, chunk_size, chunks, ("synthetic",)), folder / "imatrix.gguf")


def made(
    bench: Bench, name: str, shape: Mapping[str, int], dtype: DType, extra: Mapping[str, tuple[int, ...]] | None = None
) -> Bench:
    """``bench`` on a model of its own."""
    folder = bench.folder / name
    progress(f"writing the {name} model")
    # In a process of its own: a child's peak memory counts from the process that started it.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(write_model, folder, shape, dtype, extra or {}).result()
    model = folder / f"{MODEL}-{dtype.upper()}.gguf"
    tensors = read_header(model).tensors
    weights = sum(tensor.n_elements for tensor in tensors)
    print(f"{name} model: {dtype.upper()}, {weights / 1e6:.1f} M weights, {len(tensors)} tensors", flush=True)
    return replace(bench, folder=folder, model=model, imatrix=folder / "imatrix.gguf")


def same_build(toolchain: Toolchain, bindings: Bindings) -> None:
    """Both must compute with the same libraries: else the times, and perhaps the bytes, are of two programs."""
    if toolchain.directory.resolve() != bindings.directory.resolve():
        raise SystemExit(
            f"llama-quantize is in {toolchain.directory}, the embedded engine loads {bindings.directory}.\n"
            "Build the tools from the same version (imatrix-runner tools build), or set "
            f"LLAMA_CPP_LIB_PATH={toolchain.directory}"
        )
    commit = bindings.ggml.removesuffix("-dirty").rpartition(" ")[2]
    if not toolchain.commit.startswith(commit):
        raise SystemExit(f"llama-quantize is of commit {toolchain.commit}, the libraries beside it are of {commit}")
    print(f"{toolchain.identity()}; {bindings.identity()}\nboth of commit {commit} in {toolchain.directory}", flush=True)


def our_kernels(bindings: Bindings) -> tuple[Path, frozenset[str]] | None:
    """Where the compiled ones are (other sources, another place), and the types that they are proven for, with weights."""
    native = compile_kernels(cache_dir(), bindings.digest)
    if not isinstance(native, Native):
        return None
    proven = json.loads(native.proofs.read_bytes())["proven"] if native.proofs.exists() else ()
    names = (name.removeprefix("quantize_") for name in proven)
    return native.library, frozenset(name for name in names if not name.endswith("_unweighted"))


def prepare(bench: Bench, bindings: Bindings) -> tuple[Path, frozenset[str]] | None:
    """Do what only the first command on a machine does, on a model that is small."""
    progress("compiling and proving our kernels, if that was not done before")
    small = made(bench, "small", {"hidden": 256, "layers": 2, "ff": 512, "vocab": 512}, "bf16")
    levels, _ = preset_levels("bartowski", bench.toolchain.types)
    run_ours(small, named(small, [*(level.name for level in levels), *ADDED]), small.folder / "work")
    shutil.rmtree(small.folder)
    return our_kernels(bindings) if bench.kernels == "auto" else None


def run_case(
    name: str, bench: Bench, models: Callable[[str], Bench], kept: Path | None, buffer: int, ours: Set[str]
) -> dict[str, Any]:
    """Figures by measurement: one, but for ``single``."""
    if name == "single":
        return {level: show(measure(bench, named(bench, [level])), GOALS[level], ours) for level in ("Q4_K_M", "Q8_0")}
    if name == "added":
        assert kept is not None
        return {name: show(measure(bench, added(bench, kept)), None, ours)}
    if name == "plan":
        return {name: plan(models(name))}
    if name == "memory":
        return {name: memory(models(name), buffer, ours)}
    return {name: show(measure(bench, preset(bench, name, kept if name == "bartowski" else None)), GOALS[name], ours)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="some of them, with commas between (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--kernels", choices=("auto", "ggml"), default="auto", help="as imatrix-runner's own option")
    parser.add_argument("--width", type=int, default=1024, help="of the model's layers, a multiple of 256")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--type", choices=("bf16", "f16", "f32"), default="bf16", type=str.lower)
    parser.add_argument("--max-buffer-size", type=int, default=64, metavar="MiB", help="of the case memory")
    parser.add_argument("--experts", type=int, default=384, help="of 512 x 1024 weights, in memory's one large tensor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go")
    options = parser.parse_args()
    cases = [name for name in CASES if name in options.cases.split(",")]
    if unknown := set(options.cases.split(",")) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    toolchain = require(locate(None, env=os.environ, cache=cache_dir()))
    bindings = find(os.environ, cache_dir())
    same_build(toolchain, bindings)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="imatrix-runner-bench-") as folder:
        empty = Bench(toolchain, Path(folder), Path(), Path(), options.threads, options.rounds, options.kernels)
        kernels = prepare(empty, bindings)
        print(
            f"kernels: ours for {', '.join(sorted(kernels[1])) or 'no type'} ({kernels[0]})" if kernels else "kernels: ggml's"
        )
        width, dtype = options.width, options.type
        feed = max(512, width * 5 // 2 // 256 * 256)
        shape = {"hidden": width, "layers": options.layers, "ff": feed, "vocab": options.vocab}
        shapes = {
            "plan": ({**shape, "hidden": 256, "layers": PLAN_LAYERS, "ff": 512}, {}),
            "memory": (
                {"hidden": 512, "layers": 1, "ff": 1024, "vocab": 1024},
                {"blk.0.ffn_gate_exps.weight": (options.experts, 1024, 512)},
            ),
        }
        main_model = made(empty, "main", shape, dtype) if {*cases} - {*shapes} else empty
        kept = Path(folder) / "bartowski" if "added" in cases else None
        for name in cases:
            of_case = run_case(
                name,
                main_model,
                lambda name: made(empty, name, shapes[name][0], dtype, shapes[name][1]),
                kept,
                options.max_buffer_size,
                kernels[1] if kernels else frozenset(),
            )
            if kernels is not None and (our_kernels(bindings) or kernels)[0] != kernels[0]:
                raise SystemExit(f"{name}: the kernels changed while they were measured")
            figures.update(of_case)
            if options.json:
                facts: dict[str, Any] = {
                    "toolchain": toolchain.identity(),
                    "bindings": bindings.identity(),
                    "threads": options.threads,
                }
                facts["kernels"] = sorted(kernels[1]) if kernels else []
                arguments = {key: str(value) for key, value in vars(options).items()}
                text = json.dumps({**facts, "arguments": arguments, "cases": figures}, indent=1)
                options.json.write_text(text + "\n", encoding="utf-8")
    missed = [f"{name}: {what}" for name, case in figures.items() for what in case["missed"]]
    print("\n" + ("\n".join(("Goals missed:", *missed)) if missed else "All goals met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
