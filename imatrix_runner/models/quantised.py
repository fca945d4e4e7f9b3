"""Quantised Hugging Face checkpoints: how their configuration declares it, and which of them the converter cannot unpack.

Source: ``dequant_model`` in llama.cpp's conversion/base.py. It unpacks ``bitnet``, ``fp8``, ``gptq``, ``mxfp4``, ``modelopt``
and most of ``compressed-tensors``; :func:`unusable` returns None for those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_UNSUPPORTED = {
    "bitsandbytes": "bitsandbytes",
    "bnb": "bitsandbytes",
    "awq": "AWQ",
    "exl2": "EXL2 (ExLlamaV2)",
    "exl3": "EXL3 (ExLlamaV3)",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "higgs": "HIGGS",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "fp_quant": "FP-Quant",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "quark": "Quark",
}
"""``quant_method`` -> its common name. Other methods are left to the converter, which may be newer than this list."""

_FULL_PRECISION = frozenset(("F64", "F32", "F16", "BF16"))
_GPTQ_BITS = (2, 4, 8)
_PACKED = (
    (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    (".weight.quant_state.bitsandbytes__fp4", "bitsandbytes"),
    (".weight.SCB", "bitsandbytes"),
    (".q_scale_max", "EXL2 (ExLlamaV2)"),
    (".trellis", "EXL3 (ExLlamaV3)"),
)
"""Endings of tensor names that only one method writes, for checkpoints whose configuration does not declare it."""


@dataclass(frozen=True)
class UnusableQuantisation:
    """``method``: its name for people; ``why`` it cannot be used; ``todo``: empty if only another model helps."""

    method: str
    why: str
    todo: str = ""


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``quantization_config`` of a config.json, or of its ``text_config``; empty for a checkpoint that is not quantised."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, Mapping) else {}):
        found = place.get("quantization_config")
        if isinstance(found, Mapping) and found:
            return found
    return {}


def unusable(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> UnusableQuantisation | None:
    """Why the converter cannot unpack a checkpoint; None if it can. ``dtypes``: tensor name -> dtype, empty if unknown."""
    announced = quantisation_config(config)
    method = str(announced.get("quant_method") or "").lower()
    if announced.get("load_in_4bit") is True or announced.get("load_in_8bit") is True:
        method = method or "bitsandbytes"
    if method in _UNSUPPORTED and dtypes and _FULL_PRECISION.issuperset(dtypes.values()):
        return UnusableQuantisation(
            _UNSUPPORTED[method],
            "its config.json declares that, which the converter refuses, although its weights are in full precision",
            "Remove quantization_config from config.json: it is left over from before the weights were converted.",
        )
    if method in _UNSUPPORTED:
        return UnusableQuantisation(
            _UNSUPPORTED[method], f"llama.cpp's converter cannot unpack {_bits(announced)}weights of this method"
        )
    if method == "gptq":
        return _gptq(announced, dtypes)
    if method == "fp8":
        return _fp8(dtypes)
    if method == "compressed-tensors":
        return _compressed(announced)
    return _mlx(config, dtypes) or (_by_tensors(dtypes) if not method else None)


def _bits(announced: Mapping[str, Any]) -> str:
    bits = announced.get("bits") or announced.get("w_bit")
    if announced.get("load_in_4bit") is True:
        bits = 4
    elif announced.get("load_in_8bit") is True:
        bits = 8
    return f"the {bits}-bit " if isinstance(bits, (int, float)) else "the "


def _gptq(announced: Mapping[str, Any], dtypes: Mapping[str, str]) -> UnusableQuantisation | None:
    bits = announced.get("bits")
    if bits not in _GPTQ_BITS:
        return UnusableQuantisation("GPTQ", f"llama.cpp's converter unpacks GPTQ of 2, 4 and 8 bits, not of {bits}")
    groups = {name.removesuffix(".g_idx") for name in dtypes if name.endswith(".g_idx")}
    bare = [name for name in dtypes if name.endswith(".qweight") and name.removesuffix(".qweight") not in groups]
    if bare:
        return UnusableQuantisation("GPTQ", f"llama.cpp's converter needs a g_idx for every weight, and {bare[0]} has none")
    return None


def _fp8(dtypes: Mapping[str, str]) -> UnusableQuantisation | None:
    packed = [name for name, dtype in dtypes.items() if dtype.startswith("F8_") and not _is_scale(name)]
    if not packed or any(name.endswith(("_scale_inv", ".qscale_weight")) for name in dtypes):
        return None
    other = next((name for name in dtypes if _is_scale(name)), None)
    if other is not None:
        return UnusableQuantisation(
            "FP8", f"llama.cpp's converter reads scales named weight_scale_inv, and this one stores {other}"
        )
    return UnusableQuantisation(
        "FP8", f"the scales are missing: {packed[0]} is stored in 8 bits and there is no weight_scale_inv for it"
    )


def _is_scale(name: str) -> bool:
    return "scale" in name.rpartition(".")[2]


def _compressed(announced: Mapping[str, Any]) -> UnusableQuantisation | None:
    kind = str(announced.get("format") or "")
    groups = announced.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    nvfp4 = kind == "nvfp4-pack-quantized" or (
        kind == "mixed-precision" and found and all(group.get("format") == "nvfp4-pack-quantized" for group in found)
    )
    if nvfp4:
        return None
    method = f"compressed-tensors ({kind or 'no format named'})"
    if len(found) != 1:
        return UnusableQuantisation(
            method, f"llama.cpp's converter handles one group of weights, and this one has {len(found)}"
        )
    weights = found[0].get("weights")
    strategy = weights.get("strategy") if isinstance(weights, Mapping) else None
    wanted = {
        "float-quantized": ("channel", "block"),
        "int-quantized": ("channel", "block"),
        "naive-quantized": ("channel", "block"),
        "pack-quantized": ("group",),
    }.get(kind)
    if wanted is None:
        return UnusableQuantisation(method, "llama.cpp's converter does not know this format")
    if strategy not in wanted:
        return UnusableQuantisation(
            method, f"llama.cpp's converter unpacks it with a scale per {' or '.join(wanted)}, not per {strategy}"
        )
    return None


def _mlx(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> UnusableQuantisation | None:
    """The finding for MLX, which writes ``quantization``; newer versions repeat it as ``quantization_config`` without a
    method."""
    announced = config.get("quantization") or quantisation_config(config)
    if not isinstance(announced, Mapping) or not {"group_size", "bits"} <= announced.keys():
        return None
    if "quantization" not in config and not any(name.endswith(".biases") for name in dtypes):
        return None
    return UnusableQuantisation("MLX", f"llama.cpp's converter cannot unpack MLX's {announced['bits']}-bit weights")


def _by_tensors(dtypes: Collection[str]) -> UnusableQuantisation | None:
    """The finding from tensor names, for a configuration without a declaration (AutoGPTQ, AutoAWQ and ExLlamaV2 used separate
    files)."""
    for ending, method in _PACKED:
        if any(name.endswith(ending) for name in dtypes):
            return UnusableQuantisation(method, "llama.cpp's converter cannot unpack weights of this method")
    if any(name.endswith(".qweight") for name in dtypes):
        return UnusableQuantisation(
            "GPTQ or AWQ",
            "config.json has no quantization_config, without which llama.cpp's converter cannot unpack the weights",
        )
    return None
