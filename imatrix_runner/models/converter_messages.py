"""What the last words of llama.cpp's converter mean and what to do about them: the one table.

Each row was read in convert_hf_to_gguf.py, conversion/base.py, or in what transformers and safetensors raise there; ``{1}`` is
the first group of its pattern. A traceback's end says most, so lines are looked at from the last; within a line the first row
that matches wins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, ToolchainError

_LONGEST = 300


@dataclass(frozen=True)
class Known:
    """A row. ``why`` without text shows the line itself."""

    pattern: re.Pattern[str]
    error: type[RunnerError]
    what: str
    why: str
    todo: str


def _known(pattern: str, error: type[RunnerError], what: str, why: str, todo: str) -> Known:
    return Known(re.compile(pattern), error, what, why, todo)


_NEWER = "Build a newer llama.cpp with: imatrix-runner tools build --ref TAG"
_CANNOT_UNPACK = "The checkpoint is quantised in a form that cannot be unpacked"
_ORIGINAL = "Give the model it was made from, as it was published in BF16, F16 or F32"
_TOKENIZER = "The converter cannot read the model's tokenizer"
_ITS_FILES = "Check that tokenizer.json or tokenizer.model is complete (download it again), or build a newer llama.cpp"

KNOWN: tuple[Known, ...] = (
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
        "The model brings its own code",
        "its configuration or tokenizer is read by Python code that comes with it",
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
        "Run: pip install 'imatrix-runner[convert]'",
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
        "This llama.cpp cannot convert that architecture",
        "",
        _NEWER,
    ),
    _known(
        r"Failed to detect model architecture",
        InvalidDataError,
        "The model does not say what it is",
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
        "The weight files are not those of the index",
        "model.safetensors.index.json and the files' headers name different tensors",
        "Download the index and all weight files from one revision; of a merged model, save it again",
    ),
    _known(
        r"Can not map tensor '([^']+)'",
        EngineError,
        "The model holds a tensor that the converter does not know",
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
        "Of a fine-tune with added tokens, use the original's tokenizer files; for a new model, build a newer llama.cpp",
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
        "tokens were added to it and the embeddings were not resized",
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
        "The machine has not enough memory to convert the model",
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
        "The model's configuration lacks something",
        "the converter looked for {1}",
        "Compare config.json with the original model's, or build a newer llama.cpp",
    ),
)


def explain_conversion(lines: Sequence[str], ending: str, log: str) -> RunnerError:
    """The error for a converter that failed. ``lines``: the last it printed; ``ending``: how it ended; ``log``: where its whole
    output is."""
    said = [line.strip() for line in lines if line.strip()]
    for line in reversed(said):
        for known in KNOWN:
            if match := known.pattern.search(line):
                groups = [group or "" for group in (match[0], *match.groups())]
                why = known.why.format(*groups) if known.why else line
                return known.error(known.what, why[:_LONGEST], f"{known.todo}; log: {log}")
    last = said[-1] if said else ending
    # An assertion without words is a bare line: what stands before it is the code that made it.
    if last == "AssertionError" and len(said) > 1:
        last = f"AssertionError at: {said[-2]}"
    return EngineError("The converter failed", last[:_LONGEST], f"Read its whole output: {log}")
