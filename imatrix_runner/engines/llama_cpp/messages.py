"""Table of llama.cpp's error messages: what each means and what to do about it.

The patterns come from llama.cpp's sources; ``{1}`` and so on are a pattern's groups. The first row that matches any line of a
failed child's output wins, so specific rows come before general ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, ToolchainError, UsageError
from imatrix_runner.files import existing_parent, free_bytes, human_bytes
from imatrix_runner.process import Outcome, relevant_lines


@dataclass(frozen=True)
class KnownMessage:
    pattern: re.Pattern[str]
    error: type[RunnerError]
    why: str
    todo: str


def _known(pattern: str, error: type[RunnerError], why: str, todo: str) -> KnownMessage:
    return KnownMessage(re.compile(pattern, re.MULTILINE), error, why, todo)


_ANOTHER_MATRIX = "Use an imatrix made from this very model: imatrix-runner run MODEL --imatrix generate"
# Free space that may remain after a failed write: file systems allocate in blocks.
_NEARLY_FULL = 1 << 20
_CRASHED = (
    "llama.cpp itself failed. See whether it computes here with: imatrix-runner doctor. If it does, this model is the cause: "
    "try another llama.cpp (imatrix-runner tools build --version X), or --no-repack if it was calibrated or measured"
)
_LAST_WORDS = 5
"""How many lines before its end hold the reason of a program that gives up."""

_ABORT = re.compile(r"[\w./\\:+-]+\.(?:c|cc|cpp|cu|cuh|h|hpp|m|mm|comp):\d+: [^\n]+")
"""What ggml_abort writes: file, line, reason. Lines of llama.cpp's log thread may come before, after and on the same line."""

_TOOLS_BUILD = "Build the current tools with: imatrix-runner tools build"
_CONVERT_AGAIN = "Get the file again, or convert the original model with current tools (imatrix-runner tools build)"
# What std::regex says, in libstdc++ and in libc++.
_NO_REGEX = (
    r"(.*(?:[Rr]egular expression|regex|[Bb]racket expression|[Cc]haracter class|Back-reference|in '\[).*"
    r"|The expression contained.*)"
)

_MISSING_WEIGHTS = r"Missing importance matrix for tensor (\S+) in a very low-bit"

