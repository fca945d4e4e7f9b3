"""Fingerprints of options: every field counts, and old workspaces find theirs again."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from imatrix_runner.context.open_model import Frozen
from imatrix_runner.context.requests import ImatrixRequest
from imatrix_runner.documents.corpus import Corpus
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.jobs import CollectOptions, QuantizeOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.engines.llama_cpp.flags import quantize_options
from imatrix_runner.evaluate.prompt_answers import DomainRequest
from imatrix_runner.fingerprints import RESULTS, Result, fingerprint_of, spelt, words_of
from imatrix_runner.imatrix.plan_generation import imatrix_inputs
from imatrix_runner.quantize.plan import level_inputs

CLASSES: tuple[type[Any], ...] = (CollectOptions, QuantizeOptions, ImatrixRequest, DomainRequest)

# What journals of commit ffcd778 say: options, then the texts for an imatrix, figures and answers.
COMPUTE: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "-b 2048 -ub 512", "-b 2048 -ub 512", "-ub 512"),
    (
        {"n_ctx": 1024, "n_batch": 4096, "n_ubatch": 128, "threads": 8},
        "-b 4096 -ub 128",
        "-b 4096 -ub 128",
        "-ub 128",
    ),
    ({"n_gpu_layers": "0"}, "-b 2048 -ub 512 -ngl 0", "-b 2048 -ub 512 -ngl 0", "-ub 512 -ngl 0"),
    (
        {"n_gpu_layers": "all", "tensor_split": "3,1", "split_mode": "row", "main_gpu": 0},
        "-b 2048 -ub 512 -ngl all -ts 3,1 -sm row -mg 0",
        "-b 2048 -ub 512 -ngl all -ts 3,1 -sm row -mg 0",
        "-ub 512 -ngl all -ts 3,1 -sm row -mg 0",
    ),
    (
        {"main_gpu": 1, "override_tensors": ("ffn_.*_exps=CPU", r"blk\.1\.=CPU,x=CUDA0")},
        r"-b 2048 -ub 512 -mg 1 -ot ffn_.*_exps=CPU -ot blk\.1\.=CPU,x=CUDA0",
        r"-b 2048 -ub 512 -mg 1 -ot ffn_.*_exps=CPU -ot blk\.1\.=CPU,x=CUDA0",
        r"-ub 512 -mg 1 -ot ffn_.*_exps=CPU -ot blk\.1\.=CPU,x=CUDA0",
    ),
    ({"flash_attn": "off"}, "-b 2048 -ub 512 -fa off", "-b 2048 -ub 512 -fa off", "-ub 512 -fa off"),
    ({"mmap": False}, "-b 2048 -ub 512 --no-mmap", "-b 2048 -ub 512", "-ub 512"),
    ({"repack": False}, "-b 2048 -ub 512 --no-repack", "-b 2048 -ub 512 --no-repack", "-ub 512 --no-repack"),
    (
        {"mmap": False, "repack": False, "parse_special": True, "process_output": True, "ppl": False},
        "-b 2048 -ub 512 --no-mmap --no-repack --parse-special --process-output",
        "-b 2048 -ub 512 --no-repack",
        "-ub 512 --no-repack",
    ),
    ({"extra": ("--foo", "a b")}, "-b 2048 -ub 512 --foo a b", "-b 2048 -ub 512", "-ub 512"),
    ({"extra": ("",)}, "-b 2048 -ub 512", "-b 2048 -ub 512", "-ub 512"),
    (
        {
            "n_ctx": 256,
            "n_batch": 256,
            "n_ubatch": 64,
            "threads": 1,
            "n_gpu_layers": "auto",
            "tensor_split": "1/2",
            "split_mode": "none",
            "main_gpu": 2,
            "override_tensors": ("a=b",),
            "flash_attn": "on",
            "mmap": False,
            "parse_special": True,
            "process_output": True,
            "ppl": False,
            "repack": False,
            "extra": ("--lora", "x.gguf"),
        },
        (
            "-b 256 -ub 64 -ngl auto -ts 1/2 -sm none -mg 2 -ot a=b -fa on --no-mmap --no-repack --parse-special "
            "--process-output --lora x.gguf"
        ),
        "-b 256 -ub 64 -ngl auto -ts 1/2 -sm none -mg 2 -ot a=b -fa on --no-repack",
        "-ub 64 -ngl auto -ts 1/2 -sm none -mg 2 -ot a=b -fa on --no-repack",
    ),
]

CHUNKS: list[tuple[dict[str, Any], str]] = [
    ({}, "all from 0"),
    ({"chunks": 100}, "100 from 0"),
    ({"first_chunk": 7}, "all from 7"),
    ({"output_frequency": 8, "save_frequency": 16}, "all from 0 --output-frequency 8 --save-frequency 16"),
    ({"until_converged": 0.05}, "all from 0 --until-converged 0.05"),
    (
        {"until_converged": 0.1234567, "min_expert_tokens": 64},
        "all from 0 --until-converged 0.123457 --min-expert-tokens 64",
    ),
    (
        {
            "chunks": 5,
            "first_chunk": 3,
            "output_frequency": 1,
            "save_frequency": 2,
            "until_converged": 1.0,
            "min_expert_tokens": 9,
        },
        "5 from 3 --output-frequency 1 --save-frequency 2 --until-converged 1 --min-expert-tokens 9",
    ),
    (
        {"mode": "generate", "text": Path("/t"), "out": Path("/o"), "parse_as_built": False, "typed": ("-f",)},
        "all from 0",
    ),
]

LEVELS: list[tuple[dict[str, Any], str]] = [
    ({}, "Q4_K_M"),
    ({"allow_requantize": True}, "Q4_K_M --allow-requantize"),
    (
        {"pure": True, "leave_output_tensor": True, "keep_split": True},
        "Q4_K_M --leave-output-tensor --pure --keep-split",
    ),
    ({"include_weights": ("ffn", "attn_q")}, "Q4_K_M --include-weights ffn --include-weights attn_q"),
    ({"exclude_weights": ("ffn",)}, "Q4_K_M --exclude-weights ffn"),
    (
        {"output_tensor_type": "q8_0", "token_embedding_type": "q6_k"},
        "Q4_K_M --output-tensor-type q8_0 --token-embedding-type q6_k",
    ),
    (
        {"tensor_types": ("ffn_down=q6_k", "attn_.*=q5_k"), "pins": ("^output.weight$=q8_0", "x=q4_k")},
        "Q4_K_M --tensor-type ffn_down=q6_k --tensor-type attn_.*=q5_k --tensor-type ^output.weight$=q8_0 --tensor-type x=q4_k",
    ),
    ({"tensor_type_file": Path("/types.txt")}, "Q4_K_M --tensor-type-file sha256:1"),
    ({"prune_layers": "1,3"}, "Q4_K_M --prune-layers 1,3"),
    (
        {"override_kv": ("general.name=str:a b", "x=int:1")},
        "Q4_K_M --override-kv general.name=str:a b --override-kv x=int:1",
    ),
    ({"max_buffer_size": 512}, "Q4_K_M"),
    (
        {
            "allow_requantize": True,
            "leave_output_tensor": True,
            "pure": True,
            "keep_split": True,
            "exclude_weights": ("ffn", "attn_q"),
            "output_tensor_type": "q8_0",
            "token_embedding_type": "q6_k",
            "tensor_types": ("ffn_down=q6_k", "attn_.*=q5_k"),
            "tensor_type_file": Path("/types.txt"),
            "prune_layers": "1,3",
            "override_kv": ("general.name=str:a b",),
            "max_buffer_size": 512,
            "pins": ("^output.weight$=q8_0",),
        },
        (
            "Q4_K_M --allow-requantize --leave-output-tensor --pure --keep-split --exclude-weights ffn "
            "--exclude-weights attn_q --tensor-type ffn_down=q6_k --tensor-type attn_.*=q5_k "
            "--override-kv general.name=str:a b --output-tensor-type q8_0 "
            "--token-embedding-type q6_k --prune-layers 1,3 --tensor-type ^output.weight$=q8_0 --tensor-type-file sha256:1"
        ),
    ),
]


def inputs_of(request: ImatrixRequest) -> dict[str, str]:
    corpus = cast(Corpus, SimpleNamespace(name="my text.txt", sha256="c", built=None))
    engine = cast(Engine, SimpleNamespace(arithmetic=lambda: "e"))
    return imatrix_inputs(request, corpus, cast(Frozen, SimpleNamespace(fingerprint="f")), engine)


@pytest.mark.parametrize(("options", "imatrix", "figures", "answers"), COMPUTE)
def test_how_something_is_computed_is_written_as_in_old_journals(
    options: dict[str, Any], imatrix: str, figures: str, answers: str
) -> None:
    made = CollectOptions(**options)
    assert fingerprint_of(made, "imatrix") == imatrix
    assert inputs_of(ImatrixRequest(options=made))["options"] == f"{imatrix} name my text.txt"
    assert " ".join(filter(None, words_of(made, "imatrix"))) == imatrix
    assert fingerprint_of(made, "figures") == figures
    assert fingerprint_of(made, "answers") == answers


@pytest.mark.parametrize(("options", "text"), CHUNKS)
def test_which_chunks_are_collected_is_written_as_in_old_journals(options: dict[str, Any], text: str) -> None:
    assert inputs_of(ImatrixRequest(**options)) == {
        "model file": "f",
        "calibration text": "sha256:c",
        "context": "512",
        "chunks": text,
        "options": "-b 2048 -ub 512 name my text.txt",
        "engine": "e",
    }


@pytest.mark.parametrize(("options", "text"), LEVELS)
def test_how_a_level_is_made_is_written_as_in_old_journals(options: dict[str, Any], text: str) -> None:
    further = "--tensor-type-file sha256:1" if "tensor_type_file" in options else ""
    level, made = Level("Q4_K_M", "Q4_K_M"), QuantizeOptions(**options)
    assert level_inputs(level, made, source="s", imatrix="i", engine="e", further=further)["options"] == text
    words = quantize_options(replace(made, max_buffer_size=None, tensor_type_file=None))
    assert fingerprint_of(made, "level") == " ".join(words)  # spelt as llama-quantize is told them


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (QuantizeOptions(split_max_size=48_000), "--split-max-size 48000M"),
        (QuantizeOptions(split_max_tensors=128), "--split-max-tensors 128"),
    ],
)
def test_how_a_level_is_cut_counts_and_can_be_left_out(options: QuantizeOptions, text: str) -> None:
    assert fingerprint_of(options, "level") == fingerprint_of(options, "content") == text
    assert fingerprint_of(options.unsplit, "level") == fingerprint_of(options.unsplit, "content") == ""
    assert not quantize_options(options)  # they are llama-gguf-split's, not llama-quantize's


def test_what_a_level_of_known_types_holds_depends_on_no_option_that_chooses_types() -> None:
    options = QuantizeOptions(**LEVELS[-1][0])
    content = (
        "--keep-split --exclude-weights ffn --exclude-weights attn_q --override-kv general.name=str:a b --prune-layers 1,3"
    )
    assert fingerprint_of(options, "content") == content
    assert fingerprint_of(QuantizeOptions(pure=True, tensor_types=("a=q8_0",)), "content") == ""


def test_how_long_answers_are_is_written_as_in_old_journals() -> None:
    assert fingerprint_of(DomainRequest(Path("p")), "answers") == "--predict 128"
    assert fingerprint_of(DomainRequest(Path("p"), 1, chat_template=Path("t"), again=True), "answers") == "--predict 1"


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("type_", "default", "other"),
    [(bool, False, True), (bool, True, False), (int, 0, 1), (str, "a", ""), (tuple, ("a",), ()), (float, None, 0.0)],
)
def test_a_field_that_is_added_counts_and_leaves_finished_work_valid(
    kind: type[Any], result: Result, type_: type, default: object, other: object
) -> None:
    given = {"prompts": Path("p")} if kind is DomainRequest else {}
    wider = make_dataclass("Wider", [("added", type_, field(default=default))], bases=(kind,), frozen=True)
    before = fingerprint_of(kind(**given), result)
    assert fingerprint_of(wider(**given), result) == before
    assert fingerprint_of(wider(**given, added=other), result) != before


def test_a_field_without_a_default_counts_at_every_value() -> None:
    kind = make_dataclass("Kind", [("layers", int), ("path", list, field(default_factory=list))], frozen=True)
    assert [fingerprint_of(kind(number), "level") for number in (0, 1)] == ["layers=0", "layers=1"]
    assert fingerprint_of(kind(0, []), "level") == fingerprint_of(kind(0), "level") != fingerprint_of(kind(0, [1]), "level")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_says_how_it_counts_or_why_it_does_not(kind: type[Any]) -> None:
    """None of those that are there is left to the form for fields that nobody thought of."""
    mine = {
        CollectOptions: ("imatrix", "figures", "answers"),
        QuantizeOptions: ("level", "content"),
        ImatrixRequest: ("imatrix",),
    }
    for each in fields(kind):
        reasons = [each.metadata.get(result) for result in mine.get(kind, ("answers",))]
        assert {*spelt("x")} <= {*each.metadata} or all(reasons), each.name
