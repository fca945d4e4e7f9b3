"""What a folder that was given as a model really holds: the one table of (what is seen -> what, why, what to do).

:func:`diagnose` is pure, and works on a hub's listing as well. The first row that matches wins, so the specific stand before
the general. A folder that the converter can take matches none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models.bounded import printable
from imatrix_runner.models.folder_survey import BLOB, Folder, survey
from imatrix_runner.models.gguf_names import first_shards, full_precision, is_gguf_model, is_quantised_name
from imatrix_runner.models.quantised import unusable
from imatrix_runner.models.safetensors_file import check_safetensors

_UNFINISHED = re.compile(
    r"(?P<name>.+\.(?:safetensors|gguf|bin|pth))\.(?:part|crdownload|download|incomplete|tmp|!qb)", re.IGNORECASE
)
_PIECE = re.compile(r".+\.gguf(?:[.-](?:part\d+of\d+|split-?[a-z]+|part-?[a-z0-9]+|[a-z]{2}|\d{3}))", re.IGNORECASE)
CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)")
"""A repository's folder in a hub's cache."""
_VOCABULARY = re.compile(
    r"tokenizer(?!_config\.json$).*|.*\.tiktoken|.*\.model(?:\.v\d+)?|tekken\.json|vocab.*|.*vocab.*\.txt|merges\.txt|.*sentencepiece.*",
    re.IGNORECASE,
)
_BRINGS_VOCABULARY = ("Mamba", "OpenELM", "Lfm2Audio", "WavTokenizer")
"""Architectures whose vocabulary the converter supplies (conversion/*.py, ``_set_vocab_builtin``, ``_set_vocab_none``)."""

Fields = Mapping[str, str]


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

    seen: Callable[[Folder], Fields | None]
    what: str
    why: str
    todo: str
    where: Literal["anywhere", "without weights"] = "without weights"


def _file(*patterns: str) -> Callable[[Folder], Fields | None]:
    """Sees the first file, at any depth, whose own name matches one of the patterns."""

    def seen(folder: Folder) -> Fields | None:
        found = (name for name in folder.files if any(fnmatch(PurePosixPath(name).name.lower(), each) for each in patterns))
        name = next(found, None)
        return {"seen": name, "original": folder.original("Give the model it was made from.")} if name is not None else None

    return seen


def _pointer(folder: Folder) -> Fields | None:
    return {"count": str(len(folder.pointers)), "seen": folder.pointers[0]} if folder.pointers else None


def _unfinished(folder: Folder) -> Fields | None:
    for name in folder.top:
        match = _UNFINISHED.fullmatch(name)
        # aria2 gives the file its full size at once: the content is missing, and nothing else shows it.
        whole = name[: -len(".aria2")] if name.endswith(".aria2") else ""
        if whole in folder.top or (match is not None and match["name"] not in folder.top):
            return {"seen": name}
    return None


def _pipeline(folder: Folder) -> Fields | None:
    return {"seen": "model_index.json"} if "model_index.json" in folder.top else None


def _adapter(folder: Folder) -> Fields | None:
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    name = next((name for name in names if name in folder.top), None)
    if name is None:
        return None
    told = folder.base or folder.adapter.get("base_model_name_or_path")
    return {"seen": name, "base": f" ({told})" if isinstance(told, str) and told else ""}


def _quantised(folder: Folder) -> Fields | None:
    if folder.local and folder.has_weights and not folder.dtypes:
        return None  # its headers tell, and are still to be read
    found = unusable(folder.config, folder.dtypes)
    if found is None:
        return None
    original = folder.original("Give the model it was made from, as it was published in BF16, F16 or F32.")
    return {"method": found.method, "why": found.why, "original": found.todo or original}


def _ollama(folder: Folder) -> Fields | None:
    if not any(map(BLOB.fullmatch, folder.files)):
        return None
    if not folder.blobs:
        return {"todo": "Name the GGUF itself; `ollama show --modelfile NAME` prints its path behind FROM."}
    return {"todo": f"Name the file that holds the weights: imatrix-runner run {folder.within(folder.blobs[0])}"}


def _cached(folder: Folder) -> Fields | None:
    here = CACHED.fullmatch(Path(folder.name).name)
    inside = next((match for name in folder.files if (match := CACHED.match(name))), None)
    match = here or inside
    return {"repo": f"{match['org']}/{match['name']}"} if match is not None else None


def _one_precise(folder: Folder) -> Fields | None:
    names = _precise(folder)
    return {"seen": names[0], "file": folder.within(names[0])} if len(names) == 1 else None


def _several_precise(folder: Folder) -> Fields | None:
    names = _precise(folder)
    return {"seen": _some(names), "file": folder.within(names[0])} if names else None


def _precise(folder: Folder) -> list[str]:
    """The GGUFs that are not quantised by their names, those whose names say their precision first."""
    plain = first_shards(name for name in folder.files if is_gguf_model(name) and not is_quantised_name(name))
    return full_precision(folder.files) or plain


def _quants(folder: Folder) -> Fields | None:
    names = first_shards(name for name in folder.files if is_gguf_model(name))
    if not names:
        return None
    best = next((name for name in names if "q8_0" in name.lower()), names[0])
    last = f"If these are all there is: imatrix-runner run {folder.within(best)} --allow-requantize"
    return {"seen": _some(names), "todo": folder.original(f"Give its BF16, F16 or F32 GGUF or the original model. {last}")}


def _checkpoints_inside(folder: Folder) -> Fields | None:
    if "config.json" in folder.top:
        return None
    names = sorted({str(PurePosixPath(name).parent) for name in folder.files if name.endswith("/config.json")})
    if not names:
        return None
    run = f"Name the one you mean: imatrix-runner run {folder.within(names[0])}"
    return {"seen": _some(names), "todo": run if folder.local else "Download the one you mean, and give that directory."}


def _misnamed(folder: Folder) -> Fields | None:
    name = next((name for name in folder.top if name.endswith(".safetensors")), None)
    return {"seen": name} if name is not None and "config.json" in folder.top else None


def _vocabulary_only(folder: Folder) -> Fields | None:
    name = next((name for name in folder.top if _VOCABULARY.fullmatch(name)), None)
    return {"seen": name} if name is not None and "config.json" not in folder.top else None


def _configuration_only(folder: Folder) -> Fields | None:
    return {} if "config.json" in folder.top else None


def _no_configuration(folder: Folder) -> Fields | None:
    return None if "config.json" in folder.top or not folder.has_weights else {}


def _empty(folder: Folder) -> Fields | None:
    return None if folder.files else {}


def _no_architecture(folder: Folder) -> Fields | None:
    nested = folder.config.get("text_config")
    named = folder.config.get("architectures") or (isinstance(nested, Mapping) and nested.get("architectures"))
    return None if named or "ssm_cfg" in folder.config or "config.json" not in folder.top else {}


def _no_vocabulary(folder: Folder) -> Fields | None:
    named = folder.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    there = any(map(_VOCABULARY.fullmatch, folder.top))
    return None if there or first.startswith(_BRINGS_VOCABULARY) or "ssm_cfg" in folder.config else {}


def _no_merges(folder: Folder) -> Fields | None:
    others = [name for name in folder.top if _VOCABULARY.fullmatch(name) and name != "vocab.json"]
    return None if "vocab.json" not in folder.top or others else {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


_COMPLETE = "Download the whole repository again, or give its hub id (org/name) and let imatrix-runner fetch it."
_OTHER_PROGRAM = "that program's own format, which nothing turns back into what llama.cpp reads"

KINDS: tuple[Kind, ...] = (
    Kind(
        _pointer,
        "{path} holds Git LFS pointers in place of files",
        "{seen} only names its content, which was not fetched (pointers: {count})",
        "Fetch it with: git lfs pull (in that folder)",
        "anywhere",
    ),
    Kind(
        _unfinished,
        "{path} is an unfinished download",
        "{seen} lies there, which a download leaves until it is complete",
        "Let the download finish, or delete the rest of it and download again.",
        "anywhere",
    ),
    Kind(
        _pipeline,
        "{path} is an image, video or audio pipeline (diffusers), not a language model",
        "{seen} lists its components",
        "Give a language model; its text encoder alone, if that is one, lies in a subfolder such as text_encoder.",
        "anywhere",
    ),
    Kind(
        _adapter,
        "{path} is an adapter (LoRA), not a model",
        "{seen} only changes the weights of another model{base}",
        "Merge it into its base model (PEFT: merge_and_unload, then save_pretrained with the tokenizer) and give the result.",
    ),
    Kind(
        _quantised,
        "{path} is quantised with {method}",
        "{why}",
        "{original}",
        "anywhere",
    ),
    Kind(
        _ollama,
        "{path} is a folder of Ollama's",
        "it keeps models as blobs named by their checksum, without config.json",
        "{todo}",
    ),
    Kind(
        _cached,
        "{path} is a folder of the hub's cache",
        "the model's files lie in snapshots/COMMIT below it",
        "Give the hub id, which is found in the cache: imatrix-runner run {repo} --offline",
    ),
    Kind(
        _one_precise,
        "{path} is not a Hugging Face model directory",
        "it has no config.json with model*.safetensors, but a GGUF: {seen}",
        "Name the file itself: imatrix-runner run {file}",
    ),
    Kind(
        _several_precise,
        "{path} holds several models",
        "it has no config.json with model*.safetensors, but GGUF files: {seen}",
        "Name one of them, for example: imatrix-runner run {file}",
    ),
    Kind(
        _quants,
        "{path} holds no model in full precision",
        "it has no config.json with model*.safetensors, and its GGUF files are quantised: {seen}",
        "{todo}",
    ),
    Kind(
        _file("*.gguf"),
        "{path} holds no language model",
        "its GGUF files are projectors, importance matrices, adapters or vocabularies, such as {seen}",
        "Name the language model's own GGUF, or its directory or hub id (org/name).",
    ),
    Kind(
        lambda folder: next(({"seen": name} for name in folder.files if _PIECE.fullmatch(name)), None),
        "{path} holds a GGUF in pieces",
        "{seen} is a part of a file that was cut to upload it",
        "Join the parts in order, for example: cat model.gguf.part* > model.gguf, and name the result.",
    ),
    Kind(
        _file("consolidated*.safetensors"),
        "{path} holds Mistral's own format only",
        "{seen} names its tensors otherwise than model*.safetensors do, which the converter reads",
        "Download model*.safetensors, config.json and the tokenizer of the same repository; if it has none, run llama.cpp's "
        "convert_hf_to_gguf.py --mistral-format on the folder and give the GGUF.",
    ),
    Kind(
        _file("consolidated.*.pth"),
        "{path} holds Meta's original format only",
        "{seen} is a PyTorch pickle with its own tensor names; the converter reads model*.safetensors",
        "Give the same model in Hugging Face format: its directory, or its hub id (org/name).",
    ),
    Kind(
        _file("*.onnx", "*.onnx_data"),
        "{path} is an ONNX export",
        "{seen} holds a computed graph, not the weights that llama.cpp's converter reads",
        "{original}",
    ),
    Kind(
        _file("weights.*.npz", "weights.npz", "*.npz"),
        "{path} holds weights in NumPy's format",
        "{seen} comes from an early MLX or JAX export; the converter reads model*.safetensors",
        "{original}",
    ),
    Kind(
        _file("*.engine", "rank*.safetensors", "*.plan"),
        "{path} is a TensorRT-LLM engine or checkpoint",
        "{seen} is " + _OTHER_PROGRAM,
        "{original}",
    ),
    Kind(
        _file("openvino_model*.xml", "openvino*.bin"),
        "{path} is an OpenVINO export",
        "{seen} is " + _OTHER_PROGRAM,
        "{original}",
    ),
    Kind(
        _file("*.mlmodel", "coremldata.bin", "weight.bin", "*.task", "*.litertlm", "*.tflite", "*.nemo"),
        "{path} is an export for another program",
        "{seen} is " + _OTHER_PROGRAM,
        "{original}",
    ),
    Kind(
        _file("tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "saved_model.pb", "*.ckpt.index"),
        "{path} holds weights of TensorFlow or JAX only",
        "{seen} is not read by llama.cpp's converter, which takes model*.safetensors",
        "Get the model's safetensors, or load it with transformers (from_tf or from_flax) and save it again.",
    ),
    Kind(
        _file("*.distcp", "mp_rank_*", "zero_pp_rank_*", "*_model_states.pt", "*_optim_states.pt"),
        "{path} is a training checkpoint in shards",
        "{seen} is a part of the trainer's own state, not a model's weights",
        "Save the model with save_pretrained (DeepSpeed: zero_to_fp32.py first), then give that directory.",
    ),
    Kind(
        _checkpoints_inside,
        "{path} is not a model directory, but holds some",
        "there is no config.json in it, only in {seen}",
        "{todo}",
    ),
    Kind(
        _file("pytorch_model*.bin", "*.pt", "*.pth", "*.bin"),
        "{path} holds PyTorch pickles only",
        "reading a pickle such as {seen} can execute code hidden in it",
        "Get the model's safetensors, or convert the pickles yourself if you trust them.",
    ),
    Kind(
        _misnamed,
        "{path} holds no weights under the name the converter reads",
        "{seen} is there, and the converter reads model.safetensors or model-0000N-of-0000N.safetensors",
        "If it holds this model's weights, rename it to model.safetensors.",
    ),
    Kind(
        _file("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z", "*.rar", "*.tar.zst"),
        "{path} holds an archive",
        "{seen} is still packed",
        "Unpack it, then give the folder with config.json or the GGUF file.",
    ),
    Kind(
        _configuration_only,
        "{path} holds no weights",
        "there is no model*.safetensors next to its config.json",
        "Download the weight files too.",
    ),
    Kind(
        _vocabulary_only,
        "{path} holds a tokenizer only",
        "{seen} is there, but neither config.json nor weights",
        _COMPLETE,
    ),
    Kind(
        _empty,
        "{path} is empty",
        "there is not a single file in it",
        "Name a .gguf file, a Hugging Face directory, or a hub id: org/name.",
    ),
    Kind(
        _no_configuration,
        "{path} is not a Hugging Face model directory",
        "it has weights and no config.json, without which the converter cannot tell which model they are",
        "Download config.json and the tokenizer's files from the same repository into it.",
        "anywhere",
    ),
    Kind(
        _no_architecture,
        "{path} does not say which model it is",
        "its config.json names no architectures, by which the converter chooses",
        _COMPLETE,
        "anywhere",
    ),
    Kind(
        lambda folder: _no_merges(folder) if folder.has_weights else None,
        "{path} has half a tokenizer",
        "there is vocab.json, but neither merges.txt nor tokenizer.json",
        "Download the tokenizer's files from the same repository (or its base model's) into it.",
        "anywhere",
    ),
    Kind(
        lambda folder: _no_vocabulary(folder) if folder.has_weights else None,
        "{path} has no tokenizer",
        "there is no tokenizer.json, tokenizer.model, vocab.json or the like in it",
        "Download the tokenizer's files from the same repository (or its base model's) into it.",
        "anywhere",
    ),
)
