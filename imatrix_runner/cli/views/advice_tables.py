"""Prints the result of ``advise``: the levels as a table, and every reason as a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imatrix_runner.advise.memory import SPARE_BYTES
from imatrix_runner.calibration.inspect.languages import SHORT, UNKNOWN
from imatrix_runner.cli.views.columns import Column, by_remark, fitted_table
from imatrix_runner.evaluate.predict_levels import describe_predictions
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.quantize.imatrix_benefit import KLD_SOURCE, PPL_SOURCE, REASONS
from imatrix_runner.safe_text import printable

if TYPE_CHECKING:
    from imatrix_runner.advise.cluster_advice import ClusterAdvice
    from imatrix_runner.advise.cluster_forecast import Bound
    from imatrix_runner.advise.timing_probe import Timing
    from imatrix_runner.app.advise import Advice, LevelAdvice, MachineFacts

_NEEDS = {
    "required": ("required", "bold"),
    "strongly useful": ("useful", ""),
    "marginal": ("marginal", "dim"),
    "none": ("none", "dim"),
    "unknown": ("unknown", "dim"),
}
"""A level's need of an imatrix: its word in the table, and the style."""

_PLACES = {"GPU": "green", "GPU and RAM": "yellow", "RAM": "", "nowhere": "red"}
_SEVERITIES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_FAR = 0.1
"""Difference of a probe's two pairs above which times are printed as a range."""
_WORTH_NAMING = 0.05
"""Smallest share of a text for which a language is named."""
_LABEL = 9

Row = tuple[str, Text]


def print_advice(advice: Advice, commands: Sequence[str], console: Console) -> None:
    """Print everything, with the recommendations last, where users look when a command ends."""
    _rows(console, _overview(advice))
    console.print()
    console.print(fitted_table(_COLUMNS, advice.levels, console))
    console.print()
    _rows(console, _notes(advice))
    _part(console, "Calibration", _calibration(advice))
    _part(console, "Time and disk", [*_time(advice), *_disk(advice)])
    if advice.cluster is not None:
        _part(console, "Cluster", _cluster(advice.cluster))
    _part(console, "Advice", _recommended(advice, commands))


def _part(console: Console, title: str, rows: Iterable[Row]) -> None:
    console.print()
    console.print(Text(title, style="bold"))
    _rows(console, rows)


def _rows(console: Console, rows: Iterable[Row]) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=_LABEL)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    console.print(grid)


def _overview(advice: Advice) -> Iterator[Row]:
    model, machine, context = advice.model, advice.machine, advice.context
    facts = [f"{_weights(model.n_params)} weights in {model.n_layers or '?'} layers"]
    facts += [f"{model.n_experts} experts"] if model.n_experts else []
    facts += [f"{model.main_type} of {human_bytes(model.n_bytes)}", f"{'a' if advice.has_template else 'no'} chat template"]
    yield "Model", Text(f"{model.name}: {model.architecture}, {', '.join(facts)}")
    yield "Machine", Text(_machine(machine))
    if machine.idle:
        yield "", Text(machine.idle, style="yellow")
    if model.n_bytes > machine.ram and not machine.planned:
        yield "", Text("The source is larger than the memory: computing the imatrix reads it from the disk.", style="yellow")
    note = f" ({context.note})" if context.note else ""
    yield "Context", Text(f"{context.n_ctx:,} tokens take {context.describe()}{note}")
    if advice.trained_context and context.n_ctx > advice.trained_context:
        yield "", Text(f"The model was trained for at most {advice.trained_context:,} tokens.", style="yellow")


