"""llama.cpp's messages, as its sources print them, become cause and remedy."""

from __future__ import annotations

import signal
import string
from pathlib import Path

import pytest

from imatrix_runner.engines.llama_cpp import messages
from imatrix_runner.engines.llama_cpp.messages import KNOWN, KnownMessage, explain
from imatrix_runner.errors import (
    EngineError,
    InvalidDataError,
    NoSpaceError,
    RunnerError,
    ToolchainError,
    UsageError,
)
from imatrix_runner.process import Command, Outcome

NEEDS_IMATRIX = """\
============================================================================
 ERROR: this quantization requires an importance matrix!
        - offending tensor: blk.0.attn_q.weight
        - target type: iq2_xs
============================================================================

llama_model_quantize: failed to quantize: this quantization requires an imatrix!
llama_quantize: failed to quantize model from 'm.gguf'"""
MISSING_WEIGHTS = """\
[   4/  39] blk.0.attn_k.weight - [   256,    128,      1,      1], type =   bf16,
====== llama_model_quantize_impl: did not find weights for blk.0.attn_k.weight
============================================================
Missing importance matrix for tensor blk.0.attn_k.weight in a very low-bit quantization
The result will be garbage, so bailing out"""
NO_MATRIX = "Please do not use IQ1_S, IQ1_M, IQ2_S, IQ2_XXS, IQ2_XS or Q2_K_S quantization without an importance matrix"
OTHER_SIZE = "====== llama_model_quantize_impl: imatrix size 512 is different from tensor size 256 for blk.0.attn_q.weight"
EMBEDDING_SIZE = "====== llama_model_quantize_impl: imatrix size 512 is different from tensor size 256 for token_embd.weight"
UNKNOWN_TOKENIZER = "error loading model vocabulary: unknown pre-tokenizer type: 'newbpe'"
NOT_FINITE = "0.01.1 E collect_imatrix: non-finite values detected in blk.1.ffn_down.weight"
NO_SUCH_FILE = "error while handling argument \"-f\": error: failed to open file 'x'"
NO_TYPES_FILE = "parse_tensor_type_file: failed to open file 't.txt': No such file or directory"
VULKAN = "ggml_vulkan: Device memory allocation of size 1 failed.\nvk::Device::allocateMemory: ErrorOutOfDeviceMemory"
NO_GGUF = "gguf_init_from_file_impl: invalid magic characters: 'xxxx', expected 'GGUF'"
TOO_SHORT = "0.00.039.042 E compute_imatrix: you need at least 1024 tokens for a context of 512 tokens"
TOO_SHORT_TO_MEASURE = "0.00.1 E perplexity: you need at least 1024 tokens to evaluate perplexity with a context of 512"
LOAD = "llama_model_load: error loading model: "
HYPER = "error loading model hyperparameters: "
VOCAB = "error loading model vocabulary: "
SHAPES = "expected   256,   256, got   256,   128,     1,     1"
WRONG_SHAPE = f"{LOAD}check_tensor_dims: tensor 'blk.0.a.weight' has wrong shape; {SHAPES}"
NO_MERGES = f"{LOAD}{VOCAB}cannot find tokenizer merges in model file"
QUANTIZE = "llama_model_quantize: failed to quantize: "

