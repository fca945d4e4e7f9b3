"""The options that several commands share, and the frozen requests they become."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.settings import setting, typed
from imatrix_runner.cli.types import LevelNames
from imatrix_runner.engines.base import CollectOptions, QuantizeOptions
from imatrix_runner.errors import UsageError
from imatrix_runner.quantize.levels import PRESETS
from imatrix_runner.quantize.typed_options import check_override, check_tensor_type
from imatrix_runner.untrusted import whole_number
from imatrix_runner.workflow.request import (
    DEFAULT_TOLERANCE,
    EnvironmentRequest,
    ImatrixRequest,
    LevelsRequest,
    SourceRequest,
)

SPLIT_MODES = ("none", "layer", "row", "tensor")

F = TypeVar("F", bound=Callable[..., Any])


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several option decorators as one, in the order in which ``--help`` shall list them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_FILE = click.Path(path_type=Path, dir_okay=False)
_TEXT = click.Path(path_type=Path)  # a folder is refused with the command that makes a text of it
_DIRECTORY = click.Path(path_type=Path, file_okay=False)

environment_options = together(
    setting("--work-dir", type=_DIRECTORY, default=Path("work"), show_default=True, help="Where each model gets a workspace."),
    setting(
        "--engine",
        type=click.Choice(["auto", "embedded", "binaries"]),
        default="auto",
        show_default=True,
        help="What computes: llama.cpp's programs (binaries) or llama-cpp-python (embedded).",
    ),
    setting("--llama-cpp", type=_DIRECTORY, metavar="DIR", help="Use the llama.cpp programs in this directory, and no others."),
    setting(
        "--timeout",
        type=click.FloatRange(min=0),
        default=600.0,
        show_default=True,
        metavar="SECONDS",
        help="End a program that for so long neither writes nor computes (0: never).",
    ),
)

output_options = together(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Also tell every file and figure as it comes."),
    click.option("--show-config", is_flag=True, help="Print every setting, its value and where it came from; then stop."),
)

source_options = together(
    setting(
        "--outtype",
        type=click.Choice(["auto", "f16", "bf16", "f32"]),
        default="auto",
        show_default=True,
        help="Type to convert a Hugging Face model to; auto is what it was published in.",
    ),
    setting("--mmproj", is_flag=True, help="Also convert the multimodal projector."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Allow the converter to run Python code from the model's directory."
    ),
    click.option("--offline", is_flag=True, help="Never use the network: only what is here or in the hub's cache."),
)

placement_options = together(
    setting(
        "-b", "--batch-size", type=click.IntRange(min=1), metavar="N", default=2048, show_default=True, help="Tokens per batch."
    ),
    setting(
        "-ub",
        "--ubatch-size",
        type=click.IntRange(min=1),
        metavar="N",
        default=512,
        show_default=True,
        help="Tokens computed at once.",
    ),
    setting("-ngl", "--n-gpu-layers", default="", metavar="N", help="Layers on the GPU: a number, auto or all."),
    setting("-ts", "--tensor-split", default="", metavar="N0,N1,…", help="Proportions of the model on several GPUs."),
    setting("-sm", "--split-mode", type=click.Choice(SPLIT_MODES), help="How the model is split across GPUs (default: layer)."),
    setting("-mg", "--main-gpu", type=click.IntRange(min=0), metavar="N", help="The GPU to use, or for what is not split."),
    setting("-ot", "--override-tensor", multiple=True, metavar="REGEX=BUFFER", help="Where matching tensors lie."),
    setting("-fa", "--flash-attn", type=click.Choice(("on", "off", "auto")), help="Flash attention (default: auto)."),
    setting("--mmap/--no-mmap", default=True, show_default=True, help="Map the model's file into memory."),
    setting(
        "--repack/--no-repack",
        default=True,
        show_default=True,
        help="Rearrange weights for this processor's kernels (left out by itself where those were seen to crash).",
    ),
)

compute_options = together(
    setting(
        "-c", "--ctx-size", type=click.IntRange(min=16), metavar="N", default=512, show_default=True, help="Tokens per chunk."
    ),
    placement_options,
)

collect_options = together(
    setting("-f", "--file", "text", type=_TEXT, metavar="TEXT", help="Calibration text (default: the shipped one)."),
    compute_options,
    setting("--chunks", type=click.IntRange(min=1), metavar="N", help="Compute at most so many chunks (default: all)."),
    setting(
        "--chunk",
        "--from-chunk",
        "first_chunk",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        help="Skip so many chunks first.",
    ),
    setting(
        "--output-frequency",
        "-ofreq",
        type=click.IntRange(min=1),
        metavar="N",
        help="Save every N chunks: what an interruption can cost (default: so that saving costs about 3 % of the time).",
    ),
    setting(
        "--save-frequency",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        help="Leave a whole imatrix of chunks 0..N every N chunks.",
    ),
    setting(
        "--until-converged",
        type=click.FloatRange(min=0, min_open=True, max=1),
        is_flag=False,
        flag_value=DEFAULT_TOLERANCE,
        metavar="[TOL]",
        help="Stop when the matrix no longer moves: less than TOL of every tensor's importance is estimated to lie in the "
        f"wrong columns (without TOL: {DEFAULT_TOLERANCE}). The text is then visited in a spread order.",
    ),
    setting(
        "--min-expert-tokens",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        help="Go on past --chunks until every expert saw N tokens, or the text ends.",
    ),
    setting(
        "--parse-special/--no-parse-special",
        default=None,
        help="Parse special tokens in the text, for chat transcripts (default: as the text was built).",
    ),
    setting("--process-output", is_flag=True, help="Also collect data for output.weight."),
    setting("--ppl/--no-ppl", default=True, show_default=True, help="Measure the perplexity on the way."),
)

_GENERATING = (
    *("text", "chunks", "first_chunk", "output_frequency", "save_frequency", "until_converged", "min_expert_tokens"),
    *("parse_special", "process_output", "ppl"),
)
"""Parameters that only matter where an imatrix is generated."""

threads_option = setting("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads (default: all).")

level_options = together(
    setting("--levels", type=LevelNames(), default="", help="Levels to make, for example Q4_K_M,IQ3_XXS."),
    setting("--preset", type=click.Choice(PRESETS), help="A publisher's set of levels."),
    setting(
        "--jobs", "-j", default="auto", metavar="N|auto", help="Levels made side by side (auto: as memory and cores allow)."
    ),
    click.option("--allow-requantize", is_flag=True, help="Accept a source that is already quantised."),
    setting("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is."),
    setting("--pure", is_flag=True, help="One type for all tensors, no mixture."),
    setting("--include-weights", multiple=True, metavar="NAME", help="Use the imatrix for these tensors only."),
    setting("--exclude-weights", multiple=True, metavar="NAME", help="Do not use the imatrix for these tensors."),
    setting(
        "--uncovered",
        default="fail",
        show_default=True,
        metavar="fail|keep|TYPE",
        help="Tensors without imatrix data: refuse the level, keep them as they are, or give them at least TYPE.",
    ),
    setting("--output-tensor-type", default="", metavar="TYPE", help="Type of output.weight."),
    setting("--token-embedding-type", default="", metavar="TYPE", help="Type of the token embeddings."),
    setting("--tensor-type", multiple=True, metavar="REGEX=TYPE", help="Type of the tensors whose name matches."),
    setting("--tensor-type-file", type=_FILE, metavar="FILE", help="A file of REGEX=TYPE, separated by white space."),
    setting("--prune-layers", default="", metavar="L0,L1,…", help="Leave these layers out."),
    setting("--keep-split", is_flag=True, help="Write as many shards as the source has."),
    setting("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Override metadata in the output."),
    setting(
        "--max-buffer-size",
        type=click.IntRange(min=1),
        metavar="MiB",
        help="Memory for rows (embedded: of all threads, 1024; binaries: of one tensor, 8192).",
    ),
    setting("--one-by-one", is_flag=True, help="Finish each level before the next, the smallest first: for small disks."),
    setting(
        "--kernels",
        type=click.Choice(["auto", "ggml"]),
        default="auto",
        show_default=True,
        help="auto: ours where they are proven to give the same bytes; ggml: only llama.cpp's own.",
    ),
    setting(
        "--verify",
        type=click.Choice(["header", "full"]),
        default="header",
        show_default=True,
        help="full: read every finished level again and check all its rows.",
    ),
)

force_option = click.option(
    "--force", is_flag=True, help="Take over the workspace of another model with the same name; its levels are made again."
)

dry_run_option = click.option("--dry-run", is_flag=True, help="Plan only: sizes, fallbacks, what will fail. Writes nothing.")


def environment_request(options: dict[str, Any], invocation: Invocation) -> EnvironmentRequest:
    return EnvironmentRequest(
        options["work_dir"],
        options["engine"],
        options["llama_cpp"],
        options["timeout"],
        invocation.command,
        bool(options.get("force")),
    )


def source_request(model: str, options: dict[str, Any]) -> SourceRequest:
    converting = typed("outtype", "mmproj", "trust_remote_code")
    return SourceRequest(model, options["outtype"], options["mmproj"], options["trust_remote_code"], converting)


def compute_request(options: dict[str, Any], **changes: Any) -> CollectOptions:
    """How chunks are computed."""
    layers = options["n_gpu_layers"]
    _check_placement(options)
    if layers and layers not in ("auto", "all") and whole_number(layers) is None:
        raise UsageError(
            f"-ngl {layers} is no number of layers", "llama.cpp takes a number, auto or all", "For example: -ngl 99"
        )
    if options["ctx_size"] > options["batch_size"] and options["ctx_size"] % options["batch_size"]:
        raise UsageError(
            f"A context of {options['ctx_size']} cannot be cut into batches of {options['batch_size']}",
            "a chunk is computed in whole batches",
            "Make -c a multiple of -b, or -b at least -c.",
        )
    values = {
        "n_ctx": options["ctx_size"],
        "n_batch": options["batch_size"],
        "n_ubatch": options["ubatch_size"],
        "threads": options["threads"],
        "n_gpu_layers": layers,
        "tensor_split": options["tensor_split"],
        "split_mode": options["split_mode"] or "",
        "main_gpu": options["main_gpu"],
        "override_tensors": tuple(options["override_tensor"]),
        "flash_attn": options["flash_attn"] or "",
        "mmap": options["mmap"],
        "repack": options["repack"],
    }
    return CollectOptions(**{**values, **changes})


def imatrix_request(options: dict[str, Any], extra: tuple[str, ...], **changes: Any) -> ImatrixRequest:
    collect = compute_request(
        options,
        parse_special=bool(options["parse_special"]),
        process_output=options["process_output"],
        ppl=options["ppl"],
        extra=extra,
    )
    values = {
        "text": options["text"],
        "options": collect,
        "chunks": options["chunks"],
        "first_chunk": options["first_chunk"],
        "output_frequency": options["output_frequency"],
        "save_frequency": options["save_frequency"],
        "until_converged": options["until_converged"],
        "min_expert_tokens": options["min_expert_tokens"],
        "parse_as_built": options["parse_special"] is None,
        "typed": (*typed(*_GENERATING), *((f"{extra[0]} after --",) if extra else ())),
    }
    return ImatrixRequest(**{**values, **changes})


def _check_placement(options: dict[str, Any]) -> None:
    """``-ts`` and ``-ot`` as llama.cpp reads them, before a model is opened."""
    shares = [part.strip() for part in re.split("[,/]", options["tensor_split"])] if options["tensor_split"] else []
    if any(not re.fullmatch(r"\d+(\.\d*)?|\.\d+", share) for share in shares):
        raise UsageError(
            f"-ts {options['tensor_split']} is no list of proportions",
            "each GPU gets a number, separated by commas",
            "For example: -ts 3,1",
        )
    for override in options["override_tensor"]:
        name, equals, place = override.partition("=")
        if not (name and equals and place):
            raise UsageError(
                f"-ot {override} names no place",
                "it is written REGEX=BUFFER",
                "For example: -ot 'ffn_.*_exps=CPU'",
            )


def levels_request(options: dict[str, Any]) -> LevelsRequest:
    if options["include_weights"] and options["exclude_weights"]:
        raise UsageError(
            "--include-weights and --exclude-weights exclude each other",
            "llama-quantize takes only one of them",
            "Leave one out.",
        )
    for entry in options["tensor_type"]:
        check_tensor_type(entry)
    for entry in options["override_kv"]:
        check_override(entry)
    if not all(whole_number(part) is not None for part in options["prune_layers"].split(",") if part):
        raise UsageError(
            f"--prune-layers {options['prune_layers']} is no list of layers",
            "it takes numbers",
            "For example: --prune-layers 3,4",
        )
    file: Path | None = options["tensor_type_file"]
    if file is not None and not file.is_file():
        raise UsageError(f"There is no file {file}", "it was given with --tensor-type-file", "Check the path.")
    quantize = QuantizeOptions(
        allow_requantize=options["allow_requantize"],
        leave_output_tensor=options["leave_output_tensor"],
        pure=options["pure"],
        include_weights=options["include_weights"],
        exclude_weights=options["exclude_weights"],
        output_tensor_type=options["output_tensor_type"],
        token_embedding_type=options["token_embedding_type"],
        tensor_types=options["tensor_type"],
        tensor_type_file=file.absolute() if file is not None else None,
        prune_layers=options["prune_layers"],
        keep_split=options["keep_split"],
        override_kv=options["override_kv"],
        max_buffer_size=options["max_buffer_size"],
    )
    from imatrix_runner.quantize.resolve import check_uncovered

    uncovered, jobs = check_uncovered(options["uncovered"]), _jobs(options["jobs"])
    return LevelsRequest(
        options["levels"],
        options["preset"] or "",
        quantize,
        jobs,
        options["threads"],
        uncovered,
        options["one_by_one"],
        options["verify"],
        options["kernels"],
    )


def _jobs(text: str) -> int | None:
    if text == "auto":
        return None
    number = whole_number(text)
    if not number:
        raise UsageError(f"--jobs {text} is no number of jobs", "it takes a number from 1, or auto", "For example: --jobs 2")
    return number