def _weights(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _machine(machine: MachineFacts) -> str:
    free = f" ({human_bytes(machine.ram_free)} free now)" if machine.ram_free is not None else ""
    facts = [f"{human_bytes(machine.ram)} RAM{free or ' as given'}"]
    facts += [f"{gpu.name}{f' with {human_bytes(gpu.n_bytes)}' if gpu.n_bytes else ''}" for gpu in machine.gpus] or ["no GPU"]
    return f"{', '.join(facts)}; {human_bytes(machine.disk_free)} of disk free at {printable(str(machine.disk))}"


_COLUMNS: tuple[Column[LevelAdvice], ...] = (
    Column("Level", lambda each: each.level, left=True),
    Column("Size", lambda each: _size(each.n_bytes)),
    Column("Bits", lambda each: f"{each.bits_per_weight:.2f}" if each.bits_per_weight is not None else "-", 4),
    Column("Needs", lambda each: _size(each.fit.n_bytes if each.fit is not None else None), 3),
    Column("Runs in", lambda each: _place(each), left=True),
    Column("Imatrix", lambda each: Text(*_NEEDS[each.benefit.need]), left=True),
    Column("PPL error", lambda each: _pair(each.benefit.ppl_error, ".2f", " %"), 1),
    Column("KLD", lambda each: _pair(each.benefit.kld, ".4f"), 2),
    Column("Predicted KLD", lambda each: f"{each.predicted.kld:.4f}" if each.predicted is not None else None, 1),
)


def _size(n_bytes: int | None) -> str:
    return human_bytes(n_bytes) if n_bytes is not None else "-"


def _place(level: LevelAdvice) -> Text:
    if level.fit is None:
        return Text("fails" if level.failure else "-", style="red" if level.failure else "")
    style = _PLACES[level.fit.place]
    if level.fit.place == "GPU and RAM":
        return Text(f"GPU {level.fit.n_gpu_layers}/{level.fit.n_layers}", style=style)
    return Text(level.fit.place, style=style)


def _pair(pair: tuple[float | None, float | None] | None, form: str, unit: str = "") -> str:
    """``1.08 → 0.75 %``: without and with an imatrix; a single figure if only one is known."""
    if pair is None:
        return ""
    return " → ".join(format(value, form) for value in pair if value is not None) + unit


def _notes(advice: Advice) -> Iterator[Row]:
    """What the columns mean, where their figures come from, and remarks on single levels."""
    counted = "" if advice.context.n_bytes is None else ", the context"
    spare = f"{human_bytes(SPARE_BYTES)} for compute buffers (with flash attention llama.cpp took 120 to 670 MiB for 7B to 70B)"
    yield "Runs in", Text(f"what has room for its size{counted} and {spare}")
    if any(level.fit is not None and level.fit.place == "GPU and RAM" for level in advice.levels):
        yield "", Text("GPU n/m: with -ngl n on the GPU, the rest of its m layers in RAM")
    needs = {level.benefit.need for level in advice.levels}
    for label, (need, reason) in zip(_labels("Imatrix"), ((n, r) for n, r in REASONS.items() if n in needs), strict=False):
        yield label, Text(f"{need}: {reason}")
    yield "PPL error", Text(f"how much the perplexity exceeds the source's, without → with an imatrix ({PPL_SOURCE})")
    yield "KLD", Text(f"mean divergence from the source in nats, without → with ({KLD_SOURCE})")
    yield "", Text("one figure: measured with only (IQ types, Q2_K_S) or without only (the others)")
    yield "", Text("Both are of other models; to measure yours: imatrix-runner evaluate MODEL --ab")
    predicted = {level.level: level.predicted for level in advice.levels if level.predicted is not None}
    if predicted:
        yield "Predicted", Text(describe_predictions(predicted))
    failures = by_remark((level.level, printable(level.failure)) for level in advice.levels if level.failure)
    for failure, names in failures.items():
        yield "Fails", Text(f"{names}: {failure}", style="red")
    fallbacks = by_remark((each.level, _fallback(each)) for each in advice.levels if each.fallbacks and not each.failure)
    for fallback, names in fallbacks.items():
        yield "Fallback", Text(f"{names}: {fallback}", style="yellow")
    if advice.left_out:
        yield "Left out", Text(f"{', '.join(advice.left_out)}: for models trained in these types; --levels includes them")


def _fallback(level: LevelAdvice) -> str:
    share = f"{100 * level.fallback_share:.0f} % of the weights"
    return f"{level.fallbacks} tensors ({share}) get another type, because their rows do not divide into blocks"


def _labels(first: str) -> Iterator[str]:
    """The label of the first of several rows, and none for the others."""
    yield first
    while True:
        yield ""


def _calibration(advice: Advice) -> Iterator[Row]:
    text = advice.text
    known = [each for each in text.inspected.inspection.text.languages if each.code not in (SHORT, UNKNOWN)]
    shares = "".join(f", {each.name} {100 * each.share:.0f} %" for each in known if each.share >= _WORTH_NAMING)
    name = f"{printable(text.corpus.name)}{' (the shipped one)' if text.shipped else ''}"
    yield "Text", Text(f"{name}: {text.n_chunks:,} chunks of {text.n_ctx} tokens{shares}")
    for finding in text.findings:
        if text.shipped and finding.severity == "info" and not finding.todo:
            continue  # nothing to do about the shipped text
        line = Text(f"{printable(finding.text)}.")
        if finding.todo:
            line.append(f"\n{printable(finding.todo)}", style="dim")
        yield finding.severity.capitalize(), line
    if all(finding.severity == "info" for finding in text.findings):
        yield "", Text("No problems found.", style="green")


def _time(advice: Advice) -> Iterator[Row]:
    timing, n_chunks, held_out = advice.timing, advice.text.n_chunks, advice.held_out_chunks
    if timing is None:
        yield "Imatrix", Text(f"not timed: {advice.untimed}")
        return
    yield "Imatrix", Text(f"{_span(timing, n_chunks)} for {n_chunks:,} chunks on this machine, {advice.engine} engine")
    yield "", Text(_how(timing))
    measuring = f"{_span(timing, held_out)} for the {held_out:,} held-out chunks of the source"
    yield "Evaluate", Text(f"{measuring}, and again for each level if it is as fast")
    yield "Quantise", Text("was not timed")


def _span(timing: Timing, n_chunks: int) -> str:
    """``about 12:30``, or a range from the faster pair's to the slower pair's if they differ much."""
    if timing.second is None or timing.apart is None or timing.apart <= _FAR:
        return f"about {human_seconds(timing.expected(n_chunks))}"
    least, most = sorted((timing.first, timing.second))
    return f"{human_seconds(timing.load_seconds + n_chunks * least)} to {human_seconds(timing.load_seconds + n_chunks * most)}"


def _how(timing: Timing) -> str:
    if timing.second is None or timing.apart is None:
        return f"2 chunks took {timing.first:.2f} s each; the text is too short to time more"
    how = (
        f"2 chunks took {timing.second:.2f} s each, the 2 before them {timing.first:.2f} s, loading {timing.load_seconds:.1f} s"
    )
    return how if timing.apart <= _FAR else f"{how}: {100 * timing.apart:.0f} % apart, so this is rough (is the machine busy?)"


_BOUNDS: Mapping[Bound, str] = {
    "workers": "the workers compute all the time",
    "network": "the network is full",
    "driver": "this machine adds sums all the time",
    "loading": "workers load the model longer than they compute",
    "units": "there are fewer ranges than the workers could take",
}


def _cluster(cluster: ClusterAdvice) -> Iterator[Row]:
    threads = "1 thread" if cluster.threads == 1 else f"{cluster.threads:g} threads"
    workers = f"{_workers(cluster.workers)} with {threads} each"
    yield "Ranges", Text(f"{cluster.n_ranges} of at most {cluster.range_chunks} chunks, for {workers}")
    memory = f"about {human_bytes(cluster.memory)}" if cluster.memory is not None else "not known"
    yield "Memory", Text(f"{memory} for each worker")
    sent = f"{human_bytes(cluster.sums_bytes)} of sums to this machine"
    model = f"the model's {human_bytes(cluster.model_bytes)} to each worker that does not have it at the same path"
    yield "Network", Text(f"{sent}; {model}")
    for label, forecast in zip(_labels("Imatrix"), cluster.forecasts, strict=False):
        bound = _BOUNDS[forecast.bound]
        yield label, Text(f"about {human_seconds(forecast.seconds)} with {_workers(forecast.workers)}: {bound}")
    if cluster.stops is not None:
        yield "", Text(f"Beyond {_workers(cluster.stops)}, twice as many save less than a tenth of the time.")
        rate = human_bytes(cluster.bytes_per_second)
        yield "", Text(f"Taken for granted: workers as fast as this machine for each thread, {rate}/s of network.", style="dim")


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _disk(advice: Advice) -> Iterator[Row]:
    sizes = sorted(level.n_bytes for level in advice.levels if level.n_bytes is not None)
    free = advice.machine.disk_free
    wanted = {each.level for each in advice.recommendations}
    best = sum(level.n_bytes or 0 for level in advice.levels if level.level in wanted)
    parts = [f"{human_bytes(advice.imatrix_bytes)} for the imatrix"]
    parts += [f"{human_bytes(best)} for the recommended levels"] if wanted else []
    parts += [f"{human_bytes(sum(sizes))} for {'the level' if len(sizes) == 1 else f'all {len(sizes)} levels'}"]
    needed = f"{', '.join(parts)}; {human_bytes(free)} free"
    room, fitting = free - advice.imatrix_bytes, 0
    for n_bytes in sizes:
        room -= n_bytes
        fitting += room >= 0
    if fitting == len(sizes):
        yield "Disk", Text(needed)
    else:
        few = f"only the {fitting} smallest fit" if fitting else "not even the smallest fits"
        yield "Disk", Text(f"{needed}: {few}", style="yellow")


def _recommended(advice: Advice, commands: Sequence[str]) -> Iterator[Row]:
    for each in advice.recommendations:
        line = Text()
        line.append(each.level, style="bold green")
        line.append(f": {each.reason}")
        yield each.place[0].upper() + each.place[1:], line
    if not advice.recommendations:
        needed = [level.fit.n_bytes for level in advice.levels if level.fit is not None]
        least = f"the smallest needs {human_bytes(min(needed))}" if needed else "none can be made"
        yield "", Text(f"No level fits: {least}. Take a smaller model, or a shorter context with -c.", style="red")
    if advice.measured:
        names = ", ".join(advice.measured)
        yield "Measured", Text(f"{names}, on this model, by evaluate: its report is more reliable than these estimates")
    for label, command in zip(("Make", "Measure"), commands, strict=False):
        yield label, Text(printable(command), style="bold")
