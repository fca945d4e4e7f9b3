"""Table of folders that were given as a model but cannot be converted: how each is detected, what it is, and what to do.

:func:`diagnose` is pure, and works on a hub's listing as well. The first matching row is used, so specific rows precede general
ones. A folder that the converter can take matches none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models import folder_signs as signs
from imatrix_runner.models.folder_survey import Folder, survey
from imatrix_runner.models.safetensors_file import check_safetensors
from imatrix_runner.safe_text import printable


def check_folder(path: Path) -> None:
    """Raise :class:`InvalidDataError` if the converter cannot take a checkpoint's folder; called before the conversion."""
    try:
        folder = survey(path)
    except OSError as error:
        raise from_os_error(error, "looking at the model's folder", path) from error
    if (wrong := diagnose(folder)) is not None:
        raise wrong
    dtypes = {tensor.name: tensor.dtype for tensor in check_safetensors(path).tensors}
    if (wrong := diagnose(replace(folder, dtypes=dtypes))) is not None:
        raise wrong


def diagnose(folder: Folder) -> InvalidDataError | None:
    """The error for a folder that cannot be converted; None if nothing is wrong with it."""
    for kind in KINDS:
        if kind.where == "without weights" and folder.has_weights:
            continue
        if (fields := kind.seen(folder)) is not None:
            shown = {name: printable(value) for name, value in {"path": folder.name, **fields}.items()}
            return InvalidDataError(*(text.format(**shown) for text in (kind.what, kind.why, kind.todo)))
    return None


@dataclass(frozen=True)
class Kind:
    """A row: ``seen`` detects the kind and returns fields for the three texts (``{path}`` is always available)."""

    seen: Callable[[Folder], signs.Fields | None]
    what: str
    why: str
    todo: str
    where: Literal["anywhere", "without weights"] = "without weights"


_COMPLETE = "Download the whole repository again, or give its hub id (org/name) and let imatrix-runner fetch it."
_OTHER_PROGRAM = "in that program's own format, which cannot be converted back to one that llama.cpp reads"

