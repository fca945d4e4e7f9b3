"""4-bit types in which models are published. A tensor in such a type has no better original, so it is best copied unchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence

from imatrix_runner.models.gguf_file import TensorInfo

NATIVE_TYPES = frozenset(("MXFP4", "NVFP4"))
_BLOCK = re.compile(r"blk\.\d+\.")
_EXPERTS = "_exps"


def native_tensors(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The tensors in one of :data:`NATIVE_TYPES`."""
    return [tensor for tensor in tensors if tensor.type_name in NATIVE_TYPES]


def keep_native(tensors: Sequence[TensorInfo]) -> str:
    """The option with which llama.cpp copies ``tensors``, all of one native type: ``--tensor-type _exps=mxfp4``."""
    kinds = sorted({_BLOCK.sub("", tensor.name).removesuffix(".weight") for tensor in tensors})
    # A tensor's name may be a prefix of another's (ffn_up, ffn_up_exps), so the pattern has whole names.
    pattern = _EXPERTS if all(_EXPERTS in kind for kind in kinds) else rf"'\.({'|'.join(kinds)})\.weight'"
    return f"--tensor-type {pattern}={tensors[0].type_name.lower()}"
