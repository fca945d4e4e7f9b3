"""Detects whether a Hugging Face checkpoint is quantised, and in which form.

llama.cpp's converter silently dequantises FP8, GPTQ, compressed-tensors, BitNet and ModelOpt checkpoints
(``ModelBase.dequant_model`` of conversion/base.py), so the GGUF looks like an original. It copies MXFP4 and NVFP4 blocks
unchanged: those are visible in the GGUF, and the plan decides about them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.safetensors_file import SafetensorsWeights, Weight, read_model_json
from imatrix_runner.safe_text import printable

_FULL_PRECISION = frozenset(("F64", "F32", "F16", "BF16"))
_SMALL_FLOAT = re.compile(r"F[4-8](?:_\w+)?")
# Companions of packed weights: GPTQ/AWQ, compressed-tensors, FP8 (DeepSeek's and Mistral's), ModelOpt and BitNet.
_COMPANION = re.compile(r"\.(?:qweight|weight_packed|weight_scale|weight_scale_inv|qscale_weight)$|_scale_inv$")
_COPIED = re.compile(r"mxfp4|nvfp4", re.IGNORECASE)
_LONGEST = 60


@dataclass(frozen=True)
class CheckpointQuantisation:
    """``label``: the form, for people (``fp8``, ``gptq, 4 bits``); ``copied``: the converter copies the blocks unchanged."""

    label: str
    copied: bool


def checkpoint_quantisation(directory: Path, weights: SafetensorsWeights) -> CheckpointQuantisation | None:
    """The quantised form of a checkpoint's weights; None for one in F32, F16 or BF16.

    The safetensors headers decide, because a configuration may be left over from before the weights were dequantised; the
    configuration only names the form. ``weights`` are those of ``directory``. Raises :class:`InvalidDataError` for an
    unreadable configuration.
    """
    named = next(_described(directory), "")
    if not any(_is_packed(tensor, announced=bool(named)) for tensor in weights.tensors):
        return None
    label = named or f"{weights.main_dtype} weights"
    return CheckpointQuantisation(label, bool(_COPIED.search(label)))


def refuse_quantised(directory: Path, quantisation: CheckpointQuantisation) -> InvalidDataError:
    """The error for a checkpoint whose weights would be dequantised and then quantised again."""
    return InvalidDataError(
        f"{directory} is already quantised",
        f"its weights are stored as {quantisation.label}; dequantising and quantising them again adds up the errors of both",
        "Use the original in BF16, F16 or F32; if the model was only published in this form, pass --allow-requantize.",
    )


def _is_packed(tensor: Weight, *, announced: bool) -> bool:
    if _COMPANION.search(tensor.name) or (_SMALL_FLOAT.fullmatch(tensor.dtype) and len(tensor.shape) > 1):
        return True
    # Buffers such as causal masks are integer matrices too, so integers count only if the configuration declares quantisation.
    return announced and len(tensor.shape) > 1 and tensor.dtype not in _FULL_PRECISION and tensor.dtype != "BOOL"


def _described(directory: Path) -> Iterator[str]:
    """Labels of the quantisation in the configuration files, the most specific first."""
    config = _json(directory / "config.json")
    for place in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if label := _label(place.get(key)):
                yield label
    # The file of ModelOpt, and that of Mistral's format.
    if label := _label(_json(directory / "hf_quant_config.json").get("quantization")):
        yield label
    if label := _label(_json(directory / "params.json").get("quantization")):
        yield label


def _label(described: object) -> str:
    if not isinstance(described, Mapping):
        return ""
    words = [described.get(key) for key in ("quant_method", "quant_algo", "format", "qformat_weight")]
    bits = described.get("bits")
    parts = [printable(word)[:_LONGEST] for word in words if isinstance(word, str) and word]
    parts += [f"{bits} bits"] if isinstance(bits, int) else []
    return ", ".join(dict.fromkeys(parts)) or ("an unnamed quantised format" if described else "")


def _json(path: Path) -> dict[str, Any]:
    return read_model_json(path) if path.is_file() else {}
