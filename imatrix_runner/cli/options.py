"""Options that several commands share, in a class for each section of a help page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import click

from imatrix_runner.cli.option_fields import option, setting
from imatrix_runner.cli.types import FILE, FOLDER, SIZE, TEXT, LevelNames, complete_cluster, complete_level
from imatrix_runner.context.requests import DEFAULT_FEEDBACK_TOKENS, DEFAULT_TOLERANCE, OutType
from imatrix_runner.engines.levels import PRESETS
from imatrix_runner.engines.roundings import ROUNDINGS, STOCK, Rounding

MAKE = "What to make"
IMATRIX = "Imatrix"
COMPUTE = "Compute"
QUANTISE = "Quantise"
MIXES = "Mixes and rounding"
MEASURE = "Measure"
CLUSTER = "Cluster"
SOURCE = "Source"
TALK = "Talk"

SPLIT_MODES = ("none", "layer", "row", "tensor")


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    SECTION: ClassVar[str] = MAKE

    levels: tuple[str, ...] = setting(
        "--levels", type=LevelNames(), default="", help="Levels to make, for example Q4_K_M,IQ3_XXS."
    )
    preset: str | None = setting("--preset", type=click.Choice(PRESETS), help="A publisher's set of levels.")


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """Mixes to make, each option once for every target (``--levels MIX@4GiB`` names one too); and how numbers are rounded."""

    SECTION: ClassVar[str] = MIXES

    size: tuple[str, ...] = setting(
        "--size", multiple=True, metavar="SIZE", help="The best file of at most this size, for example 4GiB."
    )
    bpw: tuple[str, ...] = setting(
        "--bpw", multiple=True, metavar="BITS", help="The best file of this many bits per weight, for example 4.25."
    )
    kld: tuple[str, ...] = setting(
        "--kld", multiple=True, metavar="X", help="The smallest file whose mean KLD on the calibration text is at most X."
    )
    like: tuple[str, ...] = setting(
        "--like",
        multiple=True,
        metavar="LEVEL",
        shell_complete=complete_level,
        help="The best file of a stock level's exact size, for example Q4_K_M.",
    )
    ram: int | None = setting("--ram", type=SIZE, help="With --vram: the best file that runs in this much memory.")
    vram: int | None = setting(
        "--vram", type=SIZE, help="The best file that runs on a GPU with this much memory; with --ram, experts in RAM."
    )
    types: str = setting(
        "--types", default="", metavar="LIST", help="Types that mixes may use: k, iq, legacy, or types such as q4_k,q6_k (all)."
    )
    quality: Literal["normal", "high"] = setting(
        "--quality",
        type=click.Choice(["normal", "high"]),
        default="normal",
        show_default=True,
        help="high: measure the types near each solution as well.",
    )
    rounding: Rounding = setting(
        "--rounding",
        type=click.Choice(ROUNDINGS),
        default=STOCK,
        show_default=True,
        help="stock: llama-quantize's bytes; refined, feedback: other numbers of the same types, closer to the source.",
    )
    feedback_tokens: int = setting(
        "--feedback-tokens",
        type=click.IntRange(min=1024),
        metavar="N",
        default=DEFAULT_FEEDBACK_TOKENS,
        show_default=True,
        help="Tokens of the calibration text from which --rounding feedback learns what inputs have in common.",
    )


@dataclass(frozen=True, kw_only=True)
class WorkDirOptions:
    SECTION: ClassVar[str] = MAKE

    work_dir: Path = setting(
        "--work-dir", type=FOLDER, default=Path("work"), show_default=True, help="Where each model gets a workspace."
    )


@dataclass(frozen=True, kw_only=True)
class CollectingOptions:
    """The text that a generated imatrix is computed from, and how much of it."""

    SECTION: ClassVar[str] = IMATRIX

    text: Path | None = setting("-f", "--file", type=TEXT, metavar="TEXT", help="Calibration text (default: the shipped one).")
    ctx_size: int = setting(
        "-c", "--ctx-size", type=click.IntRange(min=16), metavar="N", default=512, show_default=True, help="Tokens per chunk."
    )
    chunks: int | None = setting(
        "--chunks", type=click.IntRange(min=1), metavar="N", help="Compute at most N chunks (default: all)."
    )
    first_chunk: int = setting(
        "--chunk", "--from-chunk", type=click.IntRange(min=0), metavar="N", default=0, help="Skip the first N chunks."
    )
    until_converged: float | None = setting(
        "--until-converged",
        type=click.FloatRange(min=0, min_open=True, max=1),
        is_flag=False,
        flag_value=DEFAULT_TOLERANCE,
        metavar="[TOL]",
        help="Stop when the imatrix has converged: less than TOL of every tensor's importance is estimated to be in the "
        f"wrong columns (without TOL: {DEFAULT_TOLERANCE}). Chunks are then computed in an order spread over the text.",
    )
    min_expert_tokens: int = setting(
        "--min-expert-tokens",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        help="Continue past --chunks until every expert has seen N tokens, or the text ends.",
    )
    output_frequency: int | None = setting(
        "--output-frequency",
        "-ofreq",
        type=click.IntRange(min=1),
        metavar="N",
        help="Save every N chunks, which is what a kill can cost (default: so that saving takes about 3 % of the time).",
    )
    save_frequency: int = setting(
        "--save-frequency",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        help="Keep a complete imatrix of all chunks so far every N chunks.",
    )
    parse_special: bool | None = setting(
        "--parse-special/--no-parse-special",
        default=None,
        help="Parse special tokens in the text, for chat transcripts (default: as the text was built).",
    )
    process_output: bool = setting("--process-output", is_flag=True, help="Also collect data for output.weight.")
    ppl: bool = setting("--ppl/--no-ppl", default=True, show_default=True, help="Also compute the perplexity of the text.")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    SECTION: ClassVar[str] = COMPUTE

    engine: str = setting(
        "--engine",
        type=click.Choice(["auto", "embedded", "binaries"]),
        default="auto",
        show_default=True,
        help="Compute with llama.cpp's programs (binaries) or llama-cpp-python (embedded).",
    )
    llama_cpp: Path | None = setting(
        "--llama-cpp", type=FOLDER, metavar="DIR", help="Use the llama.cpp programs in this directory, and no others."
    )
    timeout: float = setting(
        "--timeout",
        type=click.FloatRange(min=0),
        default=600.0,
        show_default=True,
        metavar="SECONDS",
        help="End a program that neither writes nor computes for this long (0: never).",
    )


@dataclass(frozen=True, kw_only=True)
class ThreadOptions(EngineOptions):
    threads: int | None = setting(
        "-t", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads (default: all)."
    )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(ThreadOptions):
    """How chunks are computed; options of llama.cpp."""

    n_gpu_layers: str = setting(
        "-ngl", "--n-gpu-layers", default="", metavar="N", help="Layers on the GPU: a number, auto or all."
    )
    batch_size: int = setting(
        "-b", "--batch-size", type=click.IntRange(min=1), metavar="N", default=2048, show_default=True, help="Tokens per batch."
    )
    ubatch_size: int = setting(
        "-ub",
        "--ubatch-size",
        type=click.IntRange(min=1),
        metavar="N",
        default=512,
        show_default=True,
        help="Tokens computed at once.",
    )
    tensor_split: str = setting(
        "-ts", "--tensor-split", default="", metavar="N0,N1,…", help="Proportions of the model for each of several GPUs."
    )
    split_mode: str | None = setting(
        "-sm", "--split-mode", type=click.Choice(SPLIT_MODES), help="How the model is split across GPUs (default: layer)."
    )
    main_gpu: int | None = setting(
        "-mg", "--main-gpu", type=click.IntRange(min=0), metavar="N", help="The GPU to use, or the one for what is not split."
    )
    override_tensor: tuple[str, ...] = setting(
        "-ot", "--override-tensor", multiple=True, metavar="REGEX=BUFFER", help="Buffer for the tensors whose name matches."
    )
    flash_attn: str | None = setting(
        "-fa", "--flash-attn", type=click.Choice(("on", "off", "auto")), help="Flash attention (default: auto)."
    )
    mmap: bool = setting("--mmap/--no-mmap", default=True, show_default=True, help="Map the model file into memory.")
    repack: bool = setting(
        "--repack/--no-repack",
        default=True,
        show_default=True,
        help="Rearrange weights for this processor's kernels (turned off automatically if these were found to crash).",
    )


@dataclass(frozen=True, kw_only=True)
class QuantisingOptions:
    """How levels are made; mostly options of llama-quantize."""

    SECTION: ClassVar[str] = QUANTISE

    uncovered: str = setting(
        "--uncovered",
        default="fail",
        show_default=True,
        metavar="fail|keep|TYPE",
        help="Tensors without imatrix data: refuse the level, keep them as they are, or give them at least TYPE.",
    )
    include_weights: tuple[str, ...] = setting(
        "--include-weights", multiple=True, metavar="NAME", help="Use the imatrix for these tensors only."
    )
    exclude_weights: tuple[str, ...] = setting(
        "--exclude-weights", multiple=True, metavar="NAME", help="Do not use the imatrix for these tensors."
    )
    tensor_type: tuple[str, ...] = setting(
        "--tensor-type", multiple=True, metavar="REGEX=TYPE", help="Type of the tensors whose name matches."
    )
    tensor_type_file: Path | None = setting(
        "--tensor-type-file", type=FILE, metavar="FILE", help="A file of REGEX=TYPE, separated by white space."
    )
    output_tensor_type: str = setting("--output-tensor-type", default="", metavar="TYPE", help="Type of output.weight.")
    token_embedding_type: str = setting(
        "--token-embedding-type", default="", metavar="TYPE", help="Type of the token embeddings."
    )
    leave_output_tensor: bool = setting("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is.")
    pure: bool = setting("--pure", is_flag=True, help="One type for all tensors, no mixture.")
    prune_layers: str = setting("--prune-layers", default="", metavar="L0,L1,…", help="Leave these layers out.")
    override_kv: tuple[str, ...] = setting(
        "--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Override metadata in the output."
    )
    keep_split: bool = setting("--keep-split", is_flag=True, help="Write as many shards as the source has.")
    split_max_size: str = setting(
        "--split-max-size",
        default="",
        metavar="N(M|G)",
        help="Cut larger levels into shards of at most N MB or GB (powers of 1000) of tensors, in a folder for each level.",
    )
    split_max_tensors: int | None = setting(
        "--split-max-tensors", type=click.IntRange(min=1), metavar="N", help="The same, by number of tensors in a shard."
    )
    allow_requantize: bool = option("--allow-requantize", is_flag=True, help="Accept a source that is already quantised.")
    jobs: str = setting(
        "--jobs", "-j", default="auto", metavar="N|auto", help="Levels made in parallel (auto: as memory and cores allow)."
    )
    one_by_one: bool = setting(
        "--one-by-one", is_flag=True, help="Finish each level before the next, the smallest first: for small disks."
    )
    max_buffer_size: int | None = setting(
        "--max-buffer-size",
        type=click.IntRange(min=1),
        metavar="MiB",
        help="Memory for rows (embedded: of all threads, 1024; binaries: of one tensor, 8192).",
    )
    kernels: Literal["auto", "ggml"] = setting(
        "--kernels",
        type=click.Choice(["auto", "ggml"]),
        default="auto",
        show_default=True,
        help="auto: imatrix-runner's, where proven to give the same bytes as ggml's; ggml: only llama.cpp's.",
    )
    verify: Literal["header", "full"] = setting(
        "--verify",
        type=click.Choice(["header", "full"]),
        default="header",
        show_default=True,
        help="header: check the structure of every finished level; full: also read it again and check all rows.",
    )


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """How levels are measured, by ``evaluate`` and at the end of ``run``."""

    SECTION: ClassVar[str] = MEASURE

    held_out: Path | None = setting(
        "--text",
        type=TEXT,
        metavar="HELD_OUT",
        help="Held-out text to measure on, which must not overlap the calibration text (default: a shipped one).",
    )
    max_disk: int | None = setting(
        "--max-disk", type=SIZE, help="Most disk space for the measurement's own files at a time (default: 8GiB)."
    )
    ab: bool = setting(
        "--ab", is_flag=True, help="Also measure each level made without imatrix, and give a verdict on its benefit."
    )
    domain: Path | None = setting(
        "--domain",
        type=FILE,
        metavar="PROMPTS",
        help="Prompts that the source and each level answer, for comparison (JSON lines or text).",
    )
    predict: int = setting(
        "--predict",
        type=click.IntRange(1, 4096),
        metavar="N",
        default=128,
        show_default=True,
        help="Most tokens of an answer.",
    )
    domain_template: Path | None = setting(
        "--chat-template-file", type=FILE, metavar="FILE", help="Chat template for these prompts (default: the model's own)."
    )
    target_kld: float | None = setting(
        "--target-kld",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="Name the smallest level with a mean KLD of at most X.",
    )
    speed: bool = setting(
        "--speed", is_flag=True, help="Also time the source and each level on this machine, as llama-bench does (pp512, tg128)."
    )
    speed_depth: int = setting(
        "--speed-depth",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        show_default=True,
        help="Tokens in the context before each timed test.",
    )
    speed_repetitions: int = setting(
        "--speed-repetitions",
        type=click.IntRange(2, 100),
        metavar="N",
        default=5,
        show_default=True,
        help="How often each test is timed.",
    )
    min_speed: float | None = setting(
        "--min-speed",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        help="Time all, and name the closest level to the source that generates N tokens/s (on GPUs with the least -ngl).",
    )
    target_size: int | None = setting("--target-size", type=SIZE, help="Name the best level of at most this size.")


@dataclass(frozen=True, kw_only=True)
class SpreadingOptions:
    """Where long work is spread to."""

    SECTION: ClassVar[str] = CLUSTER

    cluster: str = setting(
        "--cluster",
        default="",
        metavar="auto|ADDRESS|local:N",
        shell_complete=complete_cluster,
        help="Spread the work over the workers of a Ray cluster, or over N on this machine; the bytes stay the same.",
    )
    cpus_per_worker: int | None = setting(
        "--cpus-per-worker",
        type=click.IntRange(min=1),
        metavar="N",
        help="Processors for each worker (default: those of its machine).",
    )
    gpus_per_worker: float = setting(
        "--gpus-per-worker",
        type=click.FloatRange(min=0),
        metavar="N",
        default=0.0,
        show_default=True,
        help="GPUs for each worker.",
    )
    shared_fs: bool = setting(
        "--shared-fs/--no-shared-fs",
        default=True,
        show_default=True,
        help="Whether folders that look shared between the machines are taken for it.",
    )


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How the model is fetched and converted."""

    SECTION: ClassVar[str] = SOURCE

    outtype: OutType = setting(
        "--outtype",
        type=click.Choice(["auto", "f16", "bf16", "f32"]),
        default="auto",
        show_default=True,
        help="Type to convert a Hugging Face model to; auto: the type that it was published in.",
    )
    mmproj: bool = setting("--mmproj", is_flag=True, help="Also convert the multimodal projector.")
    trust_remote_code: bool = option(
        "--trust-remote-code", is_flag=True, help="Allow the converter to run Python code from the model's directory."
    )
    offline: bool = option("--offline", is_flag=True, help="Never use the network: only local files and the hub's cache.")


@dataclass(frozen=True, kw_only=True)
class TalkOptions:
    """What a command prints; ``show_config`` is handled before the command runs."""

    SECTION: ClassVar[str] = TALK

    as_json: bool = option("--json", is_flag=True, help="Print one JSON document on stdout.")
    quiet: bool = option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
    verbose: bool = option("-v", "--verbose", is_flag=True, help="Also print details and every file as it is saved.")
    show_config: bool = option(
        "--show-config", is_flag=True, help="Print every setting, its value and where it comes from, and exit."
    )


def force_option() -> Any:
    return option(
        "--force",
        is_flag=True,
        section=MAKE,
        help="Take over the workspace of another model with the same name; its levels are made again.",
    )


def dry_run_option() -> Any:
    return option("--dry-run", is_flag=True, section=MAKE, help="Plan only: sizes, fallbacks, what will fail. Writes nothing.")