# What is printed, the class of the error, and what "why" and "do" must name. One entry at least for every row of KNOWN.
PRINTED: list[tuple[str, type[RunnerError], str, str]] = [
    (NEEDS_IMATRIX, InvalidDataError, "blk.0.attn_q.weight", "--imatrix"),
    (MISSING_WEIGHTS, InvalidDataError, "no imatrix data for tensor blk.0.attn_k.weight", "--uncovered q4_k"),
    (NO_MATRIX, InvalidDataError, "needs an importance matrix", "--imatrix generate"),
    (OTHER_SIZE, InvalidDataError, "512 values for blk.0.attn_q.weight, the model needs 256", "--imatrix generate"),
    (f"{QUANTIZE}imatrix contains non-finite value nan", InvalidDataError, "NaN", "--imatrix generate"),
    ("load_imatrix: failed to load imatrix from 'i.gguf'", InvalidDataError, "cannot read the imatrix", "--imatrix generate"),
    ("load_imatrix: failed reading data for entry 0", InvalidDataError, "cannot read the imatrix", "--imatrix generate"),
    ("load_imatrix: missing imatrix metadata in file i.gguf", InvalidDataError, "cannot read the imatrix", ""),
    (f"{QUANTIZE}requantizing from type q4_K is disabled", InvalidDataError, "already quantised (q4_K)", "--allow-requantize"),
    (f"{LOAD}unknown model architecture: 'newmodel'", ToolchainError, "architecture newmodel", "tools build"),
    (f"{LOAD}{UNKNOWN_TOKENIZER}", ToolchainError, "tokenizer newbpe", "build"),
    ("main: invalid ftype 'Q3_K_HIFI'", ToolchainError, "(Q3_K_HIFI)", "tools locate"),
    (f"{QUANTIZE}invalid output file type 39", ToolchainError, "(39)", "tools locate"),
    ("parse_ggml_type: invalid ggml_type 'q9_k'", UsageError, "no tensor type q9_k", "q4_k"),
    ("parse_tensor_type: malformed tensor type 'ffn_down'", UsageError, "malformed tensor type 'ffn_down'", "REGEX=TYPE"),
    ("parse_tensor_type: missing quantization type", UsageError, "missing quantization type", "REGEX=TYPE"),
    (NO_TYPES_FILE, UsageError, "t.txt cannot be read: No such file or directory", "--tensor-type-file"),
    (f"{QUANTIZE}Mismatched '(' and ')' in regular expression", UsageError, "Mismatched '(' and ')'", r"blk\.[0-3]\."),
    (f"{QUANTIZE}Invalid range in bracket expression.", UsageError, "Invalid range", "--tensor-type"),
    (f"{QUANTIZE}The expression contained mismatched ( and ).", UsageError, "mismatched ( and )", "--tensor-type"),
    ("parse_layer_prune: invalid layer id 'x'", UsageError, "'x' is not a layer number", "--prune-layers"),
    ("string_parse_kv_override: malformed KV override 'a', value cannot", UsageError, "'a' is not KEY=TYPE:VALUE", "str:"),
    ("string_parse_kv_override: invalid boolean value for KV override 'a=bool:x'", UsageError, "a=bool:x", "str:"),
    (NOT_FINITE, InvalidDataError, "reach blk.1.ffn_down.weight", "BF16"),
    (
        f"{QUANTIZE}tensor 'blk.0.attn_q.weight' has invalid data",
        InvalidDataError,
        "of blk.0.attn_q.weight hold NaN",
        "source file",
    ),
    (f"{QUANTIZE}quantized data validation failed", InvalidDataError, "does not fit its shape", "--output-tensor-type"),
    (TOO_SHORT, InvalidDataError, "at least 1024 tokens", "-f"),
    (TOO_SHORT_TO_MEASURE, InvalidDataError, "at least 1024 tokens", "--text"),
    ("error: invalid argument: --frobnicate", UsageError, "option --frobnicate", "--help"),
    (NO_SUCH_FILE, UsageError, "-f: error: failed to open file", "Correct"),
    (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 1024.00 MiB on device 0: cudaMalloc failed: out of memory",
        EngineError,
        "enough memory",
        "-ngl",
    ),
    (VULKAN, EngineError, "memory", "-ngl"),
    (f"{LOAD}unable to allocate CUDA0 buffer", EngineError, "enough memory", "-ngl"),
    ("ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 1024", EngineError, "enough memory", "-ngl"),
    (f"{LOAD}unable to allocate CPU_REPACK buffer", EngineError, "machine does not have enough memory", "-b 512"),
    (
        "alloc_tensor_range: failed to allocate CPU buffer of size 1024",
        EngineError,
        "machine does not have enough memory",
        "-b 512",
    ),
    (
        "terminate called after throwing an instance of 'std::bad_alloc'",
        EngineError,
        "machine does not have enough memory",
        "--jobs 1",
    ),
    (f"{LOAD}mmap failed: Cannot allocate memory", EngineError, "machine does not have enough memory", "--jobs 1"),
    (
        "llama-quantize: error while loading shared libraries: libcudart.so.12: cannot open shared object file",
        ToolchainError,
        "the library libcudart.so.12 is missing",
        "tools build",
    ),
    (
        f"{LOAD}tensor 'blk.0.attn_q.weight' data is not within the file bounds, model is corrupted or incomplete",
        InvalidDataError,
        "the file ends before blk.0.attn_q.weight",
        "complete",
    ),
    (WRONG_SHAPE, InvalidDataError, "blk.0.a.weight has the shape 256, 128, 1, 1, but the model's own metadata", "config.json"),
    (f"{LOAD}missing tensor 'blk.3.ffn_up.weight'", InvalidDataError, "tensor blk.3.ffn_up.weight is missing", "convert"),
    (
        f"{LOAD}check_tensor_dims: tensor 'output_norm.weight' not found",
        InvalidDataError,
        "tensor output_norm.weight is missing",
        "convert",
    ),
    (
        f"{LOAD}done_getting_tensors: wrong number of tensors; expected 292, got 291",
        InvalidDataError,
        "292 tensors, but these llama.cpp tools use only 291",
        "tools build",
    ),
    (f"{LOAD}invalid model: tensor 'a.weight' is duplicated", InvalidDataError, "a.weight is in the model twice", "again"),
    (f"{LOAD}{HYPER}key not found in model: llama.context_length", InvalidDataError, "lacks llama.context_length", "convert"),
    (f"{LOAD}{HYPER}array key not found in model: llama.x", InvalidDataError, "lacks llama.x", "convert"),
    (f"{LOAD}{HYPER}key llama.x has wrong type str but expected type u32", InvalidDataError, "for llama.x", "convert"),
    (f"{LOAD}{HYPER}key llama.x has wrong array length; expected 4, got 3", InvalidDataError, "for llama.x", "convert"),
    (f"{LOAD}{HYPER}invalid n_rot: 64, expected 128", InvalidDataError, "64 rotary dimensions, but its heads have 128", ""),
    (
        "gguf_init_from_reader: tensor 'blk.0.attn_q.weight' has invalid ggml type 139. should be in [0, 43)",
        ToolchainError,
        "type number 139",
        "--llama-cpp DIR",
    ),
    (
        f"{LOAD}illegal split file idx: 1 (file: m.gguf), model must be loaded with the first split",
        InvalidDataError,
        "do not fit together: illegal split file idx: 1",
        "the first",
    ),
    (f"{LOAD}corrupted model: 10 tensors expected but 9 found", InvalidDataError, "10 tensors expected but 9", "again"),
    (
        NO_MERGES,
        InvalidDataError,
        "without its tokenizer (merges)",
        "config.json",
    ),
    (f"{LOAD}{VOCAB}unknown tokenizer: 'newkind'", ToolchainError, "the tokenizer type newkind", "tools build"),
    (f"{LOAD}LLAMA_SPLIT_MODE_TENSOR not implemented for architecture 'mamba'", UsageError, "mamba", "-sm layer"),
    (
        f"{QUANTIZE}type iq4_k unsupported for integer quantization: no dequantization available",
        InvalidDataError,
        "(iq4_k)",
        "BF16",
    ),
    (f"{QUANTIZE}cannot dequantize/convert tensor type i32", InvalidDataError, "(i32)", "BF16"),
    (f"{QUANTIZE}Bad layer 9 for tensor blk.9.x. Must be in [0, 2)", InvalidDataError, "blk.9.x", "convert"),
    ("collect_imatrix: inconsistent size for blk.0.x (256 vs 512)", InvalidDataError, "256 values for blk.0.x", "generate"),
    ("compute_imatrix: there will be not enough tokens left after removing 30 chunks", InvalidDataError, "chunk 30", "--chunk"),
    ("kl_divergence: inconsistent vocabulary (512 vs 32000)", InvalidDataError, "512 tokens, and this model has 32000", "own"),
    (
        "kl_divergence: base.kld does not look like a file containing log-probabilities",
        InvalidDataError,
        "base.kld is not a file of log-probabilities",
        "Remove",
    ),
    (
        "kl_divergence: base.kld has been computed with 512, while the current context is 256. Increase it with -c and retry",
        InvalidDataError,
        "a context of 512, not 256",
        "-c 512",
    ),
    ("CUDA error: no kernel image is available for execution on the device", ToolchainError, "other GPUs", "-ngl 0"),
    (
        "gguf_init_from_file: failed to open GGUF file 'm.gguf' (Permission denied)",
        InvalidDataError,
        "m.gguf cannot be opened (Permission denied)",
        "read",
    ),
    (f"{LOAD}{HYPER}something quite new", InvalidDataError, "llama.cpp says: something quite new", "tools build"),
    (f"{LOAD}Mismatched '(' and ')' in regular expression", UsageError, "a pattern of -ot", "-ot 'ffn_"),
    (f"{QUANTIZE}llama_model_loader: failed to load model from m.gguf", InvalidDataError, "cannot load the model", "complete"),
    (f"{QUANTIZE}something quite new", EngineError, "llama.cpp says: something quite new", "log"),
    (NO_GGUF, InvalidDataError, "cannot load", "complete"),
    ("0.00.1 E cmn  common_init_: failed to load model 'm.gguf'", InvalidDataError, "cannot load", "complete"),
]


