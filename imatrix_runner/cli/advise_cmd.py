"""``advise``: what fits this machine, what an imatrix brings, how long it takes; before hours are spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.invocation import PROGRAM, Invocation
from imatrix_runner.cli.options import (
    compute_request,
    environment_options,
    environment_request,
    output_options,
    placement_options,
    threads_option,
)
from imatrix_runner.cli.settings import SettingsCommand, setting
from imatrix_runner.cli.types import SIZE, LevelNames
from imatrix_runner.engines.base import CollectOptions, QuantizeOptions
from imatrix_runner.quantize.levels import PRESETS
from imatrix_runner.workflow.request import LevelsRequest, SourceRequest

if TYPE_CHECKING:
    from imatrix_runner.workflow.advise import Advice, LevelAdvice

_USES = ("general", "chat", "code", "multilingual")


@click.command(cls=SettingsCommand)
@click.argument("model")
@setting(
    "--levels", type=LevelNames(), default="", help="Levels to judge, for example Q4_K_M,IQ3_XXS (default: all there are)."
)
@setting("--preset", type=click.Choice(PRESETS), help="A publisher's set of levels.")
@click.option(
    "-c", "--ctx-size", "n_ctx", type=click.IntRange(min=1), metavar="N", help="Tokens of context to run with (default: 4096)."
)
@click.option("--ram", type=SIZE, metavar="SIZE", help="Plan for another machine: its memory, for example 16GiB.")
@click.option(
    "--vram", type=SIZE, metavar="SIZE", help="Plan for a GPU with so much memory (with --ram alone, or -ngl 0: for none)."
)
@click.option(
    "--use",
    type=click.Choice(_USES),
    default="general",
    show_default=True,
    help="What for: what the calibration text must hold.",
)
@setting(
    "-f",
    "--file",
    "--calibration",
    "text",
    type=click.Path(path_type=Path),  # a folder is refused with the command that makes a text of it
    metavar="TEXT",
    help="Calibration text (default: the shipped one).",
)
@setting(
    "--parse-special/--no-parse-special",
    default=None,
    help="Parse special tokens in the text, for chat transcripts (default: as the text was built).",
)
@click.option("--probe/--no-probe", default=True, show_default=True, help="Time two chunks (after two to warm up).")
@click.option("--allow-requantize", is_flag=True, help="Accept a source that is already quantised.")
@placement_options
@threads_option
@environment_options
@output_options
@click.pass_obj
def advise(invocation: Invocation, /, model: str, **options: Any) -> int:
    """Tell what of MODEL fits this machine, what an imatrix brings each level, and how long that takes.

    MODEL is a GGUF file or a Hugging Face directory that was converted before. Nothing is written. Every line gives its reason:
    sizes are llama.cpp's own plan, times are measured here with two chunks, other measurements name who made them.

    \b
    imatrix-runner advise model-BF16.gguf
    imatrix-runner advise model-BF16.gguf --vram 8GiB --ram 32GiB -c 16384 --preset bartowski
    imatrix-runner advise model-BF16.gguf --use chat --calibration chat.txt
    """
    from imatrix_runner.cli.render import listening
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.advise import AdviseRequest
    from imatrix_runner.workflow.advise import advise as run_advise
    from imatrix_runner.workflow.context import Context

    usual = {"ctx_size": CollectOptions().n_ctx}
    requantize = QuantizeOptions(allow_requantize=options["allow_requantize"])
    request = AdviseRequest(
        SourceRequest(model),
        environment_request(options, invocation),
        LevelsRequest(options["levels"], options["preset"] or "", requantize),
        options["text"],
        compute_request(options | usual, parse_special=bool(options["parse_special"])),
        options["parse_special"] is None,
        options["use"],
        options["n_ctx"],
        options["ram"],
        options["vram"],
        options["probe"],
    )
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)
        with stop_on_signals(context.stop):
            advice = run_advise(request, context)
    commands = next_commands(model, advice, options)
    if options["as_json"]:
        _print_json(advice, commands)
    elif not options["quiet"]:
        from imatrix_runner.cli.advise_tables import print_advice
        from imatrix_runner.cli.console import stdout_console

        print_advice(advice, commands, stdout_console())
    return 0


def next_commands(model: str, advice: Advice, options: dict[str, Any]) -> list[str]:
    """What to type next: make the recommended levels, then measure them. Empty where none fits."""
    import shlex

    from imatrix_runner.models.kind import no_next_token

    good = [each for each in advice.recommendations if not each.poor] or advice.recommendations
    wanted = list(dict.fromkeys(each.level for each in good))
    if not wanted:
        return []
    needs = {each.level: each.benefit.need for each in advice.levels}
    place = [] if options["work_dir"] == Path("work") else ["--work-dir", str(options["work_dir"])]
    levels = [model, "--levels", ",".join(wanted), *place]
    predicts = not no_next_token(advice.model)
    if not predicts or all(needs[level] == "none" for level in wanted):
        measured = [shlex.join([PROGRAM, "evaluate", model, *place])] if predicts else []
        return [shlex.join([PROGRAM, "quantize", *levels, "--imatrix", "none"]), *measured]
    text = ["-f", str(options["text"])] if options["text"] is not None else []
    layers = ["-ngl", options["n_gpu_layers"]] if options["n_gpu_layers"] else []
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
    }


def _print_json(advice: Advice, commands: list[str]) -> None:
    import msgspec

    from imatrix_runner.cli.documents import document, print_document
    from imatrix_runner.quantize.benefit import KLD_SOURCE, PPL_SOURCE

    model, machine, text, timing = advice.model, advice.machine, advice.text, advice.timing
    print_document(
        document(
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
                "judgements": msgspec.to_builtins(text.judgements),
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
            held_out_chunks=advice.held_out_chunks,
            imatrix_bytes=advice.imatrix_bytes,
            measured=list(advice.measured),
            recommendations=msgspec.to_builtins(advice.recommendations),
            commands=commands,
        )
    )
