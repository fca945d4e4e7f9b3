"""Error messages of the converter and the packages below it are translated to cause and advice."""

from __future__ import annotations

import pytest

from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, ToolchainError
from imatrix_runner.models.converter_messages import KNOWN, explain_conversion

# What is printed, the class of the error, and what "what", "why" and "do" must name. One entry at least for every row.
PRINTED: list[tuple[str, type[RunnerError], str, str, str]] = [
    ("OSError: [Errno 28] No space left on device", NoSpaceError, "disk is full", "No space", "--work-dir"),
    (
        "ValueError: /m contains custom code. Please pass the argument `trust_remote_code=True` to allow it.",
        InvalidDataError,
        "contains its own code",
        "Python code",
        "--trust-remote-code",
    ),
    (
        "The checkpoint you are trying to load has model type `new` but Transformers does not recognize this architecture.",
        ToolchainError,
        "transformers does not know",
        "`new`",
        "pip install -U transformers",
    ),
    ("ModuleNotFoundError: No module named 'torch'", ToolchainError, "package", "'torch'", "imatrix-runner[convert]"),
    (
        "NotImplementedError: Quant method is not yet supported: 'awq'",
        InvalidDataError,
        "is quantised in a form",
        "does not know 'awq'",
        "original model",
    ),
    (
        "NotImplementedError: Quant format 'marlin-24' for method 'compressed-tensors' is not yet supported",
        InvalidDataError,
        "is quantised in a form",
        "'marlin-24'",
        "original model",
    ),
    (
        "NotImplementedError: Can't handle multiple config groups for compressed-tensors yet",
        InvalidDataError,
        "is quantised in a form",
        "config groups",
        "original model",
    ),
    (
        "ERROR:hf-to-gguf:Model FooForCausalLM is not supported",
        EngineError,
        "model's architecture",
        "FooForCausalLM",
        "tools build",
    ),
    (
        "ValueError: Failed to detect model architecture",
        InvalidDataError,
        "architecture is unknown",
        "no architectures",
        "config.json",
    ),
    (
        "ValueError: Missing or incomplete model files: ['model-00002-of-00002.safetensors']",
        InvalidDataError,
        "are missing",
        "model-00002-of-00002",
        "Download",
    ),
    (
        "ValueError: Mismatch between weight map and model parts for tensor names:",
        InvalidDataError,
        "do not match the index",
        "different tensors",
        "one revision",
    ),
    (
        "ValueError: Can not map tensor 'model.layers.0.mlp.up_proj.qweight'",
        EngineError,
        "does not know",
        "model.layers.0.mlp.up_proj.qweight has no place",
        "tools build",
    ),
    (
        "KeyError: \"could not find any of: ['n_embd', 'hidden_size']\"",
        InvalidDataError,
        "is incomplete",
        "hidden_size",
        "Download",
    ),
    (
        "NotImplementedError: BPE pre-tokenizer was not recognized - update",
        EngineError,
        "tokenizer",
        "pre-tokenizer",
        "newer llama.cpp",
    ),
    (
        "Exception: data did not match any variant of untagged enum ModelWrapper at line 757443 column 3",
        ToolchainError,
        "tokenizer",
        "newer than the installed",
        "pip install -U transformers tokenizers",
    ),
    ("FileNotFoundError: File not found: /m/tokenizer.model", EngineError, "tokenizer", "/m/tokenizer.model", "tokenizer.json"),
    ("KeyError: 'added_tokens'", EngineError, "tokenizer", "'added_tokens'", "complete"),
    ("OSError: Can't load tokenizer for '/m'. If you were trying", EngineError, "tokenizer", "'/m'", "complete"),
    (
        "    assert max(tokenizer.vocab.values()) < vocab_size\nAssertionError",
        InvalidDataError,
        "more tokens than the model",
        "without resizing the embeddings",
        "resize",
    ),
    (
        "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge",
        InvalidDataError,
        "damaged",
        "HeaderTooLarge",
        "Download",
    ),
    (
        "FileNotFoundError: [Errno 2] No such file or directory: 'x'",
        EngineError,
        "file of the model is missing",
        "'x'",
        "repository",
    ),
    ("numpy.core._exceptions.MemoryError: Unable to allocate 1 GiB", EngineError, "not have enough memory", "1 GiB", "memory"),
    (
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        InvalidDataError,
        "configuration file",
        "line 1",
        ".json",
    ),
    ("KeyError: 'rope_theta'", InvalidDataError, "is incomplete", "'rope_theta'", "config.json"),
]


@pytest.mark.parametrize(
    ("printed", "kind", "what", "why", "todo"), PRINTED, ids=[str(number) for number in range(len(PRINTED))]
)
def test_a_message_becomes_cause_and_remedy(printed: str, kind: type[RunnerError], what: str, why: str, todo: str) -> None:
    lines = ["INFO:hf-to-gguf:Loading model: m", "Traceback (most recent call last):", *printed.splitlines()]
    error = explain_conversion(lines, "exit code 1", "/w/convert.log")
    assert type(error) is kind
    assert what in error.what
    assert why in error.why
    assert todo in error.todo
    assert error.todo.endswith("log: /w/convert.log")


def test_every_row_of_the_table_is_triggered_by_a_printed_line() -> None:
    def first(printed: str) -> int:
        lines = reversed(printed.splitlines())
        found = (number for line in lines for number, known in enumerate(KNOWN) if known.pattern.search(line))
        return next(found)

    assert {first(printed) for printed, *_ in PRINTED} == set(range(len(KNOWN)))


def test_an_assertion_without_words_shows_its_code() -> None:
    lines = ['  File "conversion/base.py", line 514, in dequant_model', "    assert strategy == 'channel'", "AssertionError"]
    error = explain_conversion(lines, "exit code 1", "log")
    assert error.why == "AssertionError at: assert strategy == 'channel'"


def test_a_silent_failure_tells_how_it_ended() -> None:
    assert explain_conversion([], "killed by SIGSEGV", "log").why == "killed by SIGSEGV"
