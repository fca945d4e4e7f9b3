"""The exact argument lists: what a program is told is a contract with llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from values import fake_toolchain

from imatrix_runner.engines.base import ChunkRange, CollectJob, CollectOptions, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.binaries.argv import imatrix_command, quantize_command, quantize_options, tokenize_command
from imatrix_runner.errors import ToolchainError, UsageError
from imatrix_runner.toolchain.probe import Toolchain

CPU = fake_toolchain()
GPU = fake_toolchain(devices=("CUDA0: a GPU",), backends=("cpu", "cuda"))
CHUNKS = ChunkRange(10, 20)
COLLECT = CollectJob("imatrix", Path("/m.gguf"), Path("/t.txt"), (CHUNKS,), Path("/parts"), CollectOptions(), "", None)
OUT = Path("/parts/o.gguf")
QUANTIZE = QuantizeJob("level", Path("/m.gguf"), Path("/out/o.gguf"), "Q4_K_M", QuantizeOptions(), None, None, None)


def collect_argv(options: CollectOptions, tools: Toolchain = CPU) -> list[str]:
    return list(imatrix_command(replace(COLLECT, options=options), CHUNKS, OUT, tools).argv)


def test_collecting_one_range() -> None:
    assert collect_argv(CollectOptions()) == [
        *("/tools/llama-imatrix", "-m", "/m.gguf", "-f", "/t.txt", "-o", "/parts/o.gguf"),
        *("--output-frequency", "1000000000", "--chunk", "10", "--chunks", "20"),
        *("-c", "512", "-b", "2048", "-ub", "512", "-fit", "off"),
    ]


def test_collecting_with_everything() -> None:
    options = CollectOptions(
        n_ctx=256,
        n_batch=1024,
        n_ubatch=128,
        threads=3,
        n_gpu_layers="99",
        parse_special=True,
        process_output=True,
        ppl=False,
        extra=("-ts", "3,1"),
    )
    assert collect_argv(options, GPU)[7:] == [
        *("--output-frequency", "1000000000", "--chunk", "10", "--chunks", "20"),
        *("-c", "256", "-b", "1024", "-ub", "128", "-t", "3", "-ngl", "99", "-fit", "off"),
        *("--parse-special", "--process-output", "--no-ppl", "-lv", "5", "-ts", "3,1"),
    ]


def test_periodic_output_is_never_zero_because_that_divides_by_zero() -> None:
    argv = collect_argv(CollectOptions())
    assert int(argv[argv.index("--output-frequency") + 1]) > 10**8
    assert "-ofreq" not in argv
    assert "--save-frequency" not in argv  # llama-imatrix's own snapshots are torn


@pytest.mark.parametrize(
    ("tools", "layers", "fitted"),
    [
        (CPU, "", False),  # nothing to fit: loading twice would only cost time
        (CPU, "99", False),
        (GPU, "", True),
        (GPU, "auto", True),
        (GPU, "all", False),
        (GPU, "20", False),
        (GPU, "0", False),
    ],
)
def test_layers_are_fitted_to_memory_only_where_nobody_chose(tools: Toolchain, layers: str, fitted: bool) -> None:
    assert ("-fit" not in collect_argv(CollectOptions(n_gpu_layers=layers), tools)) is fitted


def test_an_older_program_is_not_told_what_it_does_not_know() -> None:
    assert "-fit" not in collect_argv(CollectOptions(), fake_toolchain(options={"llama-imatrix": frozenset(("-c",))}))


def test_a_fit_given_by_the_user_is_not_overruled() -> None:
    assert collect_argv(CollectOptions(extra=("-fit", "on")))[-2:] == ["-fit", "on"]
    assert collect_argv(CollectOptions(extra=("-fit", "on"))).count("-fit") == 1


KNOWING = fake_toolchain(options={"llama-imatrix": frozenset(("-ts", "-sm", "-mg", "-ot", "-fa", "-lm", "--load-mode"))})


def test_where_things_go_is_told_in_llama_cpps_words() -> None:
    options = CollectOptions(
        tensor_split="3,1",
        split_mode="row",
        main_gpu=0,
        override_tensors=("ffn_.*_exps=CPU", r"blk\.1\.=CUDA1"),
        flash_attn="off",
        mmap=False,
    )
    assert collect_argv(options, KNOWING)[19:] == [
        *("-ts", "3,1", "-sm", "row", "-mg", "0", "-ot", "ffn_.*_exps=CPU", "-ot", r"blk\.1\.=CUDA1", "-fa", "off"),
        *("--load-mode", "none"),
    ]


@pytest.mark.parametrize(
    ("spellings", "argv"), [(("--no-mmap",), ["--no-mmap"]), (("--no-mmap", "--load-mode"), ["--no-mmap"])]
)
def test_an_older_program_is_told_in_its_own_words_not_to_map(spellings: tuple[str, ...], argv: list[str]) -> None:
    tools = fake_toolchain(options={"llama-imatrix": frozenset(spellings)})
    assert collect_argv(CollectOptions(mmap=False), tools)[-1:] == argv


def test_weights_are_left_as_they_are_only_where_that_is_asked_for() -> None:
    tools = fake_toolchain(options={"llama-imatrix": frozenset({"--no-repack"})})
    assert collect_argv(CollectOptions(repack=False), tools)[-1:] == ["--no-repack"]
    assert "--no-repack" not in collect_argv(CollectOptions(), tools)


@pytest.mark.parametrize(
    "options",
    [
        CollectOptions(tensor_split="1,1"),
        CollectOptions(split_mode="layer"),
        CollectOptions(main_gpu=1),
        CollectOptions(override_tensors=("a=CPU",)),
        CollectOptions(flash_attn="on"),
        CollectOptions(mmap=False),
        CollectOptions(repack=False),
    ],
    ids=str,
)
def test_an_option_that_a_fork_lacks_is_refused_before_anything_starts(options: CollectOptions) -> None:
    with pytest.raises(UsageError, match="This llama-imatrix has no -") as caught:
        collect_argv(options)
    assert "1.2.3" in caught.value.why


def test_tokenising_prints_ids_only() -> None:
    argv = tokenize_command(Path("/m.gguf"), Path("/t.txt"), CPU, parse_special=False).argv
    assert argv == ("/tools/llama-tokenize", "-m", "/m.gguf", "-f", "/t.txt", "--ids", "--no-parse-special")
    assert "--no-parse-special" not in tokenize_command(Path("/m"), Path("/t"), CPU, parse_special=True).argv


def test_tokenising_reads_backslashes_as_the_collector_does() -> None:
    knows = fake_toolchain(options={"llama-tokenize": frozenset(("--no-escape",))})
    assert "--no-escape" in tokenize_command(Path("/m"), Path("/t"), knows, parse_special=False).argv


def test_quantising_without_an_imatrix() -> None:
    command = quantize_command(QUANTIZE, CPU)
    assert command.argv == ("/tools/llama-quantize", "/m.gguf", "/out/o.gguf", "Q4_K_M")
    assert command.cwd is None


def test_the_imatrix_is_named_without_its_folder_because_its_name_ends_up_in_the_output() -> None:
    command = quantize_command(replace(QUANTIZE, imatrix=Path("/home/me/secret/imatrix.gguf"), threads=4), CPU)
    assert command.argv == ("/tools/llama-quantize", "--imatrix", "imatrix.gguf", "/m.gguf", "/out/o.gguf", "Q4_K_M", "4")
    assert command.cwd == Path("/home/me/secret")


def test_a_dry_run_names_no_output() -> None:
    argv = quantize_command(QUANTIZE, CPU, dry_run=True).argv
    assert argv == ("/tools/llama-quantize", "--dry-run", "/m.gguf", "Q4_K_M")


def test_every_quantize_option_in_a_fixed_order_before_the_positionals() -> None:
    options = QuantizeOptions(
        allow_requantize=True,
        leave_output_tensor=True,
        pure=True,
        keep_split=True,
        exclude_weights=("ffn", "attn_q"),
        output_tensor_type="q8_0",
        token_embedding_type="q6_k",
        tensor_types=("ffn_down=q6_k", r"attn_.*=q5_k"),
        tensor_type_file=Path("/types.txt"),
        prune_layers="1,3",
        override_kv=("general.name=str:a b",),
        max_buffer_size=512,
        pins=("^output.weight$=q8_0",),
    )
    expected = [
        *("--allow-requantize", "--leave-output-tensor", "--pure", "--keep-split"),
        *("--exclude-weights", "ffn", "--exclude-weights", "attn_q"),
        *("--tensor-type", "ffn_down=q6_k", "--tensor-type", r"attn_.*=q5_k", "--override-kv", "general.name=str:a b"),
        *("--output-tensor-type", "q8_0", "--token-embedding-type", "q6_k", "--tensor-type-file", "/types.txt"),
        *("--prune-layers", "1,3", "--max-buffer-size", "512"),
        *("--tensor-type", "^output.weight$=q8_0"),  # ours come last: the first match wins
    ]
    assert quantize_options(options) == expected
    argv = quantize_command(replace(QUANTIZE, options=options, threads=2), CPU).argv
    assert list(argv) == ["/tools/llama-quantize", *expected, "/m.gguf", "/out/o.gguf", "Q4_K_M", "2"]


def test_included_weights_have_their_own_option() -> None:
    assert quantize_options(QuantizeOptions(include_weights=("ffn",))) == ["--include-weights", "ffn"]


def test_no_option_no_word() -> None:
    assert quantize_options(QuantizeOptions()) == []


def test_a_missing_program_is_told_before_anything_starts() -> None:
    with pytest.raises(ToolchainError, match="llama-imatrix is not part"):
        imatrix_command(COLLECT, CHUNKS, OUT, fake_toolchain(tools={}))
