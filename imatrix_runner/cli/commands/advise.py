"""``advise``: what fits this machine, what is gained by an imatrix, and how long it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import PROGRAM, Invocation
from imatrix_runner.cli.option_fields import argument, listed, option, setting
from imatrix_runner.cli.options import ComputeOptions, SpreadingOptions, TalkOptions, WorkDirOptions
from imatrix_runner.cli.requested import compute_request, environment_request
from imatrix_runner.cli.types import SIZE, TEXT, LevelNames
from imatrix_runner.cli.work import at_work, print_result
from imatrix_runner.context.requests import LevelsRequest, SourceRequest
from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.levels import PRESETS

if TYPE_CHECKING:
    from imatrix_runner.advise.cluster_advice import ClusterAdvice
    from imatrix_runner.app.advise import Advice, LevelAdvice

_WHAT, _MACHINE = "What to assess", "Machine"


@dataclass(frozen=True, kw_only=True)
class AdviseOptions:
    model: str = argument()
    levels: tuple[str, ...] = setting(
        "--levels",
        type=LevelNames(),
        default="",
        section=_WHAT,
        help="Levels to assess, for example Q4_K_M,IQ3_XXS (default: all).",
    )
    preset: str | None = setting("--preset", type=click.Choice(PRESETS), section=_WHAT, help="A publisher's set of levels.")
    use: Literal["general", "chat", "code", "multilingual"] = option(
        "--use",
        type=click.Choice(["general", "chat", "code", "multilingual"]),
        default="general",
        show_default=True,
        section=_WHAT,
        help="Intended use, which the calibration text should cover.",
    )
    text: Path | None = setting(
        "-f",
        "--file",
        "--calibration",
        type=TEXT,
        metavar="TEXT",
        section=_WHAT,
        help="Calibration text (default: the shipped one).",
    )
    parse_special: bool | None = setting(
        "--parse-special/--no-parse-special",
        default=None,
        section=_WHAT,
        help="Parse special tokens in the text, for chat transcripts (default: as the text was built).",
    )
    allow_requantize: bool = option(
        "--allow-requantize", is_flag=True, section=_WHAT, help="Accept a source that is already quantised."
    )
    place: WorkDirOptions = listed(_WHAT)
    n_ctx: int | None = option(
        "-c",
        "--ctx-size",
        type=click.IntRange(min=1),
        metavar="N",
        section=_MACHINE,
        help="Tokens of context to run with (default: 4096).",
    )
    ram: int | None = option(
        "--ram", type=SIZE, metavar="SIZE", section=_MACHINE, help="Plan for another machine: its memory, for example 16GiB."
    )
    vram: int | None = option(
        "--vram",
        type=SIZE,
        metavar="SIZE",
        section=_MACHINE,
        help="Plan for a GPU with this much memory (with --ram alone, or -ngl 0: without a GPU).",
    )
    probe: bool = option(
        "--probe/--no-probe",
        default=True,
        show_default=True,
        section=_MACHINE,
        help="Time two chunks (after two for warming up).",
    )
    compute: ComputeOptions
    spreading: SpreadingOptions
    talk: TalkOptions


@command(
    AdviseOptions,
    examples=(
        "imatrix-runner advise model-BF16.gguf",
        "imatrix-runner advise model-BF16.gguf --vram 8GiB --ram 32GiB -c 16384 --preset bartowski",
        "imatrix-runner advise model-BF16.gguf --use chat --calibration chat.txt",
        "imatrix-runner advise model-BF16.gguf --cluster auto",
    ),
)
def advise(invocation: Invocation, options: AdviseOptions) -> int:
    """Show which levels of MODEL fit this machine, what each gains from an imatrix, and how long that takes.

    MODEL is a GGUF file, or a Hugging Face directory that was converted before. Nothing is written. Every line gives its
    reason: sizes are from llama.cpp's dry run, times are measured here with two chunks, other measurements name their source.
    """
    from imatrix_runner.app.advise import AdviseRequest
    from imatrix_runner.app.advise import advise as run_advise
    from imatrix_runner.cli.views.advice_tables import print_advice

    request = AdviseRequest(
        SourceRequest(options.model),
        environment_request(options.place.work_dir, options.compute, invocation, spreading=options.spreading),
        LevelsRequest(options.levels, options.preset or "", QuantizeOptions(allow_requantize=options.allow_requantize)),
        options.text,
        compute_request(options.compute, parse_special=bool(options.parse_special)),
        options.parse_special is None,
        options.use,
        options.n_ctx,
        options.ram,
        options.vram,
        options.probe,
    )
    with at_work(options.talk) as work:
        advice = run_advise(request, work.context)
    commands = next_commands(advice, options)
    print_result(options.talk, lambda: _document(advice, commands), lambda console: print_advice(advice, commands, console))
    return 0


def next_commands(advice: Advice, options: AdviseOptions) -> list[str]:
    """Commands to type next: one makes the recommended levels, one measures them. Empty if no level fits."""
    import shlex

    from imatrix_runner.models.kind import no_next_token

    good = [each for each in advice.recommendations if not each.poor] or advice.recommendations
    wanted = list(dict.fromkeys(each.level for each in good))
    if not wanted:
        return []
    needs = {each.level: each.benefit.need for each in advice.levels}
    work_dir, model = options.place.work_dir, options.model
    place = [] if work_dir == Path("work") else ["--work-dir", str(work_dir)]
    levels = [model, "--levels", ",".join(wanted), *place]
    predicts = not no_next_token(advice.model)
    if not predicts or all(needs[level] == "none" for level in wanted):
        measured = [shlex.join([PROGRAM, "evaluate", model, *place])] if predicts else []
        return [shlex.join([PROGRAM, "quantize", *levels, "--imatrix", "none"]), *measured]
    text = ["-f", str(options.text)] if options.text is not None else []
    layers = ["-ngl", options.compute.n_gpu_layers] if options.compute.n_gpu_layers else []
    compared = shlex.join([PROGRAM, "evaluate", model, "--ab", *place, *layers])
    return [shlex.join([PROGRAM, "run", *levels, *text, *layers]), compared]


def _level(level: LevelAdvice) -> dict[str, Any]:
    need, fit = level.benefit, level.fit
    return {
        "level": level.level,
        "bytes": level.n_bytes,
        "bits_per_weight": level.bits_per_weight,
        "failure": level.failure,
        "fit": {
            "place": fit.place,
            "bytes": fit.n_bytes,
            "n_gpu_layers": fit.n_gpu_layers,
            "n_layers": fit.n_layers,
            "reason": fit.reason,
        }
        if fit is not None
        else None,
        "imatrix": {"need": need.need, "reason": need.reason, "ppl_error": need.ppl_error, "kld": need.kld},
        "fallbacks": level.fallbacks,
        "fallback_share": level.fallback_share,
        "predicted_kld": asdict(level.predicted) if level.predicted is not None else None,
    }


def _cluster(cluster: ClusterAdvice) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(cluster).items() if name not in ("forecasts", "stops")},
        "forecasts": [
            {
                "workers": each.workers,
                "seconds": each.seconds,
                "bound": each.bound,
                "bytes_moved": each.moved_bytes,
                "efficiency": each.efficiency,
            }
            for each in cluster.forecasts
        ],
        "stops_scaling_at": cluster.stops,
    }


def _document(advice: Advice, commands: list[str]) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.cli.views.json_documents import document
    from imatrix_runner.quantize.imatrix_benefit import KLD_SOURCE, PPL_SOURCE

    model, machine, text, timing = advice.model, advice.machine, advice.text, advice.timing
    return document(
        "advise",
        exit_code=0,
        model={
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.n_params,
            "bytes": model.n_bytes,
            "type": model.main_type,
            "layers": model.n_layers,
            "experts": model.n_experts,
            "trained_context": advice.trained_context,
            "chat_template": advice.has_template,
        },
        machine=msgspec.to_builtins(machine, enc_hook=str),
        context={
            "tokens": advice.context.n_ctx,
            "bytes": advice.context.n_bytes,
            "certainty": advice.context.certainty,
            "note": advice.context.note,
        },
        levels=[_level(each) for each in advice.levels],
        left_out=list(advice.left_out),
        sources={"ppl_error": PPL_SOURCE, "kld": KLD_SOURCE},
        calibration={
            "path": str(text.corpus.path),
            "shipped": text.shipped,
            "n_ctx": text.n_ctx,
            "tokens": text.n_tokens,
            "chunks": text.n_chunks,
            "languages": msgspec.to_builtins(text.inspected.inspection.text.languages),
            "judgements": msgspec.to_builtins(text.findings),
        },
        engine=advice.engine,
        timing={
            **msgspec.to_builtins(timing),
            "apart": timing.apart,
            "seconds_per_chunk": timing.seconds_per_chunk,
            "imatrix_seconds": timing.expected(text.n_chunks),
        }
        if timing is not None
        else None,
        untimed=advice.untimed,
        cluster=_cluster(advice.cluster) if advice.cluster is not None else None,
        held_out_chunks=advice.held_out_chunks,
        imatrix_bytes=advice.imatrix_bytes,
        measured=list(advice.measured),
        recommendations=msgspec.to_builtins(advice.recommendations),
        commands=commands,
    )
