"""What the command line accepts and would not heed is told with the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.toolchain.probe import Toolchain
from support.in_process import CommandLine
from support.tiny_models import write_llama_gguf

SHORT = ("-c", "128", "--dry-run", "--levels", "Q4_K_M")


def warnings(cli: CommandLine, *arguments: str | Path) -> list[str]:
    ran = cli(*arguments)
    assert ran.code == 0, ran.err
    return [line.removeprefix("Warning: ") for line in ran.err.splitlines() if line.startswith("Warning: ")]


def test_patterns_are_judged_by_what_llama_cpp_makes_of_them(cli: CommandLine, tiny_model: Path) -> None:
    """ffn_down is Q6_K at Q6_K whether asked for or not; Q4_K_M differs, so together they need no word."""
    arguments = ("run", tiny_model, "--imatrix", "none", "--dry-run", "--tensor-type", "ffn_down=q6_k")
    (text,) = warnings(cli, *arguments, "--levels", "Q6_K")
    assert text == "--tensor-type ffn_down=q6_k changes nothing: Q6_K has Q6_K there anyway."
    assert warnings(cli, *arguments, "--levels", "Q6_K,Q4_K_S") == []
    (text,) = warnings(cli, *arguments[:-1], "ffn_norm=q8_0", "--levels", "Q6_K")
    assert "llama.cpp keeps blk.0.ffn_norm.weight, blk.1.ffn_norm.weight as F32" in text


def test_patterns_of_a_file_are_judged_too(cli: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "types.txt").write_text("FFN_DOWN=q8_0\nffn_dwon=q8_0\nffn_down=q5_k\n", encoding="utf-8")
    found = warnings(cli, "run", tiny_model, "--imatrix", "none", *SHORT, "--tensor-type-file", "types.txt")
    assert found == [
        "--tensor-type-file: ffn_dwon=q8_0 matches no tensor of this model. Did you mean ffn_down?",
        "--tensor-type-file: ffn_down=q5_k has no effect: ffn_down=q8_0 comes first and matches the same tensors.",
    ]


def test_patterns_match_the_names_after_pruning(cli: CommandLine, tiny_model: Path) -> None:
    """Without layer 0, layer 1 becomes blk.0, and there is no blk.1."""
    arguments = ("run", tiny_model, "--imatrix", "none", *SHORT, "--prune-layers", "0", "--tensor-type")
    assert warnings(cli, *arguments, r"blk\.0\.ffn_down=q8_0") == []
    (text,) = warnings(cli, *arguments, r"blk\.1\.ffn_down=q8_0")
    assert "matches no tensor" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--chunks", "100000"), "only 52 chunks of 128 tokens; 100000 were asked for"),
        (("--chunks", "4", "--save-frequency", "50"), "--save-frequency 50 leaves no snapshot: 4 chunks are computed"),
        (("--min-expert-tokens", "5"), "this model has no experts"),
        (("--jobs", "2"), "all levels are made in one pass"),
        (("--outtype", "bf16", "--mmproj"), "--outtype, --mmproj have no effect: the model is a GGUF"),
        (("--max-disk", "1GiB"), "--max-disk has no effect: nothing is measured without --evaluate"),
        (("--predict", "5"), "--predict has no effect: nothing is answered without --domain"),
        (("-ngl", "7", "-ts", "1,2"), "-ngl 7, -ts 1,2 have no effect: llama-cpp-python sees no GPU"),
        (("-ot", "atn_q=CPU,ffn_down=CPU"), "-ot atn_q=CPU matches no tensor of this model. Did you mean attn_q?"),
    ],
)
def test_options_of_a_run(cli: CommandLine, tiny_model: Path, tiny_text: Path, options: tuple[str, ...], said: str) -> None:
    (text,) = [line for line in warnings(cli, "run", tiny_model, "-f", tiny_text, *SHORT, *options) if "noisy" not in line]
    assert said in text


def test_how_to_collect_matters_only_where_something_is_collected(
    cli: CommandLine, tiny_model: Path, tiny_imatrix: Path, tiny_text: Path
) -> None:
    (text,) = warnings(cli, "run", tiny_model, *SHORT, "--imatrix", "none", "--chunks", "5", "-f", tiny_text)
    assert text == "-f, --chunks have no effect: no imatrix is used (not wanted (--imatrix none))"
    (text,) = warnings(cli, "run", tiny_model, *SHORT, "--imatrix", tiny_imatrix, "--parse-special")
    assert text == "--parse-special has no effect: imatrix.gguf is used as it is (given with --imatrix)"
    assert warnings(cli, "run", tiny_model, *SHORT, "--imatrix", tiny_imatrix) == []


def test_mixes_are_measured_on_the_text_whatever_the_imatrix(
    cli: CommandLine, tiny_model: Path, tiny_imatrix: Path, tiny_text: Path
) -> None:
    arguments = ("run", tiny_model, "-f", tiny_text, "--parse-special", "-c", "128", "--dry-run", "--imatrix")
    assert warnings(cli, *arguments, "none", "--like", "Q4_K_M") == []
    assert warnings(cli, *arguments, tiny_imatrix, "--size", "900KiB") == []
    (text,) = warnings(cli, *arguments, "none", "--levels", "MIX@kld:0.5", "--chunks", "5")
    assert text == "--chunks has no effect: no imatrix is used (not wanted (--imatrix none))"


def test_a_missing_text_of_a_mix_is_noticed_before_the_model_is_opened(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "broken-BF16.gguf").write_bytes(b"GGUF")
    done = cli("run", tmp_path / "broken-BF16.gguf", "--imatrix", "none", "--like", "Q4_K_M", "-f", "nowhere.txt")
    assert done.code == 6, done.err
    assert "nowhere.txt: No such file or directory" in done.err


def test_an_output_tensor_that_is_not_there(cli: CommandLine, tmp_path: Path, tiny_text: Path) -> None:
    model = write_llama_gguf(tmp_path / "tied-BF16.gguf", tied=True)
    found = warnings(cli, "run", model, "-f", tiny_text, *SHORT, "--process-output", "--leave-output-tensor")
    assert any(line.startswith("--process-output has no effect") for line in found)
    assert any("--token-embedding-type bf16" in line for line in found)


def test_options_of_the_pass_mean_nothing_to_llama_cpp_s_programs(
    cli: CommandLine, tiny_model: Path, tiny_imatrix: Path, toolchain: Toolchain
) -> None:
    arguments = ("run", tiny_model, *SHORT, "--imatrix", tiny_imatrix, "--llama-cpp", toolchain.directory)
    (text,) = warnings(cli, *arguments, "--one-by-one", "--kernels", "ggml", "--jobs", "2")
    assert text.startswith("--one-by-one, --kernels ggml have no effect: llama.cpp's own program")
