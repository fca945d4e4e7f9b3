"""Warnings about options of a command that are accepted but have no effect, shown with the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imatrix_runner.context.context import Session
from imatrix_runner.context.requests import LevelsRequest
from imatrix_runner.engines.jobs import DryRun, QuantizeOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.errors import from_os_error
from imatrix_runner.events import info, no_effect, warning
from imatrix_runner.imatrix.expected import ExpectedMatrix
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.imatrix.step import ImatrixStep
from imatrix_runner.models.model import Model
from imatrix_runner.models.tensor_patterns import Override, broad, overrides, unmatched
from imatrix_runner.quantize.ineffective_options import ineffective_options, ineffective_types
from imatrix_runner.quantize.plan import LevelStep
from imatrix_runner.quantize.planner import LevelPlanner


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
    texts = ineffective_options(options, model.header, model.tensors, imatrix=imatrix.present, entries=entries)
    if planner.request.uncovered != "fail" and not imatrix.present:
        texts.append(f"--uncovered {planner.request.uncovered} has no effect: no imatrix is used.")
    given = overrides(_entries(options), _output_names(model, steps))
    texts += unmatched(given, [tensor.name for tensor in model.tensors])
    texts += ineffective_types(given, _types(planner, steps, given, matrix, expected), options)
    for text in texts:
        session.sink(warning(text))
    for text in broad(given, model.tensors):
        session.sink(info(text))


def warn_of_making(request: LevelsRequest, session: Session) -> None:
    """Warn of options about how levels are made that the engine does not use."""
    if session.engine.one_pass is not None:
        if request.jobs is not None and session.additional is None:
            session.sink(warning(f"--jobs {request.jobs} has no effect: all levels are made in one pass over the model."))
        return
    given = ["--one-by-one"] if request.one_by_one else []
    given += ["--kernels ggml"] if request.kernels == "ggml" else []
    if given:
        session.sink(warning(no_effect(given, "llama.cpp's own program makes each level separately (--engine binaries).")))


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
    """Return the names of a level's tensors: those of the model, renumbered where layers are left out."""
    resolved = next((step.resolved for step in steps if step.resolved is not None and step.resolved.recipe.tensors), None)
    return [tensor.name for tensor in (resolved.recipe.tensors if resolved is not None else model.tensors)]


def _types(
    planner: LevelPlanner,
    steps: Sequence[LevelStep],
    given: Sequence[Override],
    matrix: MatrixFile | None,
    expected: ExpectedMatrix | None,
) -> dict[Level, tuple[Mapping[str, str], Mapping[str, str]]]:
    """Return the types of all tensors with and without ``--tensor-type``, for every level whose recipe was resolved."""
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
