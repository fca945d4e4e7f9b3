"""How a hub and programs understand the names of GGUF files. Facts of other projects, each a pure function of names.

* The hub: ``parseGGUFQuantLabel`` and ``GGUF_QUANT_RE`` of npm's ``@huggingface/tasks`` (0.21.54, ``src/gguf.ts``). A file
  without a label is missing from a model page's panel, and its commands for programs name the label.
* llama.cpp: ``-hf REPOSITORY:TAG`` (``common/download.cpp``: ``get_gguf_split_info``, ``gguf_filename_is_model``,
  ``find_best_model``; commit 0c1e57098).
* Ollama: ``ollama run hf.co/REPOSITORY:TAG`` (``types/model/name.go`` for characters; the hub answers with "not a valid
  quantization scheme" for tags that are no labels, in any case of letters; whole file names are tags, too).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

FILE_TYPES: Final = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1", "Q4_1_SOME_F16", "Q4_2", "Q4_3", "Q8_0", "Q5_0", "Q5_1", "Q2_K"))),
    **dict(enumerate(("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"), 11)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M"), 19)),
    **dict(enumerate(("IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"), 28)),
    **dict(enumerate(("TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0"), 36)),
}
"""``general.file_type`` -> the hub's label for it."""

LARGE: Final = ("Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL")
"""Labels that are no file types, and that publishers use for files with larger embeddings and outputs."""

_ALIASES = ("MXFP4",)
_LABEL = re.compile(rf"(UD-)?({'|'.join((*FILE_TYPES.values(), *LARGE, *_ALIASES))})(?:_([A-Z]+))?")

_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})", re.IGNORECASE | re.DOTALL)
_SLUG = re.compile(r"[-.]([A-Z0-9_]+)\Z", re.IGNORECASE)
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_GGUF = ".gguf"


@dataclass(frozen=True)
class HubLabel:
    """What the hub reads from a name: ``quant``, one of its types; ``size``, a word that follows it (``L``)."""

    text: str
    quant: str
    size: str


def hub_label(name: str) -> HubLabel | None:
    """The label that the hub gives a file with this name or path: the last one in it; None if it understands nothing."""
    every = [*_LABEL.finditer(name.upper())]
    return HubLabel(every[-1][0], every[-1][2], every[-1][3] or "") if every else None


def describes(label: HubLabel, file_type: str) -> bool:
    """Whether a label agrees with the label of the file's ``general.file_type``: it is the same, perhaps with further words, or
    a larger one of its kind (``Q3_K_XL`` for ``Q3_K_L``)."""
    if label.quant in LARGE:
        return file_type.startswith(label.quant.removesuffix("_K_XL"))
    text = label.text.removeprefix("UD-")
    named = max((each for each in FILE_TYPES.values() if text.startswith(each)), key=len, default="")
    return named == file_type or (label.quant in _ALIASES and file_type.startswith(label.quant))


def without_shard(path: str) -> str:
    """A GGUF's path without ``.gguf`` and without ``-00001-of-00002``."""
    stem = path.removesuffix(_GGUF)
    shard = _SHARD.fullmatch(stem)
    return shard[1] if shard else stem


def llama_cpp_slug(path: str) -> str:
    """The tag that llama.cpp lists a downloaded file under; empty if it reads none from the name."""
    slug = _SLUG.search(without_shard(path)) if path.endswith(_GGUF) else None
    return slug[1].upper() if slug else ""


def is_model_for_llama_cpp(path: str) -> bool:
    """Whether llama.cpp takes the file for a model, and not for a projector, an importance matrix or a draft model."""
    name = path.rpartition("/")[2]
    return name.endswith(_GGUF) and not any(word in name for word in _NO_MODELS)


def llama_cpp_finds(path: str, tag: str) -> bool:
    """Whether ``-hf REPOSITORY:TAG`` may take this file. It takes the first such file of the repository."""
    return is_model_for_llama_cpp(path) and re.search(f"{re.escape(tag)}[.-]", path, re.IGNORECASE) is not None


def is_ollama_tag(tag: str) -> bool:
    """Whether Ollama accepts the tag and the hub, when Ollama asks, knows it for a scheme. Case does not matter."""
    label = hub_label(tag)
    return _TAG.fullmatch(tag) is not None and label is not None and label.text == tag.upper()
