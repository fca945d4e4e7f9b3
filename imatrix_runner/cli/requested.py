"""Makes frozen requests of options, and refuses invalid values before a model is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import typed
from imatrix_runner.cli.options import (
    CollectingOptions,
    ComputeOptions,
    EngineOptions,
    LevelOptions,
    MeasuringOptions,
    MixOptions,
    QuantisingOptions,
    SourceOptions,
    SpreadingOptions,
)
from imatrix_runner.cli.publishing_options import PublishingOptions
from imatrix_runner.cluster.cluster_options import ClusterOptions, checked_address
from imatrix_runner.context.requests import (
    DEFAULT_FEEDBACK_TOKENS,
    EnvironmentRequest,
    ImatrixRequest,
    LevelsRequest,
    MeasureRequest,
    MixRequest,
    PublishRequest,
    SourceRequest,
    SpeedRequest,
)
from imatrix_runner.engines.jobs import CollectOptions, QuantizeOptions
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.errors import UsageError
from imatrix_runner.events import no_effect
from imatrix_runner.files import exact_bytes
from imatrix_runner.mixes.targets import need_text
from imatrix_runner.quantize.typed_options import check_override, check_tensor_type, parse_split_size
from imatrix_runner.untrusted import whole_number


def environment_request(
    work_dir: Path,
    engine: EngineOptions,
    invocation: Invocation,
    *,
    force: bool = False,
    spreading: SpreadingOptions | None = None,
) -> EnvironmentRequest:
    cluster = cluster_request(spreading) if spreading is not None else None
    return EnvironmentRequest(work_dir, engine.engine, engine.llama_cpp, engine.timeout, invocation.command, force, cluster)


def cluster_request(spreading: SpreadingOptions) -> ClusterOptions | None:
    """Where work is spread to; None without ``--cluster``."""
    if not spreading.cluster:
        return None
    address = checked_address(spreading.cluster)
    return ClusterOptions(address, spreading.cpus_per_worker, spreading.gpus_per_worker, spreading.shared_fs)


def source_request(model: str, source: SourceOptions) -> SourceRequest:
    converting = typed(source, "outtype", "mmproj", "trust_remote_code")
    return SourceRequest(model, source.outtype, source.mmproj, source.trust_remote_code, converting)


def compute_request(compute: ComputeOptions, n_ctx: int = CollectOptions.n_ctx, **changes: Any) -> CollectOptions:
    """How chunks of ``n_ctx`` tokens are computed; ``changes``: further fields of the result."""
    layers = compute.n_gpu_layers
    _check_placement(compute)
    if layers and layers not in ("auto", "all") and whole_number(layers) is None:
        raise UsageError(f"Invalid -ngl {layers!r}", "llama.cpp takes a number, auto or all", "For example: -ngl 99")
    if n_ctx > compute.batch_size and n_ctx % compute.batch_size:
        raise UsageError(
            f"A context of {n_ctx} tokens cannot be divided into batches of {compute.batch_size}",
            "a chunk is computed in whole batches",
            "Make -c a multiple of -b, or -b at least -c.",
        )
    return CollectOptions(
        n_ctx=n_ctx,
        n_batch=compute.batch_size,
        n_ubatch=compute.ubatch_size,
        threads=compute.threads,
        n_gpu_layers=layers,
        tensor_split=compute.tensor_split,
        split_mode=compute.split_mode or "",
        main_gpu=compute.main_gpu,
        override_tensors=compute.override_tensor,
        flash_attn=compute.flash_attn or "",
        mmap=compute.mmap,
        repack=compute.repack,
        **changes,
    )


def _check_placement(compute: ComputeOptions) -> None:
    """Refuse values of ``-ts`` and ``-ot`` that llama.cpp cannot parse."""
    shares = [part.strip() for part in re.split("[,/]", compute.tensor_split)] if compute.tensor_split else []
    if any(not re.fullmatch(r"\d+(\.\d*)?|\.\d+", share) for share in shares):
        raise UsageError(
            f"Invalid -ts {compute.tensor_split!r}",
            "it takes a number for each GPU, separated by commas",
            "For example: -ts 3,1",
        )
    for override in compute.override_tensor:
        name, equals, place = override.partition("=")
        if not (name and equals and place):
            raise UsageError(
                f"Invalid -ot {override!r}",
                "it takes REGEX=BUFFER",
                "For example: -ot 'ffn_.*_exps=CPU'",
            )


def imatrix_request(
    collecting: CollectingOptions,
    compute: ComputeOptions,
    extra: tuple[str, ...],
    *,
    mode: str = "auto",
    out: Path | None = None,
    levels: LevelsRequest | None = None,
) -> ImatrixRequest:
    """``levels``: those that are made. If mixes or roundings are chosen, the text is needed with every imatrix, and without
    one."""
    mixing = levels is not None and need_text(levels.names, levels.rounding)
    generating = typed(
        collecting,
        *(() if mixing else ("text", "parse_special")),
        *("chunks", "first_chunk", "output_frequency", "save_frequency", "until_converged", "min_expert_tokens"),
        *("process_output", "ppl"),
    )
    return ImatrixRequest(
        mode=mode,
        text=collecting.text,
        options=compute_request(
            compute,
            collecting.ctx_size,
            parse_special=bool(collecting.parse_special),
            process_output=collecting.process_output,
            ppl=collecting.ppl,
            extra=extra,
        ),
        chunks=collecting.chunks,
        first_chunk=collecting.first_chunk,
        output_frequency=collecting.output_frequency,
        save_frequency=collecting.save_frequency,
        until_converged=collecting.until_converged,
        min_expert_tokens=collecting.min_expert_tokens,
        out=out,
        parse_as_built=collecting.parse_special is None,
        typed=(*generating, *((f"{extra[0]} after --",) if extra else ())),
    )


def levels_request(
    wanted: LevelOptions, making: QuantisingOptions, threads: int | None = None, mixes: MixOptions | None = None
) -> LevelsRequest:
    if making.include_weights and making.exclude_weights:
        raise UsageError(
            "--include-weights and --exclude-weights exclude each other",
            "llama-quantize takes only one of them",
            "Leave one out.",
        )
    _check_split(making)
    for entry in making.tensor_type:
        check_tensor_type(entry)
    for entry in making.override_kv:
        check_override(entry)
    if not all(whole_number(part) is not None for part in making.prune_layers.split(",") if part):
        raise UsageError(
            f"Invalid --prune-layers {making.prune_layers!r}",
            "it takes numbers, separated by commas",
            "For example: --prune-layers 3,4",
        )
    file = making.tensor_type_file
    if file is not None and not file.is_file():
        raise UsageError(f"{file} does not exist", "it was given with --tensor-type-file", "Check the path.")
    quantize = QuantizeOptions(
        allow_requantize=making.allow_requantize,
        leave_output_tensor=making.leave_output_tensor,
        pure=making.pure,
        include_weights=making.include_weights,
        exclude_weights=making.exclude_weights,
        output_tensor_type=making.output_tensor_type,
        token_embedding_type=making.token_embedding_type,
        tensor_types=making.tensor_type,
        tensor_type_file=file.absolute() if file is not None else None,
        prune_layers=making.prune_layers,
        keep_split=making.keep_split,
        override_kv=making.override_kv,
        max_buffer_size=making.max_buffer_size,
        split_max_size=parse_split_size(making.split_max_size) if making.split_max_size else None,
        split_max_tensors=making.split_max_tensors,
    )
    from imatrix_runner.quantize.resolve import check_uncovered

    return LevelsRequest(
        names=(*wanted.levels, *(_mixes(mixes) if mixes is not None else ())),
        preset=wanted.preset or "",
        options=quantize,
        jobs=_jobs(making.jobs),
        threads=threads,
        uncovered=check_uncovered(making.uncovered),
        one_by_one=making.one_by_one,
        verify=making.verify,
        kernels=making.kernels,
        mix=MixRequest(mixes.types, mixes.quality) if mixes is not None else MixRequest(),
        rounding=mixes.rounding if mixes is not None else STOCK,
        feedback_tokens=mixes.feedback_tokens if mixes is not None else DEFAULT_FEEDBACK_TOKENS,
    )


def _check_split(making: QuantisingOptions) -> None:
    """Refuse two ways to cut a level into shards."""
    wanted = {
        "--split-max-size": bool(making.split_max_size),
        "--split-max-tensors": making.split_max_tensors is not None,
        "--keep-split": making.keep_split,
    }
    if len(given := [name for name, on in wanted.items() if on]) > 1:
        raise UsageError(
            f"{given[0]} and {given[1]} exclude each other",
            "each of them decides which tensors go into which shard",
            "Leave one out.",
        )


def _mixes(mixes: MixOptions) -> Iterator[str]:
    """The names of the mixes that options ask for."""
    yield from (f"MIX@{size}" for size in mixes.size)
    yield from (f"MIX@{bits}bpw" for bits in mixes.bpw)
    yield from (f"MIX@kld:{kld}" for kld in mixes.kld)
    yield from (f"MIX@like:{level}" for level in mixes.like)
    memory = [f"{name}:{exact_bytes(size)}" for name, size in (("ram", mixes.ram), ("vram", mixes.vram)) if size is not None]
    if memory:
        yield f"MIX@{','.join(memory)}"


def _jobs(text: str) -> int | None:
    if text == "auto":
        return None
    number = whole_number(text)
    if not number:
        raise UsageError(f"Invalid --jobs {text!r}", "it takes a number from 1, or auto", "For example: --jobs 2")
    return number


def measure_request(measuring: MeasuringOptions, options: CollectOptions, **changes: Any) -> MeasureRequest:
    """The measurement that the options request; ``options``: how it is computed; ``changes``: further fields of the result."""
    return MeasureRequest(
        text=measuring.held_out,
        options=options,
        max_disk=measuring.max_disk,
        baselines=measuring.ab,
        domain=measuring.domain,
        n_predict=measuring.predict,
        chat_template=measuring.domain_template,
        target_kld=measuring.target_kld,
        target_size=measuring.target_size,
        speed=_speed(measuring),
        **changes,
    )


def _speed(measuring: MeasuringOptions) -> SpeedRequest | None:
    if not measuring.speed and measuring.min_speed is None:
        return None
    return SpeedRequest(measuring.speed_depth, measuring.speed_repetitions, measuring.min_speed)


def unused_measure_options(measuring: MeasuringOptions, *, measured: bool) -> tuple[str, ...]:
    """Warnings for options on the command line that need another one; ``measured``: whether anything will be measured."""
    warnings = []
    if not measured and (unused := typed(measuring, "max_disk")):
        warnings.append(no_effect(unused, "nothing is measured without --evaluate."))
    if not (measuring.speed or measuring.min_speed is not None) and (
        unused := typed(measuring, "speed_depth", "speed_repetitions")
    ):
        warnings.append(no_effect(unused, "nothing is timed without --speed or --min-speed."))
    if measuring.domain is None and (unused := typed(measuring, "predict", "domain_template")):
        warnings.append(no_effect(unused, "nothing is answered without --domain."))
    return tuple(warnings)


def publish_request(
    model: str, to: str, environment: EnvironmentRequest, how: PublishingOptions, levels: tuple[str, ...] = ()
) -> PublishRequest:
    return PublishRequest(
        model,
        to,
        environment,
        private=how.private,
        gated=how.gated or "",
        licence=how.licence,
        collection=how.collection,
        levels=levels,
        name_template=how.name_template,
    )


def unused_publish_options(how: PublishingOptions, *, published: bool) -> tuple[str, ...]:
    """Warnings for options that only matter where something is published."""
    unused = () if published else typed(how, "private", "gated", "licence", "collection", "name_template")
    return (no_effect(unused, "nothing is published without --publish."),) if unused else ()
