"""With which engines, options and models numbers can be rounded otherwise than llama-quantize does."""

from __future__ import annotations

from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.errors import InvalidDataError, ToolchainError, UsageError
from imatrix_runner.quantize.planner import LevelPlanner


def check_rounding(planner: LevelPlanner, rounding: Rounding) -> None:
    """Raise :class:`RunnerError` if the engine, an option or the model does not allow a rounding."""
    if rounding == STOCK:
        return
    what, model = f"{rounding.capitalize()} rounding", planner.frozen.model
    if planner.session.engine.cost_meter is None:
        raise ToolchainError(
            f"{what} needs the embedded engine",
            "llama-quantize rounds in one way only",
            "Install llama-cpp-python and use --engine embedded, or leave out --rounding.",
        )
    if planner.request.kernels == "ggml":
        raise UsageError(
            "--rounding and --kernels ggml exclude each other",
            "only the kernels of imatrix-runner round otherwise",
            "Leave one out.",
        )
    quantised = next((tensor for tensor in model.tensors if tensor.is_quantised), None)
    if quantised is not None:
        raise InvalidDataError(
            f"{what} needs a source that is not quantised",
            f"{quantised.name} of {model.path.name} is {quantised.type_name}",
            "Start from the BF16, F16 or F32 model, or leave out --rounding.",
        )