def failed(*lines: str, code: int = 1, log: Path | None = None, hung: bool = False) -> Outcome:
    return Outcome(Command(("tool",)), code, 1.0, tuple("\n".join(lines).splitlines()), log, hung=hung)


@pytest.mark.parametrize(("printed", "kind", "why", "todo"), PRINTED, ids=[str(number) for number in range(len(PRINTED))])
def test_a_message_becomes_cause_and_remedy(printed: str, kind: type[RunnerError], why: str, todo: str) -> None:
    error = explain(failed("some line before", printed), "Q4_K_M failed", writes=None)
    assert type(error) is kind
    assert error.what == "Q4_K_M failed"
    assert why in error.why
    assert todo in error.todo
    assert not error.why.endswith(" ")


def test_every_row_of_the_table_is_triggered_by_a_printed_line() -> None:
    def first(printed: str) -> KnownMessage:
        return next(known for known in KNOWN if known.pattern.search(printed))

    assert {id(first(printed)) for printed, *_ in PRINTED} == {id(known) for known in KNOWN}


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.pattern.pattern[:30])
def test_every_template_names_only_groups_that_its_pattern_has(known: KnownMessage) -> None:
    for template in (known.why, known.todo):
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        assert all(0 < int(field) <= known.pattern.groups for field in fields)


