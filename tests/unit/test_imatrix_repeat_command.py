"""The command that collects a matrix again has every value whole, and is llama-imatrix's where that can do it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from imatrix_runner.context.requests import ImatrixRequest
from imatrix_runner.documents.corpus import Corpus
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.imatrix.repeat_command import repeat_command

MODEL, OUT = Path("/models/m-BF16.gguf"), Path("/work/m/imatrix.gguf")
TEXT = Corpus(Path("/texts/my text.txt"), "my text.txt", 10, "5")
EXTRA = ("--override-kv", "general.name=str:a b")
FILES = ("-f", "/texts/my text.txt", "-o", "/work/m/imatrix.gguf", "-c", "512")


def test_what_follows_the_dashes_is_llama_imatrix_own() -> None:
    options = CollectOptions(n_gpu_layers="99", parse_special=True, threads=4, override_tensors=("a b=CPU",), extra=EXTRA)
    request = ImatrixRequest(options=options, chunks=140, first_chunk=10, output_frequency=8, save_frequency=16)
    assert repeat_command(request, MODEL, TEXT, OUT) == (
        *("llama-imatrix", "-m", "/models/m-BF16.gguf", *FILES, "--chunks", "140", "--chunk", "10"),
        *("-b", "2048", "-ub", "512", "-ngl", "99", "-ot", "a b=CPU", "--parse-special", *EXTRA),
    )


def test_where_llama_imatrix_cannot_do_it_the_program_is_ours() -> None:
    request = ImatrixRequest(
        options=CollectOptions(extra=EXTRA), output_frequency=8, until_converged=0.05, min_expert_tokens=64
    )
    command = (
        *("imatrix-runner", "imatrix", "generate", "/models/m-BF16.gguf", *FILES, "--output-frequency", "8"),
        *("--until-converged", "0.05", "--min-expert-tokens", "64", "-b", "2048", "-ub", "512"),
    )
    assert repeat_command(request, MODEL, TEXT, OUT) == (*command, "--", *EXTRA)
    assert repeat_command(replace(request, options=CollectOptions()), MODEL, TEXT, OUT) == command
