"""What llama-quantize cannot carry over from a model's file: foretold, because its dry run does not notice.

Source: ``llama_model_quantize_impl`` in src/llama-quant.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from imatrix_runner.engines.base import QuantizeOptions
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, padded
from imatrix_runner.quantize.weights import Failure
from imatrix_runner.untrusted import whole_number

if TYPE_CHECKING:
    from imatrix_runner.quantize.recipe import RecipeTensor

ALIGNMENT = 32
"""GGUF_DEFAULT_ALIGNMENT: llama-quantize pads to it, and copies ``general.alignment`` whatever that says."""

_ALIGNMENT_KEY = "general.alignment"
_NOT_NUMBERS = frozenset(("F64", "I8", "I16", "I32", "I64"))
"""Types that llama-quantize does not turn into another ("cannot dequantize/convert tensor type")."""


def written_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as ggml writes it: without dimensions of 1 at its end."""
    n_dims = len(shape)
    while n_dims > 1 and shape[n_dims - 1] == 1:
        n_dims -= 1
    return tuple(shape[:n_dims])


def conversion_problem(source: TensorInfo) -> Failure | None:
    """Return why a tensor cannot get another type than its own."""
    shape = written_shape(source.shape)
    if len(shape) > 3:
        why = f"{source.name} has {len(shape)} dimensions, and llama-quantize converts at most 3"
    elif source.type_name in _NOT_NUMBERS:
        why = f"{source.name} is {source.type_name}, which llama-quantize converts to no other type"
    else:
        return None
    return Failure(why, f"Keep it as it is: --tensor-type ^{source.name}$={source.type_name.lower()}")


def layout_problems(
    header: GgufHeader,
    sources: Mapping[str, TensorInfo],
    rows: Sequence[RecipeTensor],
    header_bytes: int,
    options: QuantizeOptions,
) -> list[Failure]:
    """Return what would spoil the file as a whole. ``header_bytes``: of the output, before it is padded."""
    found: list[Failure] = []
    alignment = _alignment(header, options)
    sizes = [row.n_bytes for row in rows if row.n_bytes is not None]
    if any(padded(size, alignment) != padded(size, ALIGNMENT) for size in (header_bytes, *sizes)):
        why = f"llama-quantize pads to {ALIGNMENT} bytes and copies {_ALIGNMENT_KEY} = {alignment}, so nothing reads the file"
        found.append(Failure(why, f"Correct it in the output: --override-kv {_ALIGNMENT_KEY}=int:{ALIGNMENT}"))
    empty = next((source.name for source in sources.values() if not source.n_elements), None)
    if empty is not None:
        why = f"{empty} has no elements, and llama-quantize writes such a tensor wrongly"
        found.append(Failure(why, "Convert the original model again without that tensor."))
    return found


def _alignment(header: GgufHeader, options: QuantizeOptions) -> int:
    """The alignment that the output will claim."""
    for override in options.override_kv:
        key, _, typed = override.partition("=")
        kind, _, value = typed.partition(":")
        if key == _ALIGNMENT_KEY and kind == "int" and (number := whole_number(value)):
            return number
    return header.alignment
