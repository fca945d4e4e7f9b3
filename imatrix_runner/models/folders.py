"""What a folder that was given as a model really holds: the one table of (what is seen -> what, why, what to do).

:func:`diagnose` is pure, and works on a hub's listing as well. The first row that matches wins, so the specific stand before
the general. A folder that the converter can take matches none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models import folder_signs as signs
from imatrix_runner.models.bounded import printable
from imatrix_runner.models.folder_survey import Folder, survey
from imatrix_runner.models.safetensors_file import check_safetensors


def check_folder(path: Path) -> None:
    """Raise :class:`InvalidDataError` if the converter could not take a checkpoint's folder, before anything is spent on it."""
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
    """Why the folder is no checkpoint that can be converted, and what to do; None for one where nothing is wrong."""
    for kind in KINDS:
        if kind.where == "without weights" and folder.has_weights:
            continue
        if (fields := kind.seen(folder)) is not None:
            shown = {name: printable(value) for name, value in {"path": folder.name, **fields}.items()}
            return InvalidDataError(*(text.format(**shown) for text in (kind.what, kind.why, kind.todo)))
    return None


@dataclass(frozen=True)
class Kind:
    """A row: ``seen`` returns what gives the kind away, as fields for the three texts (``{path}`` is there always)."""

    seen: Callable[[Folder], signs.Fields | None]
    what: str
    why: str
    todo: str
    where: Literal["anywhere", "without weights"] = "without weights"


_COMPLETE = "Download the whole repository again, or give its hub id (org/name) and let imatrix-runner fetch it."
_OTHER_PROGRAM = "that program's own format, which nothing turns back into what llama.cpp reads"