KINDS: tuple[Kind, ...] = (
    Kind(
        signs.pointer,
        "{path} has Git LFS pointers instead of files",
        "{seen} only refers to its content, which was not fetched (pointers: {count})",
        "Fetch it with: git lfs pull (in that folder)",
        "anywhere",
    ),
    Kind(
        signs.unfinished,
        "{path} is an unfinished download",
        "{seen} is there, which a download removes when it is complete",
        "Let the download finish, or delete that file and download again.",
        "anywhere",
    ),
    Kind(
        signs.pipeline,
        "{path} is an image, video or audio pipeline (diffusers), not a language model",
        "{seen} lists its components",
        "Give a language model; if its text encoder is one, that is in a subfolder such as text_encoder.",
        "anywhere",
    ),
    Kind(
        signs.adapter,
        "{path} is an adapter (LoRA), not a model",
        "{seen} only changes the weights of another model{base}",
        "Merge it into its base model (PEFT: merge_and_unload, then save_pretrained with the tokenizer) and give the result.",
    ),
    Kind(
        signs.quantised,
        "{path} is quantised with {method}",
        "{why}",
        "{original}",
        "anywhere",
    ),
    Kind(
        signs.ollama,
        "{path} is a folder of Ollama",
        "Ollama stores models as blobs named by their checksum, without config.json",
        "{todo}",
    ),
    Kind(
        signs.cached,
        "{path} is a folder of the hub's cache",
        "the model's files are in snapshots/COMMIT below it",
        "Give the hub id, which is found in the cache: imatrix-runner run {repo} --offline",
    ),
    Kind(
        signs.one_precise,
        "{path} is not a Hugging Face model directory",
        "it has no config.json with model*.safetensors, but a GGUF: {seen}",
        "Give the file itself: imatrix-runner run {file}",
    ),
    Kind(
        signs.several_precise,
        "{path} has several models",
        "it has no config.json with model*.safetensors, but GGUF files: {seen}",
        "Give one of them, for example: imatrix-runner run {file}",
    ),
    Kind(
        signs.quants,
        "{path} has no model in full precision",
        "it has no config.json with model*.safetensors, and its GGUF files are quantised: {seen}",
        "{todo}",
    ),
    Kind(
        signs.file("*.gguf"),
        "{path} has no language model",
        "its GGUF files are projectors, imatrix files, adapters or vocabularies, such as {seen}",
        "Give the language model's own GGUF, or its directory or hub id (org/name).",
    ),
    Kind(
        signs.shard,
        "{path} has a GGUF in parts",
        "{seen} is a part of a file that was split for uploading",
        "Join the parts in order, for example: cat model.gguf.part* > model.gguf, and give the result.",
    ),
    Kind(
        signs.file("consolidated*.safetensors"),
        "{path} has only Mistral's own format",
        "{seen} has other tensor names than model*.safetensors, which the converter reads",
        "Download model*.safetensors, config.json and the tokenizer of the same repository; if it has none, run llama.cpp's "
        "convert_hf_to_gguf.py --mistral-format on the folder and give the GGUF.",
    ),
    Kind(
        signs.file("consolidated.*.pth"),
        "{path} has only Meta's original format",
        "{seen} is a PyTorch pickle with its own tensor names; the converter reads model*.safetensors",
        "Give the same model in Hugging Face format: its directory, or its hub id (org/name).",
    ),
    Kind(
        signs.file("*.onnx", "*.onnx_data"),
        "{path} is an ONNX export",
        "{seen} contains a graph, not the weights that llama.cpp's converter reads",
        "{original}",
    ),
    Kind(
        signs.file("weights.*.npz", "weights.npz", "*.npz"),
        "{path} has weights in NumPy's format",
        "{seen} comes from an early MLX or JAX export; the converter reads model*.safetensors",
        "{original}",
    ),
    Kind(
        signs.file("*.engine", "rank*.safetensors", "*.plan"),
        "{path} is a TensorRT-LLM engine or checkpoint",
        "{seen} is " + _OTHER_PROGRAM,
        "{original}",
    ),
    Kind(
        signs.file("openvino_model*.xml", "openvino*.bin"),
        "{path} is an OpenVINO export",
        "{seen} is " + _OTHER_PROGRAM,
        "{original}",
    ),
    Kind(
        signs.file("*.mlmodel", "coremldata.bin", "weight.bin", "*.task", "*.litertlm", "*.tflite", "*.nemo"),
        "{path} is an export for another program",
        "{seen} is " + _OTHER_PROGRAM,
        "{original}",
    ),
    Kind(
        signs.file("tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "saved_model.pb", "*.ckpt.index"),
        "{path} has only weights of TensorFlow or JAX",
        "llama.cpp's converter does not read {seen}; it takes model*.safetensors",
        "Get the model's safetensors, or load it with transformers (from_tf or from_flax) and save it again.",
    ),
    Kind(
        signs.file("*.distcp", "mp_rank_*", "zero_pp_rank_*", "*_model_states.pt", "*_optim_states.pt"),
        "{path} is a training checkpoint in shards",
        "{seen} is part of the trainer's state, not of a model's weights",
        "Save the model with save_pretrained (DeepSpeed: zero_to_fp32.py first), then give that directory.",
    ),
    Kind(
        signs.checkpoints_inside,
        "{path} is not a model directory, but contains some",
        "it has no config.json itself, only in {seen}",
        "{todo}",
    ),
    Kind(
        signs.file("pytorch_model*.bin", "*.pt", "*.pth", "*.bin"),
        "{path} has only PyTorch pickles",
        "reading a pickle such as {seen} can execute code hidden in it",
        "Get the model's safetensors, or convert the pickles yourself if you trust them.",
    ),
    Kind(
        signs.misnamed,
        "{path} has no weights under a name that the converter reads",
        "it has {seen}, and the converter reads model.safetensors or model-0000N-of-0000N.safetensors",
        "If that file has this model's weights, rename it to model.safetensors.",
    ),
    Kind(
        signs.file("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z", "*.rar", "*.tar.zst"),
        "{path} contains an archive",
        "{seen} is still packed",
        "Unpack it, then give the folder with config.json or the GGUF file.",
    ),
    Kind(
        signs.configuration_only,
        "{path} has no weights",
        "it has no model*.safetensors next to its config.json",
        "Download the weight files too.",
    ),
    Kind(
        signs.vocabulary_only,
        "{path} has only a tokenizer",
        "it has {seen}, but neither config.json nor weights",
        _COMPLETE,
    ),
    Kind(
        signs.empty,
        "{path} is empty",
        "it contains no files",
        "Give a .gguf file, a Hugging Face directory, or a hub id: org/name.",
    ),
    Kind(
        signs.no_configuration,
        "{path} is not a Hugging Face model directory",
        "it has weights but no config.json, from which the converter learns the architecture",
        "Download config.json and the tokenizer's files from the same repository into it.",
        "anywhere",
    ),
    Kind(
        signs.no_architecture,
        "{path} does not state its architecture",
        "its config.json names no architectures, which the converter needs",
        _COMPLETE,
        "anywhere",
    ),
    Kind(
        signs.no_language_model,
        "{path} is not a language model",
        "its config.json names {seen}, which does not generate text",
        "Give a model that generates text; for a multimodal one, its language model.",
        "anywhere",
    ),
    Kind(
        signs.no_merges,
        "{path} has half a tokenizer",
        "it has vocab.json, but neither merges.txt nor tokenizer.json",
        "Download the tokenizer's files from the same repository (or its base model's) into it.",
        "anywhere",
    ),
    Kind(
        signs.no_vocabulary,
        "{path} has no tokenizer",
        "it has no tokenizer.json, tokenizer.model, vocab.json or similar file",
        "Download the tokenizer's files from the same repository (or its base model's) into it.",
        "anywhere",
    ),
)