KNOWN: tuple[KnownMessage, ...] = (
    _known(
        r"- offending tensor: (\S+)",
        InvalidDataError,
        "tensor {1} would get a type that cannot do without an importance matrix",
        "Give one with --imatrix FILE, or let one be made with --imatrix generate.",
    ),
    _known(
        _MISSING_WEIGHTS,
        InvalidDataError,
        "there is no imatrix data for tensor {1}, and its type cannot do without",
        "Give tensors without data a type that needs none: --uncovered q4_k; or choose a level of 3 bits or more.",
    ),
    _known(
        # Before 2026, and in forks, llama-quantize itself refuses some ftypes.
        r"Please do not use .* quantization without an importance matrix",
        InvalidDataError,
        "it needs an importance matrix and there is none",
        "Give one with --imatrix FILE, or let one be made with --imatrix generate.",
    ),
    _known(
        # For token embeddings llama-quantize prints this too, but goes on.
        r"imatrix size (\d+) is different from tensor size (\d+) for (?!(?:per_layer_)?token_embd\.weight)(\S+)",
        InvalidDataError,
        "the imatrix holds {1} values for {3}, the model needs {2}: it was made from another model",
        _ANOTHER_MATRIX,
    ),
    _known(
        r"imatrix contains non-finite value",
        InvalidDataError,
        "the imatrix holds NaN or infinite values",
        _ANOTHER_MATRIX,
    ),
    _known(
        r"load_imatrix: (?:failed to load imatrix from|no data in file|failed reading)|missing imatrix metadata in file",
        InvalidDataError,
        "llama-quantize cannot read the imatrix",
        _ANOTHER_MATRIX,
    ),
    _known(
        r"requantizing from type (\S+) is disabled",
        InvalidDataError,
        "the source is already quantised ({1})",
        "Start from the BF16 or F16 model, or accept the loss with --allow-requantize.",
    ),
    _known(
        r"unknown model architecture: '([^']*)'",
        ToolchainError,
        "these llama.cpp tools do not know the architecture {1}",
        _TOOLS_BUILD,
    ),
    _known(
        r"unknown pre-tokenizer type: '([^']*)'",
        ToolchainError,
        "these llama.cpp tools do not know the tokenizer {1}",
        _TOOLS_BUILD,
    ),
    _known(
        r"invalid (?:output file type|ftype) '?([^'\s]*)",
        ToolchainError,
        "these llama.cpp tools do not offer that type ({1})",
        "See what they offer with: imatrix-runner tools locate",
    ),
    _known(
        r"parse_ggml_type: invalid ggml_type '([^']*)'",
        UsageError,
        "llama.cpp has no tensor type {1}",
        "Name one of its types, such as q4_k, q6_k, q8_0, bf16 or f32.",
    ),
    _known(
        r"parse_tensor_type: (malformed tensor type '[^']*'|missing tensor name|missing quantization type)",
        UsageError,
        "llama.cpp cannot read a tensor type: {1}",
        "Write REGEX=TYPE, for example: --tensor-type ffn_down=q6_k",
    ),
    _known(
        r"parse_tensor_type_file: failed to open file '([^']*)': (.*)",
        UsageError,
        "the list of tensor types {1} cannot be read: {2}",
        "Check the path given with --tensor-type-file.",
    ),
    _known(
        rf"failed to quantize: {_NO_REGEX}",
        UsageError,
        "a pattern of --tensor-type is not a valid regular expression: {1}",
        "Correct the pattern; it is searched for in tensors' names, for example: --tensor-type 'blk\\.[0-3]\\.ffn_down=q6_k'",
    ),
    _known(
        rf"error loading model: {_NO_REGEX}",
        UsageError,
        "a pattern of -ot (--override-tensor) is not a valid regular expression: {1}",
        "Correct the pattern; it is searched for in tensors' names, for example: -ot 'ffn_.*_exps=CPU'",
    ),
    _known(
        r"parse_layer_prune: invalid layer id '([^']*)'",
        UsageError,
        "'{1}' is not a layer number",
        "For example: --prune-layers 3,4",
    ),
    _known(
        r"(?:malformed|invalid boolean value for|invalid type for) KV override '([^']*)'",
        UsageError,
        "the override '{1}' is not KEY=TYPE:VALUE with TYPE int, float, bool (true, false) or str (at most 127 bytes)",
        "For example: --override-kv general.name=str:Mine",
    ),
    _known(
        r"non-finite values detected in (\S+)",
        InvalidDataError,
        "the activations that reach {1} are NaN or infinite: the model's weights are damaged or overflow in this type",
        "Try the model's BF16 file; if that fails too, download it again.",
    ),
    _known(
        r"tensor '([^']*)' has invalid data",
        InvalidDataError,
        "the weights of {1} hold NaN or infinite values, or are damaged",
        "Download or convert the source file again.",
    ),
    _known(
        r"quantized data validation failed",
        InvalidDataError,
        "a quantised tensor holds NaN or infinite values, or its type does not fit its shape",
        "Check the source file; with --output-tensor-type or --token-embedding-type choose q8_0 or f16.",
    ),
    _known(
        r"you need at least (\d+) tokens for a context of (\d+)",
        InvalidDataError,
        "the calibration text is too short: at least {1} tokens are needed",
        "Give a longer text with -f, or a smaller context with -c.",
    ),
    _known(
        r"you need at least (\d+) tokens to evaluate perplexity with a context of (\d+)",
        InvalidDataError,
        "the text is too short: llama-perplexity wants at least {1} tokens",
        "Give a longer text with --text, or a smaller context with -c.",
    ),
    _known(
        r"error: invalid argument: (\S+)",
        UsageError,
        "these llama.cpp tools do not know the option {1}",
        "See their options with: llama-imatrix --help",
    ),
    _known(
        r"error while handling argument \"([^\"]*)\": (.*)",
        UsageError,
        "llama.cpp does not accept {1}: {2}",
        "Correct the option and run the command again.",
    ),
    _known(
        r"(?:cudaMalloc failed|ErrorOutOfDeviceMemory"
        r"|failed to allocate (?!CPU)(\S+) buffer|unable to allocate (?!CPU).* buffer)",
        EngineError,
        "the GPU does not have enough memory for the model",
        "Offload fewer layers, for example -ngl 20 (or -ngl 0), or take smaller batches with -b 512.",
    ),
    _known(
        r"(?:std::bad_alloc|[Cc]annot allocate memory|failed to allocate|unable to allocate CPU)",
        EngineError,
        "the machine does not have enough memory",
        "Close other programs; for quantising use --jobs 1 and --max-buffer-size 512, for an imatrix -b 512.",
    ),
    _known(
        r"error while loading shared libraries: ([^:]+)",
        ToolchainError,
        "the library {1} is missing on this machine",
        _TOOLS_BUILD,
    ),
    _known(
        r"tensor '([^']*)' has wrong shape; expected (.+?), got (.+)",
        InvalidDataError,
        "{1} has the shape {3}, but the model's own metadata requires {2}",
        f"{_CONVERT_AGAIN}; an edited or merged model needs a config.json that fits its weights.",
    ),
    _known(
        r"(?:missing tensor|: tensor) '([^']*)'(?: not found)?$",
        InvalidDataError,
        "the tensor {1} is missing: the file is incomplete, or these llama.cpp tools expect another form of this model",
        _CONVERT_AGAIN,
    ),
    _known(
        r"wrong number of tensors; expected (\d+), got (\d+)",
        InvalidDataError,
        "the file holds {1} tensors, but these llama.cpp tools use only {2} of them",
        _CONVERT_AGAIN,
    ),
    _known(
        r"invalid model: tensor '([^']*)' is duplicated",
        InvalidDataError,
        "the tensor {1} is in the model twice",
        "Download all files of the model again, from one revision.",
    ),
    _known(
        r"key not found in model: (\S+)",
        InvalidDataError,
        "the model's metadata lacks {1}",
        _CONVERT_AGAIN,
    ),
    _known(
        r"key (\S+) has wrong (?:type (\S+) but expected type (\S+)|array length; expected \d+, got \d+)",
        InvalidDataError,
        "the model's metadata has a value of another type or length for {1} than llama.cpp expects",
        _CONVERT_AGAIN,
    ),
    _known(
        r"invalid n_rot: (\d+), expected (\d+)",
        InvalidDataError,
        "the model's metadata says {1} rotary dimensions, but its heads have {2}",
        _CONVERT_AGAIN,
    ),
    _known(
        r"tensor '([^']*)'.* has invalid ggml type (\d+)",
        ToolchainError,
        "{1} is stored in type number {2}, which these llama.cpp tools do not know: a newer llama.cpp's or a fork's",
        f"Name the fork's programs with --llama-cpp DIR. {_TOOLS_BUILD}",
    ),
    _known(
        r"((?:illegal split file idx|invalid split file|invalid split count|failed to load GGUF split|corrupted model:)[^\n]*)",
        InvalidDataError,
        "the shards of the model do not fit together: {1}",
        "Download all shards again from one revision, and name the first.",
    ),
    _known(
        r"cannot find tokenizer (vocab|merges) in model file",
        InvalidDataError,
        "the model was converted without its tokenizer ({1})",
        f"{_CONVERT_AGAIN}, with the tokenizer's files next to its config.json.",
    ),
    _known(
        r"unknown tokenizer: '([^']*)'",
        ToolchainError,
        "these llama.cpp tools do not know the tokenizer type {1}",
        _TOOLS_BUILD,
    ),
    _known(
        r"LLAMA_SPLIT_MODE_TENSOR not implemented for architecture '([^']*)'",
        UsageError,
        "-sm tensor is not offered for models of the architecture {1}",
        "Use -sm layer.",
    ),
    _known(
        r"type (\S+) unsupported for integer quantization|cannot dequantize/convert tensor type (\S+)",
        InvalidDataError,
        "the source holds tensors of a type that llama.cpp cannot widen ({1}{2})",
        "Start from a model in F32, F16 or BF16.",
    ),
    _known(
        r"(?:Bad layer (\d+) for|Failed to determine layer for) tensor (\S+)",
        InvalidDataError,
        "{2} does not belong to any of the layers that the model's metadata announces",
        _CONVERT_AGAIN,
    ),
    _known(
        r"inconsistent (?:size|expert count) for (\S+) \((\d+) vs (\d+)\)",
        InvalidDataError,
        "the imatrix file to continue holds {2} values for {1}, the model needs {3}: it was made from another model",
        _ANOTHER_MATRIX,
    ),
    _known(
        r"there will be not enough tokens left after removing (\d+) chunks",
        InvalidDataError,
        "the calibration text ends before chunk {1}",
        "Give a longer text with -f, or a smaller --chunk.",
    ),
    _known(
        r"inconsistent vocabulary \((\d+) vs (\d+)\)",
        InvalidDataError,
        "the reference was made with a vocabulary of {1} tokens, and this model has {2}",
        "Measure levels against a reference of their own source.",
    ),
    _known(
        r"(\S+) does not look like a file containing log-probabilities",
        InvalidDataError,
        "{1} is not a file of log-probabilities",
        "Remove it: it is made again.",
    ),
    _known(
        r"has been computed with (\d+), while the current context is (\d+)",
        InvalidDataError,
        "the reference was made with a context of {1}, not {2}",
        "Run the same command with -c {1}.",
    ),
    _known(
        r"no kernel image is available for execution|CUDA driver version is insufficient|invalid device function",
        ToolchainError,
        "llama.cpp was built for other GPUs or another driver than this machine's",
        f"{_TOOLS_BUILD} (or compute without the GPU: -ngl 0)",
    ),
    _known(
        r"tensor '([^']*)' data is not within the file bounds",
        InvalidDataError,
        "the file ends before {1}, so llama.cpp cannot load the model",
        "The file is incomplete: download or convert it again.",
    ),
    _known(
        r"failed to open (?:GGUF )?file '([^']*)'(?: \(([^)]*)\)|: ([^\n]*))?",
        InvalidDataError,
        "{1} cannot be opened ({2}{3})",
        "Check that it exists and may be read, then run the same command again.",
    ),
    _known(
        r"error loading model: (?:error loading model (?:hyperparameters|vocabulary): )?(?!\S+: failed to load model)([^\n]+)",
        InvalidDataError,
        "llama.cpp says: {1}",
        "Check that the file is complete, or update the tools: imatrix-runner tools build",
    ),
    _known(
        r"failed to quantize: (?!\S+: failed to load model)([^\n]+)",
        EngineError,
        "llama.cpp says: {1}",
        "Read the log.",
    ),
    _known(
        r"(?:invalid magic|failed to load model|failed to init)",
        InvalidDataError,
        "llama.cpp cannot load the model",
        "Read the log; check that the file is complete, or update the tools: imatrix-runner tools build",
    ),
)