KINDS: tuple[Kind, ...] = (
    Kind(
        signs.pointer,
        "{path} holds Git LFS pointers in place of files",
        "{seen} only names its content, which was not fetched (pointers: {count})",
        "Fetch it with: git lfs pull (in that folder)",
        "anywhere",
    ),
    Kind(
        signs.unfinished,
        "{path} is an unfinished download",
        "{seen} lies there, which a download leaves until it is complete",
        "Let the download finish, or delete the rest of it and download again.",
        "anywhere",
    ),
    Kind(
        signs.pipeline,
        "{path} is an image, video or audio pipeline (diffusers), not a language model",
        "{seen} lists its components",
        "Give a language model; its text encoder alone, if that is one, lies in a subfolder such as text_encoder.",
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
        "{path} is a folder of Ollama's",
        "it keeps models as blobs named by their checksum, without config.json",
        "{todo}",
    ),
    Kind(
        signs.cached,
        "{path} is a folder of the hub's cache",
        "the model's files lie in snapshots/COMMIT below it",
        "Give the hub id, which is found in the cache: imatrix-runner run {repo} --offline",
    ),
    Kind(
        signs.one_precise,
        "{path} is not a Hugging Face model directory",
        "it has no config.json with model*.safetensors, but a GGUF: {seen}",
        "Name the file itself: imatrix-runner run {file}",
    ),
    Kind(
        signs.several_precise,
        "{path} holds several models",
        "it has no config.json with model*.safetensors, but GGUF files: {seen}",
        "Name one of them, for example: imatrix-runner run {file}",
    ),
    Kind(
        signs.quants,
        "{path} holds no model in full precision",
        "it has no config.json with model*.safetensors, and its GGUF files are quantised: {seen}",
        "{todo}",
    ),
    Kind(
        signs.file("*.gguf"),
        "{path} holds no language model",
        "its GGUF files are projectors, importance matrices, adapters or vocabularies, such as {seen}",
        "Name the language model's own GGUF, or its directory or hub id (org/name).",
    ),
    Kind(
        signs.piece,
        "{path} holds a GGUF in pieces",
        "{seen} is a part of a file that was cut to upload it",
        "Join the parts in order, for example: cat model.gguf.part* > model.gguf, and name the result.",
    ),
    Kind(
        signs.file("consolidated*.safetensors"),
        "{path} holds Mistral's own format only",
        "{seen} names its tensors otherwise than model*.safetensors do, which the converter reads",
        "Download model*.safetensors, config.json and the tokenizer of the same repository; if it has none, run llama.cpp's "
        "convert_hf_to_gguf.py --mistral-format on the folder and give the GGUF.",
    ),
    Kind(
        signs.file("consolidated.*.pth"),
        "{path} holds Meta's original format only",
        "{seen} is a PyTorch pickle with its own tensor names; the converter reads model*.safetensors",
        "Give the same model in Hugging Face format: its directory, or its hub id (org/name).",
    ),
    Kind(
        signs.file("*.onnx", "*.onnx_data"),
        "{path} is an ONNX export",
        "{seen} holds a computed graph, not the weights that llama.cpp's converter reads",
        "{original}",
    ),
    Kind(
        signs.file("weights.*.npz", "weights.npz", "*.npz"),
        "{path} holds weights in NumPy's format",
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
        "{path} holds weights of TensorFlow or JAX only",
        "{seen} is not read by llama.cpp's converter, which takes model*.safetensors",
        "Get the model's safetensors, or load it with transformers (from_tf or from_flax) and save it again.",
    ),
    Kind(
        signs.file("*.distcp", "mp_rank_*", "zero_pp_rank_*", "*_model_states.pt", "*_optim_states.pt"),
        "{path} is a training checkpoint in shards",
        "{seen} is a part of the trainer's own state, not a model's weights",
        "Save the model with save_pretrained (DeepSpeed: zero_to_fp32.py first), then give that directory.",
    ),
    Kind(
        signs.checkpoints_inside,
        "{path} is not a model directory, but holds some",
        "there is no config.json in it, only in {seen}",
        "{todo}",
    ),
    Kind(
        signs.file("pytorch_model*.bin", "*.pt", "*.pth", "*.bin"),
        "{path} holds PyTorch pickles only",
        "reading a pickle such as {seen} can execute code hidden in it",
        "Get the model's safetensors, or convert the pickles yourself if you trust them.",
    ),
    Kind(
        signs.misnamed,
        "{path} holds no weights under the name the converter reads",
        "{seen} is there, and the converter reads model.safetensors or model-0000N-of-0000N.safetensors",
        "If it holds this model's weights, rename it to model.safetensors.",
    ),
    Kind(
        signs.file("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z", "*.rar", "*.tar.zst"),
        "{path} holds an archive",
        "{seen} is still packed",
        "Unpack it, then give the folder with config.json or the GGUF file.",
    ),
    Kind(
        signs.configuration_only,
        "{path} holds no weights",
        "there is no model*.safetensors next to its config.json",
        "Download the weight files too.",
    ),
    Kind(
        signs.vocabulary_only,
        "{path} holds a tokenizer only",
        "{seen} is there, but neither config.json nor weights",
        _COMPLETE,
    ),
    Kind(
        signs.empty,
        "{path} is empty",
        "there is not a single file in it",
        "Name a .gguf file, a Hugging Face directory, or a hub id: org/name.",
    ),
    Kind(
        signs.no_configuration,
        "{path} is not a Hugging Face model directory",
        "it has weights and no config.json, without which the converter cannot tell which model they are",
        "Download config.json and the tokenizer's files from the same repository into it.",
        "anywhere",
    ),
    Kind(
        signs.no_architecture,
        "{path} does not say which model it is",
        "its config.json names no architectures, by which the converter chooses",
        _COMPLETE,
        "anywhere",
    ),
    Kind(
        signs.no_language_model,
        "{path} is not a language model",
        "its config.json names {seen}, which continues no text",
        "Give a model that generates text; of a multimodal one its language model.",
        "anywhere",
    ),
    Kind(
        signs.no_merges,
        "{path} has half a tokenizer",
        "there is vocab.json, but neither merges.txt nor tokenizer.json",
        "Download the tokenizer's files from the same repository (or its base model's) into it.",
        "anywhere",
    ),
    Kind(
        signs.no_vocabulary,
        "{path} has no tokenizer",
        "there is no tokenizer.json, tokenizer.model, vocab.json or the like in it",
        "Download the tokenizer's files from the same repository (or its base model's) into it.",
        "anywhere",
    ),
)
