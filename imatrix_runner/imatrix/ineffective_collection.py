"""Warnings about options of a collection that are accepted but have no effect."""

from __future__ import annotations

from imatrix_runner.context.context import Session
from imatrix_runner.context.requests import ImatrixRequest
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.events import no_effect, warning
from imatrix_runner.imatrix.chunks import ChunkPlan
from imatrix_runner.models.model import Model
from imatrix_runner.models.tensor_patterns import OUTPUT, overrides, unmatched


def warn_of_placement(options: CollectOptions, model: Model, session: Session, no_gpu: str) -> None:
    """Warn of options that place the model on devices and that have no effect; ``no_gpu``: why there is no GPU."""
    layers = options.n_gpu_layers
    given = [f"-ngl {layers}"] if layers not in ("", "0", "auto") else []
    given += [f"-ts {options.tensor_split}"] if options.tensor_split else []
    given += [f"-sm {options.split_mode}"] if options.split_mode else []
    given += [f"-mg {options.main_gpu}"] if options.main_gpu is not None else []
    if given and not session.engine.devices:
        session.sink(warning(no_effect(given, no_gpu)))
    names = [tensor.name for tensor in model.tensors]
    entries = [("-ot", entry) for override in options.override_tensors for entry in override.split(",")]
    for text in unmatched(overrides(entries, names), names):
        session.sink(warning(text))


def ineffective_collection(request: ImatrixRequest, plan: ChunkPlan, model: Model) -> list[str]:
    """Return a warning for each option of a collection without effect: more chunks than the text has, snapshots never
    written."""
    options = request.options
    available = plan.n_tokens // options.n_ctx - request.first_chunk
    warnings: list[str] = []
    if request.chunks is not None and request.chunks > available:
        rest = f" after the first {request.first_chunk}" if request.first_chunk else ""
        warnings.append(
            f"The calibration text has only {available} chunks of {options.n_ctx} tokens{rest}; "
            f"{request.chunks} were asked for."
        )
    if request.save_frequency and not plan.snapshots:
        warnings.append(f"--save-frequency {request.save_frequency} leaves no snapshot: {plan.n_chunks} chunks are computed.")
    if request.min_expert_tokens and not model.n_experts:
        warnings.append(f"--min-expert-tokens {request.min_expert_tokens} has no effect: this model has no experts.")
    if options.process_output and all(tensor.name != OUTPUT for tensor in model.tensors):
        warnings.append(f"--process-output has no effect: this model has no {OUTPUT}.")
    return warnings