def missing_weights(outcome: Outcome) -> str:
    """The tensor that llama-quantize refused to quantise without imatrix data; empty if it failed for another reason."""
    match = re.search(_MISSING_WEIGHTS, "\n".join(outcome.tail))
    return match[1] if match else ""


def rounded_context(tool: str, asked: int, taken: int | None) -> UsageError:
    """The error for a program that rounds the requested context up."""
    return UsageError(
        f"{tool} does not compute chunks of {asked} tokens",
        f"it rounds the context up to {taken}, so its chunks would not be the planned ones",
        f"Give -c {taken}, or use --engine embedded.",
    )


def explain(outcome: Outcome, what: str, *, writes: Path | None = None) -> RunnerError:
    """The error for a failed child: by a known message if there is one, else with how it ended and its last output."""
    known = recognise(outcome, what, writes=writes)
    if known is not None:
        return known
    words = outcome.tail[-_LAST_WORDS:] if outcome.gave_up else outcome.tail
    aborts = _ABORT.findall("\n".join(words)) if outcome.gave_up else []
    last = aborts[-1] if aborts else " / ".join(relevant_lines(words, 3)) or "it printed nothing"
    why = f"{outcome.ending()}; {last}"
    if outcome.hung:
        todo = "Run the same command again: it continues. A slow machine may need a longer --timeout."
    elif outcome.crashed:
        todo = _CRASHED
        if not outcome.gave_up:
            why = outcome.ending()  # the last lines before a crash are ordinary output
    elif outcome.returncode < 0:
        todo = "Close other programs or compute less at once (-b 512), then run the same command again: it continues."
    else:
        todo = "Read the log."
    return EngineError(what, why, with_log(todo, outcome))


