"""Detectors for kinds of folders. Each returns fields for the texts of :mod:`.model_folders`, or None if it finds nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from imatrix_runner.models.folder_survey import BLOB, Folder
from imatrix_runner.models.gguf_names import first_shards, full_precision, is_gguf_model, is_quantised_name
from imatrix_runner.models.quantised import unusable

_UNFINISHED = re.compile(
    r"(?P<name>.+\.(?:safetensors|gguf|bin|pth))\.(?:part|crdownload|download|incomplete|tmp|!qb)", re.IGNORECASE
)
_SPLIT_PART = re.compile(r".+\.gguf(?:[.-](?:part\d+of\d+|split-?[a-z]+|part-?[a-z0-9]+|[a-z]{2}|\d{3}))", re.IGNORECASE)
CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)")
"""Name of a repository's folder in a hub's cache."""
_VOCABULARY = re.compile(
    r"tokenizer(?!_config\.json$).*|.*\.tiktoken|.*\.model(?:\.v\d+)?|tekken\.json|vocab.*|.*vocab.*\.txt|merges\.txt|.*sentencepiece.*",
    re.IGNORECASE,
)
_OTHER_TASK = re.compile(
    r"For(?:CTC|ImageClassification|ObjectDetection|AudioClassification|SemanticSegmentation|DepthEstimation|TokenClassification"
    r"|QuestionAnswering|SpeechSeq2Seq)$|^(?:Whisper|Wav2Vec2|Hubert|ViT|DeiT|CLIP|Siglip|DPT|Detr|SpeechT5|Vits)[A-Z]\w*$"
)
_BRINGS_VOCABULARY = ("Mamba", "OpenELM", "Lfm2Audio", "WavTokenizer")
"""Architectures for which the converter supplies the vocabulary (conversion/*.py, ``_set_vocab_builtin``,
``_set_vocab_none``)."""

Fields = Mapping[str, str]


def file(*patterns: str) -> Callable[[Folder], Fields | None]:
    """A detector of the first file, at any depth, whose own name matches one of the patterns."""

    def seen(folder: Folder) -> Fields | None:
        found = (name for name in folder.files if any(fnmatch(PurePosixPath(name).name.lower(), each) for each in patterns))
        name = next(found, None)
        return {"seen": name, "original": folder.original("Give the model it was made from.")} if name is not None else None

    return seen


def pointer(folder: Folder) -> Fields | None:
    return {"count": str(len(folder.pointers)), "seen": folder.pointers[0]} if folder.pointers else None


def unfinished(folder: Folder) -> Fields | None:
    for name in folder.top:
        match = _UNFINISHED.fullmatch(name)
        # aria2 creates the file with its full size, so only the .aria2 file shows that content is missing.
        whole = name[: -len(".aria2")] if name.endswith(".aria2") else ""
        if whole in folder.top or (match is not None and match["name"] not in folder.top):
            return {"seen": name}
    return None


def pipeline(folder: Folder) -> Fields | None:
    return {"seen": "model_index.json"} if "model_index.json" in folder.top else None


def adapter(folder: Folder) -> Fields | None:
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    name = next((name for name in names if name in folder.top), None)
    if name is None:
        return None
    base = folder.base or folder.adapter.get("base_model_name_or_path")
    return {"seen": name, "base": f" ({base})" if isinstance(base, str) and base else ""}


def quantised(folder: Folder) -> Fields | None:
    if folder.local and folder.has_weights and not folder.dtypes:
        return None  # the headers decide, and have not been read yet
    found = unusable(folder.config, folder.dtypes)
    if found is None:
        return None
    original = folder.original("Give the model it was made from, as it was published in BF16, F16 or F32.")
    return {"method": found.method, "why": found.why, "original": found.todo or original}


def shard(folder: Folder) -> Fields | None:
    name = next((name for name in folder.files if _SPLIT_PART.fullmatch(name)), None)
    return {"seen": name} if name is not None else None


def ollama(folder: Folder) -> Fields | None:
    if not any(map(BLOB.fullmatch, folder.files)):
        return None
    if not folder.blobs:
        return {"todo": "Give the GGUF itself; `ollama show --modelfile NAME` prints its path after FROM."}
    return {"todo": f"Give the file with the weights: imatrix-runner run {folder.within(folder.blobs[0])}"}


def cached(folder: Folder) -> Fields | None:
    here = CACHED.fullmatch(Path(folder.name).name)
    inside = next((match for name in folder.files if (match := CACHED.match(name))), None)
    match = here or inside
    return {"repo": f"{match['org']}/{match['name']}"} if match is not None else None


def one_precise(folder: Folder) -> Fields | None:
    names = _precise(folder)
    return {"seen": names[0], "file": folder.within(names[0])} if len(names) == 1 else None


def several_precise(folder: Folder) -> Fields | None:
    names = _precise(folder)
    return {"seen": _some(names), "file": folder.within(names[0])} if names else None


def _precise(folder: Folder) -> list[str]:
    """The GGUFs in full precision by their names; if no name states a precision, those whose names state no quantised type."""
    plain = first_shards(name for name in folder.files if is_gguf_model(name) and not is_quantised_name(name))
    return full_precision(folder.files) or plain


def quants(folder: Folder) -> Fields | None:
    names = first_shards(name for name in folder.files if is_gguf_model(name))
    if not names:
        return None
    best = next((name for name in names if "q8_0" in name.lower()), names[0])
    last = f"If no other exists: imatrix-runner run {folder.within(best)} --allow-requantize"
    return {"seen": _some(names), "todo": folder.original(f"Give its BF16, F16 or F32 GGUF or the original model. {last}")}


def checkpoints_inside(folder: Folder) -> Fields | None:
    if "config.json" in folder.top:
        return None
    names = sorted({str(PurePosixPath(name).parent) for name in folder.files if name.endswith("/config.json")})
    if not names:
        return None
    run = f"Give the one you want: imatrix-runner run {folder.within(names[0])}"
    return {"seen": _some(names), "todo": run if folder.local else "Download the one you want, and give that directory."}


def misnamed(folder: Folder) -> Fields | None:
    name = next((name for name in folder.top if name.endswith(".safetensors")), None)
    return {"seen": name} if name is not None and "config.json" in folder.top else None


def vocabulary_only(folder: Folder) -> Fields | None:
    name = next((name for name in folder.top if _VOCABULARY.fullmatch(name)), None)
    return {"seen": name} if name is not None and "config.json" not in folder.top else None


def configuration_only(folder: Folder) -> Fields | None:
    return {} if "config.json" in folder.top else None


def no_configuration(folder: Folder) -> Fields | None:
    return None if "config.json" in folder.top or not folder.has_weights else {}


def empty(folder: Folder) -> Fields | None:
    return None if folder.files else {}


def no_architecture(folder: Folder) -> Fields | None:
    nested = folder.config.get("text_config")
    named = folder.config.get("architectures") or (isinstance(nested, Mapping) and nested.get("architectures"))
    return None if named or "ssm_cfg" in folder.config or "config.json" not in folder.top else {}


def no_language_model(folder: Folder) -> Fields | None:
    named = folder.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return {"seen": first} if _OTHER_TASK.search(first) else None


def no_vocabulary(folder: Folder) -> Fields | None:
    named = folder.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    there = any(map(_VOCABULARY.fullmatch, folder.top)) or not folder.has_weights
    return None if there or first.startswith(_BRINGS_VOCABULARY) or "ssm_cfg" in folder.config else {}


def no_merges(folder: Folder) -> Fields | None:
    others = [name for name in folder.top if _VOCABULARY.fullmatch(name) and name != "vocab.json"]
    return None if "vocab.json" not in folder.top or others or not folder.has_weights else {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