def test_a_misfit_of_the_embeddings_is_not_blamed_because_llama_quantize_goes_on_after_it() -> None:
    error = explain(failed(EMBEDDING_SIZE, f"{QUANTIZE}requantizing from type q4_K is disabled"), "failed")
    assert "already quantised" in error.why


def test_an_unknown_failure_shows_the_last_lines_and_where_the_log_is(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(50)]
    error = explain(failed(*lines, code=7, log=tmp_path / "x.log"), "llama-imatrix failed")
    assert type(error) is EngineError
    assert error.why == "exit code 7; line 47 / line 48 / line 49"
    assert error.todo.endswith(f"Full log: {tmp_path / 'x.log'}")


def test_a_known_failure_shows_the_log_too(tmp_path: Path) -> None:
    assert str(tmp_path / "x.log") in explain(failed(TOO_SHORT, log=tmp_path / "x.log"), "failed").todo


def test_a_silent_failure_says_so() -> None:
    assert explain(failed(), "failed").why == "exit code 1; it printed nothing"


def test_a_killed_child_is_not_explained_by_what_it_said_before() -> None:
    error = explain(failed("failed to load model", code=-signal.SIGKILL), "failed")
    assert type(error) is EngineError
    assert "killed by SIGKILL" in error.why
    assert "continues" in error.todo


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE"])
def test_a_crash_is_named_and_nothing_is_guessed(name: str) -> None:
    error = explain(failed("tensor cannot be used with preferred buffer type", code=-getattr(signal, name)), "failed")
    assert error.why.startswith(f"killed by {name} (")
    assert "cannot" not in error.why
    assert "imatrix-runner doctor" in error.todo
    assert "GPU" not in error.todo


def test_who_gives_up_is_explained_by_its_last_words() -> None:
    said = ("error in line 1", *("ordinary",) * 9, "ops.cpp:7: GGML_ASSERT(false) failed")
    error = explain(failed(*said, code=-signal.SIGABRT), "failed")
    assert error.why == "killed by SIGABRT (the program aborted); ops.cpp:7: GGML_ASSERT(false) failed"
    among = ("0.01.2 W decode: failed to find a slot", "[1]12.5,ops.cpp:7: GGML_ASSERT(false) failed", "0.01.3 E cannot go on")
    assert explain(failed(*among, code=-signal.SIGABRT), "failed").why == error.why
    memory = explain(failed("terminate called after throwing an instance of 'std::bad_alloc'", code=-signal.SIGABRT), "failed")
    assert memory.why == "the machine does not have enough memory"


def test_a_hung_child_points_to_the_time_limit() -> None:
    error = explain(failed(code=-signal.SIGTERM, hung=True), "failed")
    assert "--timeout" in error.todo


@pytest.mark.parametrize("said", [f"{QUANTIZE}basic_ios::clear: iostream error", "write: No space left on device"])
def test_a_full_disk_is_told_with_what_is_free(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "free_bytes", lambda _path: 4096)
    error = explain(failed(said), "Q4_K_M failed", writes=tmp_path / "new" / "o.gguf")
    assert type(error) is NoSpaceError
    assert "4.00 KiB free" in error.why
    assert str(tmp_path) in error.why
    assert "--work-dir" in error.todo


def test_an_io_error_on_a_disk_with_room_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "free_bytes", lambda _path: 1 << 40)
    error = explain(failed(f"{QUANTIZE}basic_ios::clear: iostream error"), "failed", writes=tmp_path)
    assert type(error) is EngineError
    assert "iostream error" in error.why