def recognise(outcome: Outcome, what: str, *, writes: Path | None = None) -> RunnerError | None:
    """The error for a known message of llama.cpp, or None. ``writes``: the path it was writing, to recognise a full disk,
    which llama.cpp calls an "iostream error"."""
    text = "\n".join(outcome.tail)
    if writes is not None and (full := _disk_full(text, what, writes)):
        return full
    if outcome.gave_up:
        text = "\n".join(outcome.tail[-_LAST_WORDS:])
    if outcome.gave_up or not (outcome.hung or outcome.crashed or outcome.returncode < 0):
        for known in KNOWN:
            if match := known.pattern.search(text):
                groups = [" ".join((group or "").split()) for group in (match[0], *match.groups())]
                return known.error(what, known.why.format(*groups), with_log(known.todo.format(*groups), outcome))
    return None


def with_log(todo: str, outcome: Outcome) -> str:
    stop = "" if todo.endswith(".") else "."
    return f"{todo}{stop} Full log: {outcome.log}" if outcome.log else todo


def _disk_full(text: str, what: str, writes: Path) -> NoSpaceError | None:
    if "Disk quota exceeded" in text:
        todo = "Remove files, ask for a larger quota, or choose another disk with --work-dir, then run the same command again."
        return NoSpaceError(what, f"the disk quota is used up at {existing_parent(writes)}", todo)
    said = "iostream error" in text or "No space left on device" in text
    return full_disk(what, writes) if said else None


def full_disk(what: str, writes: Path) -> NoSpaceError | None:
    """The error for a write that failed, if the disk at ``writes`` is full."""
    free = free_bytes(writes)
    if free > _NEARLY_FULL:
        return None
    return NoSpaceError(
        what,
        f"the disk became full: {human_bytes(free)} free at {existing_parent(writes)}",
        "Free some space, or choose another disk with --work-dir, then run the same command again: it continues.",
    )
