"""Warnings of a command about options that it accepts and that change nothing, shown with the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imatrix_runner.engines.base import CollectOptions, DryRun, QuantizeOptions
from imatrix_runner.errors import from_os_error
from imatrix_runner.events import info, no_effect, warning
from imatrix_runner.imatrix.chunks import ChunkPlan
from imatrix_runner.imatrix.expected import ExpectedMatrix
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.models.sources import Model
from imatrix_runner.quantize.ineffective import (
    OUTPUT,
    Override,
    broad,
    ineffective_options,
    ineffective_types,
    overrides,
    unmatched,
)
from imatrix_runner.quantize.levels import Level
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.levels import LevelPlanner
from imatrix_runner.workflow.plan import ImatrixStep, LevelStep
from imatrix_runner.workflow.request import ImatrixRequest, LevelsRequest


def warn_of_level_options(
    planner: LevelPlanner,
    steps: Sequence[LevelStep],
    imatrix: ImatrixStep,
    matrix: MatrixFile | None,
    expected: ExpectedMatrix | None,
) -> None:
    """Warn of every option of levels that has no effect on this model, with the nearest name where it matches nothing."""
    model, options, session = planner.frozen.model, planner.request.options, planner.session
    entries = matrix.matrix.entries if matrix is not None else expected.sizes if expected is not None else None
    told = ineffective_options(options, model.header, model.tensors, imatrix=imatrix.present, entries=entries)
    if planner.request.uncovered != "fail" and not imatrix.present:
        told.append(f"--uncovered {planner.request.uncovered} has no effect: no imatrix is used.")
    given = overrides(_entries(options), _output_names(model, steps))
    told += unmatched(given, [tensor.name for tensor in model.tensors])
    told += ineffective_types(given, _types(planner, steps, given, matrix, expected), options)
    for text in told:
        session.sink(warning(text))
    for text in broad(given, model.tensors):
        session.sink(info(text))


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
    """A warning per option of a collection that changes nothing: more chunks than there are, snapshots that never come."""
    options = request.options
    available = plan.n_tokens // options.n_ctx - request.first_chunk
    told: list[str] = []
    if request.chunks is not None and request.chunks > available:
        rest = f" after the first {request.first_chunk}" if request.first_chunk else ""
        told.append(
            f"The calibration text has only {available} chunks of {options.n_ctx} tokens{rest}; "
            f"{request.chunks} were asked for."
        )
    if request.save_frequency and not plan.snapshots:
        told.append(f"--save-frequency {request.save_frequency} leaves no snapshot: {plan.n_chunks} chunks are computed.")
    if request.min_expert_tokens and not model.n_experts:
        told.append(f"--min-expert-tokens {request.min_expert_tokens} has no effect: this model has no experts.")
    if options.process_output and all(tensor.name != OUTPUT for tensor in model.tensors):
        told.append(f"--process-output has no effect: this model has no {OUTPUT}.")
    return told


def warn_of_making(request: LevelsRequest, session: Session) -> None:
    """Warn of options about how levels are made that the engine has no use for."""
    if session.engine.one_pass is not None:
        if request.jobs is not None and session.beside is None:
            session.sink(warning(f"--jobs {request.jobs} has no effect: all levels are made in one pass over the model."))
        return
    given = ["--one-by-one"] if request.one_by_one else []
    given += ["--kernels ggml"] if request.kernels == "ggml" else []
    if given:
        session.sink(warning(no_effect(given, "llama.cpp's own program makes each level by itself (--engine binaries).")))


def _entries(options: QuantizeOptions) -> list[tuple[str, str]]:
    """(option, ``REGEX=TYPE``) in the order in which llama-quantize tries them; it lower-cases the patterns."""
    found = [("--tensor-type", entry) for entry in options.tensor_types]
    if (path := options.tensor_type_file) is not None:
        try:
            words = path.read_text(encoding="utf-8", errors="replace").split()
        except OSError as error:
            raise from_os_error(error, "reading the tensor types", path) from error
        found += [("--tensor-type-file:", word) for word in words]
    return [(option, _lowered(entry)) for option, entry in found]


def _lowered(entry: str) -> str:
    pattern, equals, kind = entry.partition("=")
    return f"{pattern.lower()}{equals}{kind}"


def _output_names(model: Model, steps: Sequence[LevelStep]) -> list[str]:
    """The names of the tensors of a level: those of the model, renumbered where layers are left out."""
    resolved = next((step.resolved for step in steps if step.resolved is not None and step.resolved.recipe.tensors), None)
    return [tensor.name for tensor in (resolved.recipe.tensors if resolved is not None else model.tensors)]


def _types(
    planner: LevelPlanner,
    steps: Sequence[LevelStep],
    given: Sequence[Override],
    matrix: MatrixFile | None,
    expected: ExpectedMatrix | None,
) -> dict[Level, tuple[Mapping[str, str], Mapping[str, str]]]:
    """The types of all tensors with and without ``--tensor-type``, for every level whose recipe was resolved."""
    known = {step.level: step.resolved.recipe for step in steps if step.resolved is not None and step.resolved.recipe.tensors}
    if not any(each.claimed for each in given):
        return {}
    plain = planner.dry_runs_without_types(list(known), matrix, expected)
    return {
        level: ({tensor.name: tensor.type for tensor in known[level].tensors}, _upper(answer))
        for level, answer in plain.items()
    }


def _upper(answer: DryRun) -> dict[str, str]:
    return {name: kind.upper() for name, kind in answer.types.items()}
