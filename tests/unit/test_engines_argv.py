"""The exact argument lists: what a program is told is a contract with llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import ChunkRange, CollectJob, CollectOptions, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.llama_cpp.flags import (
    imatrix_command,
    quantize_command,
    quantize_options,
    require_splitter,
    split_words,
    tokenize_command,
)
from imatrix_runner.errors import ToolchainError, UsageError
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.usage import Usage
from support.values import fake_toolchain

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
    knows = fake_toolchain(options={"llama-tokenize": frozenset(("-f", "--no-escape"))})
    assert "--no-escape" in tokenize_command(Path("/m"), Path("/t"), knows, parse_special=False).argv


# Releases of 2024 and forks take other options, or take them otherwise

FIXED = ("-m", "-f", "-o", "--output-frequency", "--chunk", "--chunks", "-c", "-b", "-ub")
"""What every llama-imatrix is told first, each with a value."""


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (QuantizeOptions(split_max_size=48_000), ("--split-max-size", "48000M")),
        (QuantizeOptions(split_max_tensors=9), ("--split-max-tensors", "9")),
    ],
    ids=["size", "tensors"],
)
def test_cutting_a_level(options: QuantizeOptions, limit: tuple[str, str]) -> None:
    assert split_words(replace(QUANTIZE, options=options)) == ("--split", *limit, "/out/o.gguf", "/out/o")


def test_levels_cannot_be_cut_without_the_program() -> None:
    require_splitter(QuantizeOptions(), OLD)
    lacking = replace(OLD, tools={name: path for name, path in OLD.tools.items() if name != "llama-gguf-split"})
    with pytest.raises(ToolchainError, match="cannot be cut into shards") as caught:
        require_splitter(QuantizeOptions(split_max_size=1), lacking)
    assert "--engine embedded" in caught.value.todo
    older = replace(OLD, options={**OLD.options, "llama-gguf-split": frozenset(("--split-max-tensors",))})
    require_splitter(QuantizeOptions(split_max_tensors=1), older)
    with pytest.raises(UsageError, match="has no --split-max-size"):
        require_splitter(QuantizeOptions(split_max_size=1), older)


OLD_USAGE = Usage(frozenset(("-fa", "--no-mmap")), escapes=True, named_layers=False)
OLD = fake_toolchain(
    options={
        "llama-imatrix": frozenset(("-c", "-ngl", "-fa", "--verbosity", "--no-escape", "--no-mmap")),
        "llama-quantize": frozenset(("--imatrix", "--output-tensor-type", "--token-embedding-type", "--include-weights")),
        "llama-tokenize": frozenset(("-m", "-f", "--ids")),
    },
    usage={"llama-imatrix": OLD_USAGE},
)


@pytest.mark.parametrize(
    ("options", "argv"),
    [
        (CollectOptions(), ["--no-escape"]),
        (CollectOptions(n_gpu_layers="all"), ["-ngl", "999", "--no-escape"]),
        (CollectOptions(n_gpu_layers="auto"), ["--no-escape"]),
        (CollectOptions(n_gpu_layers="20"), ["-ngl", "20", "--no-escape"]),
        (CollectOptions(flash_attn="on"), ["--no-escape", "-fa"]),
        (CollectOptions(flash_attn="off"), ["--no-escape"]),
        (CollectOptions(mmap=False), ["--no-escape", "--no-mmap"]),
        (CollectOptions(ppl=False), ["--no-escape", "--no-ppl", "--verbosity", "2"]),
    ],
    ids=str,
)
def test_an_old_release_is_told_in_its_own_words(options: CollectOptions, argv: list[str]) -> None:
    assert collect_argv(options, OLD)[1 + 2 * len(FIXED) :] == argv


@pytest.mark.parametrize(
    ("knows", "first", "output"), [((), "--from-chunk", "-ow"), (("--chunk", "--process-output"), "--chunk", "")]
)
def test_options_that_the_help_of_before_june_2024_does_not_list(knows: tuple[str, ...], first: str, output: str) -> None:
    tools = fake_toolchain(options={"llama-imatrix": frozenset(("-c", *knows))})
    argv = collect_argv(CollectOptions(process_output=True), tools)
    assert argv[argv.index("10") - 1] == first
    assert argv[1 + 2 * len(FIXED) :] == ([output, "1"] if output else ["--process-output"])


def test_a_tokenizer_that_reads_no_files_cannot_count() -> None:
    tools = fake_toolchain(options={"llama-tokenize": frozenset(("--ids",))})
    with pytest.raises(ToolchainError, match="cannot count the tokens of a text"):
        tokenize_command(Path("/m"), Path("/t"), tools, parse_special=False)


def test_special_tokens_are_refused_where_the_collector_cannot_parse_them() -> None:
    with pytest.raises(UsageError, match="This llama-imatrix has no --parse-special"):
        collect_argv(CollectOptions(parse_special=True), OLD)


def test_a_tokenizer_that_cannot_leave_special_tokens_alone_is_not_asked_to() -> None:
    argv = tokenize_command(Path("/m"), Path("/t"), OLD, parse_special=False).argv
    assert argv[1:] == ("-m", "/m", "-f", "/t", "--ids")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (QuantizeOptions(tensor_types=("attn_q=q6_k",)), "--tensor-type"),
        (QuantizeOptions(pins=("^blk=q6_k",)), "--tensor-type"),
        (QuantizeOptions(prune_layers="1"), "--prune-layers"),
        (QuantizeOptions(keep_split=True), "--keep-split"),
        (QuantizeOptions(tensor_type_file=Path("/types")), "--tensor-type-file"),
        (QuantizeOptions(exclude_weights=("attn",)), "--exclude-weights"),
    ],
    ids=str,
)
def test_what_an_old_quantizer_cannot_do_is_refused(options: QuantizeOptions, name: str) -> None:
    with pytest.raises(UsageError, match=f"This llama-quantize has no {name}:") as caught:
        quantize_command(replace(QUANTIZE, options=options), OLD)
    assert "tools build" in caught.value.todo


def test_an_old_quantizer_is_given_types_in_ggmls_own_case_and_no_limit_of_its_buffer() -> None:
    options = QuantizeOptions(output_tensor_type="q6_k", token_embedding_type="Q8_0", max_buffer_size=64)
    argv = quantize_command(replace(QUANTIZE, options=options), OLD).argv
    assert argv[1:5] == ("--output-tensor-type", "q6_K", "--token-embedding-type", "q8_0")
    assert "--max-buffer-size" not in argv


def test_a_forks_own_name_for_types_of_tensors() -> None:
    ik = fake_toolchain(options={"llama-quantize": frozenset(("--imatrix", "--custom-q"))})
    options = QuantizeOptions(tensor_types=(r"blk\.0\.attn=q6_k", "ffn_down=iq4_k"))
    argv = quantize_command(replace(QUANTIZE, options=options), ik).argv
    assert argv[1:5] == ("--custom-q", r"blk\.0\.attn=q6_K", "--custom-q", "ffn_down=iq4_k")


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
