"""Table of the error messages of llama.cpp's converter: what each means, and what to do.

The rows come from convert_hf_to_gguf.py, conversion/base.py, and the errors that transformers and safetensors raise there;
``{1}`` is the first group of the pattern. The end of a traceback is the most informative, so lines are searched from the last;
for a line the first matching row is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, ToolchainError
from imatrix_runner.extras import CONVERT

_LONGEST = 300


@dataclass(frozen=True)
class ConverterMessage:
    """A row of the table. If ``why`` is empty, the matching line is shown."""

    pattern: re.Pattern[str]
    error: type[RunnerError]
    what: str
    why: str
    todo: str


def _known(pattern: str, error: type[RunnerError], what: str, why: str, todo: str) -> ConverterMessage:
    return ConverterMessage(re.compile(pattern), error, what, why, todo)


_NEWER = "Build a newer llama.cpp with: imatrix-runner tools build --ref TAG"
_CANNOT_UNPACK = "The checkpoint is quantised in a form that cannot be unpacked"
_ORIGINAL = "Give the original model, as published in BF16, F16 or F32"
_TOKENIZER = "The converter cannot read the model's tokenizer"
_ITS_FILES = "Check that tokenizer.json or tokenizer.model is complete (download it again), or build a newer llama.cpp"

KNOWN: tuple[ConverterMessage, ...] = (
    _known(
        r"No space left on device|Disk quota exceeded",
        NoSpaceError,
        "The disk is full while converting",
        "",
        "Free some space, or choose another disk with --work-dir, then run the same command again",
    ),
    _known(
        r"trust_remote_code=True|requires you to execute",
        InvalidDataError,
        "The model contains its own code",
        "Python code that comes with it reads its configuration or tokenizer",
        "Read the code; if you trust it, run the same command with --trust-remote-code",
    ),
    _known(
        r"does not recognize this architecture|model type `?([\w.-]+)`? but Transformers",
        ToolchainError,
        "The installed transformers does not know the model",
        "",
        "Upgrade it with: pip install -U transformers",
    ),
    _known(
        r"ModuleNotFoundError|ImportError",
        ToolchainError,
        "A package for converting models is missing",
        "",
        f"Run: {CONVERT.install}",
    ),
    _known(
        r"Quant method is not yet supported: (.+)",
        InvalidDataError,
        _CANNOT_UNPACK,
        "llama.cpp's converter does not know {1}",
        _ORIGINAL,
    ),
    _known(
        r"Quant format (\S+) for method|multiple config groups for compressed-tensors|3-bit gptq",
        InvalidDataError,
        _CANNOT_UNPACK,
        "",
        _ORIGINAL,
    ),
    _known(
        r"Model (\S+) is not supported|Architecture (\S+) not supported",
        EngineError,
        "This llama.cpp cannot convert the model's architecture",
        "",
        _NEWER,
    ),
    _known(
        r"Failed to detect model architecture",
        InvalidDataError,
        "The model's architecture is unknown",
        "its config.json names no architectures",
        "Download config.json again",
    ),
    _known(
        r"Missing or incomplete model files: (.+)",
        InvalidDataError,
        "Weight files are missing",
        "the index names {1}",
        "Download the missing files into the same directory",
    ),
    _known(
        r"Mismatch between weight map and model parts",
        InvalidDataError,
        "The weight files do not match the index",
        "model.safetensors.index.json and the files' headers name different tensors",
        "Download the index and all weight files from one revision; save a merged model again",
    ),
    _known(
        r"Can not map tensor '([^']+)'",
        EngineError,
        "The model has a tensor that the converter does not know",
        "{1} has no place in this architecture: the checkpoint is quantised, an unmerged adapter, or newer than this llama.cpp",
        _NEWER,
    ),
    _known(
        r"Missing tensors: (.+)|could not find any of: (.+)",
        InvalidDataError,
        "The model is incomplete",
        "",
        "Download config.json and all weight files again",
    ),
    _known(
        r"pre-tokenizer was not recognized",
        EngineError,
        "The converter does not know the model's tokenizer",
        "",
        "For a fine-tune with added tokens, use the original's tokenizer files; for a new model, build a newer llama.cpp",
    ),
    _known(
        r"data did not match any variant of untagged enum",
        ToolchainError,
        _TOKENIZER,
        "tokenizer.json is newer than the installed tokenizers package, or damaged",
        "Upgrade with: pip install -U transformers tokenizers",
    ),
    _known(
        r"Can't load tokenizer|Couldn't instantiate the backend tokenizer|Cannot find .*[Tt]okenizer|tokenizer\.(?:model|json)"
        r"|not a string|vocab_file|KeyError: '(?:added_tokens|model|vocab|merges)'",
        EngineError,
        _TOKENIZER,
        "",
        _ITS_FILES,
    ),
    _known(
        r"tokenizer\.vocab\.values\(\)\) < vocab_size|max\(.*vocab.*\) < ",
        InvalidDataError,
        "The tokenizer has more tokens than the model",
        "tokens were added to the tokenizer without resizing the embeddings",
        "Use the tokenizer files that belong to these weights, or resize the embeddings and save the model again",
    ),
    _known(
        r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|invalid load key|PytorchStreamReader failed",
        InvalidDataError,
        "A weight file is damaged",
        "",
        "Download it again",
    ),
    _known(
        r"FileNotFoundError|No such file or directory|File not found: ",
        EngineError,
        "A file of the model is missing",
        "",
        "Download the whole repository again",
    ),
    _known(
        r"MemoryError|can't allocate memory|DefaultCPUAllocator|Unable to allocate",
        EngineError,
        "The machine does not have enough memory to convert the model",
        "",
        "Close other programs, or convert it on a machine with more memory",
    ),
    _known(
        r"JSONDecodeError|Expecting (?:value|property name|',' delimiter)",
        InvalidDataError,
        "A configuration file of the model is damaged",
        "",
        "Download its .json files again",
    ),
    _known(
        r"KeyError: (.+)",
        InvalidDataError,
        "The model's configuration is incomplete",
        "the converter looked for {1}",
        "Compare config.json with the original model's, or build a newer llama.cpp",
    ),
)


def explain_conversion(lines: Sequence[str], ending: str, log: str) -> RunnerError:
    """The error for a converter that failed. ``lines``: the end of its output; ``ending``: how it ended; ``log``: the file with
    its whole output."""
    said = [line.strip() for line in lines if line.strip()]
    for line in reversed(said):
        for known in KNOWN:
            if match := known.pattern.search(line):
                groups = [group or "" for group in (match[0], *match.groups())]
                why = known.why.format(*groups) if known.why else line
                return known.error(known.what, why[:_LONGEST], f"{known.todo}; log: {log}")
    last = said[-1] if said else ending
    # An assertion without a message is a bare line; the line before it is the code that failed.
    if last == "AssertionError" and len(said) > 1:
        last = f"AssertionError at: {said[-2]}"
    return EngineError("The converter failed", last[:_LONGEST], f"Read its whole output: {log}")
