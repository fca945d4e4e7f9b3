"""Every option of llama-quantize, through us and bare: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.models.gguf_file import read_header
from support.command_line import RunCommand
from support.in_process import CommandLine
from support.llama_tools import BareTools, digest, levels_in
from support.oracles import quantized
from support.tiny_models import write_llama_gguf


@pytest.mark.parametrize(
    "options",
    [
        ["--pure"],
        ["--leave-output-tensor"],
        ["--output-tensor-type", "q8_0"],
        ["--token-embedding-type", "q5_k"],
        ["--tensor-type", "ffn_down=q8_0", "--tensor-type", "attn_(q|k)=q5_k"],
        ["--override-kv", "general.name=str:another", "--override-kv", "llama.context_length=int:512"],
        ["--prune-layers", "0"],
        ["--include-weights", "ffn_"],
        ["--exclude-weights", "attn_v", "--exclude-weights", "blk.1."],
        ["--max-buffer-size", "1"],
    ],
    ids=" ".join,
)
def test_an_option_gives_the_bytes_of_the_bare_tool(
    options: list[str], tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_K_M", *options)
    assert done.code == 0, done.err
    bare = tools.quantize(tiny_model, tmp_path / "bare.gguf", "Q4_K_M", *options, imatrix=tiny_imatrix)
    assert levels_in(tmp_path / "work" / "tiny") == {"Q4_K_M": digest(bare)}


def test_tensor_types_from_a_file(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    types = tmp_path / "types.txt"
    types.write_text("ffn_down=q8_0\nattn_v=q6_k\n", encoding="utf-8")
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_K_M", "--tensor-type-file", "types.txt")
    assert runner(*arguments).code == 0
    bare = tools.quantize(tiny_model, tmp_path / "bare.gguf", "Q4_K_M", "--tensor-type-file", str(types), imatrix=tiny_imatrix)
    assert levels_in(tmp_path / "work" / "tiny") == {"Q4_K_M": digest(bare)}
    assert "1 was up to date" in runner(*arguments).out
    types.write_text("ffn_down=q8_0\n", encoding="utf-8")
    changed = runner(*arguments)
    assert "Q4_K_M made again, changed: options: Q4_K_M --tensor-type-file sha256:" in changed.err


def test_variants_are_two_overrides_and_explicit_options_win(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    levels = {"Q4_K_L": "Q4_K_M", "Q3_K_XL": "Q3_K_L", "Q2_K_L": "Q2_K"}
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", ",".join(levels))
    assert runner(*arguments).code == 0

    def bare(ftype: str, output: str) -> str:
        types = ("--token-embedding-type", "q8_0", "--output-tensor-type", output)
        return quantized(tools, tiny_model, ftype, *types, imatrix=tiny_imatrix).digests[0]

    assert levels_in(tmp_path / "work" / "tiny") == {name: bare(ftype, "q8_0") for name, ftype in levels.items()}
    assert runner(*arguments, "--output-tensor-type", "q6_k").code == 0
    assert levels_in(tmp_path / "work" / "tiny") == {name: bare(ftype, "q6_k") for name, ftype in levels.items()}


def test_every_alias_and_plain_type_is_a_level(tiny_model: Path, runner: RunCommand, tools: BareTools, tmp_path: Path) -> None:
    """Without an imatrix; aliases are files of the full name; F16 is a conversion."""
    done = runner("run", tiny_model, "--imatrix", "none", "--levels", "q4_k,Q3_K,F16,TQ2_0,MXFP4_MOE")
    assert done.code == 0, done.err
    expected = {name: quantized(tools, tiny_model, name).digests[0] for name in ("Q4_K_M", "Q3_K_M", "F16")}
    written = levels_in(tmp_path / "work" / "tiny")
    assert written.keys() == {*expected, "TQ2_0", "MXFP4_MOE"}
    assert {name: written[name] for name in expected} == expected


@pytest.fixture(scope="module")
def shards(tools: BareTools, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tools.split(tiny_model, tmp_path_factory.mktemp("shards") / "tiny-BF16", 8)


def test_a_split_source_gives_one_file_or_as_many_shards(
    shards: list[Path], tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    """Any shard may be named; changing one's mind back and forth leaves only what was asked for last."""
    assert len(shards) == 3
    arguments = ("run", shards[1], "--imatrix", tiny_imatrix, "--levels", "Q4_K_M")
    workspace = tmp_path / "work" / "tiny"
    tools.quantize(shards[0], tmp_path / "bare" / "tiny-Q4_K_M.gguf", "Q4_K_M", imatrix=tiny_imatrix)
    tools.quantize(shards[0], tmp_path / "parts" / "tiny-Q4_K_M.gguf", "Q4_K_M", "--keep-split", imatrix=tiny_imatrix)
    whole, parts = ({path.name: digest(path) for path in (tmp_path / name).iterdir()} for name in ("bare", "parts"))
    assert sorted(parts) == [f"tiny-Q4_K_M-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for options, expected in (([], whole), (["--keep-split"], parts), ([], whole)):
        done = runner(*arguments, *options, "--json")
        assert done.code == 0, done.err
        assert {path.name: digest(path) for path in workspace.glob("*.gguf")} == expected
        (level,) = done.document["levels"]
        assert [Path(file).name for file in level["files"]] == sorted(expected)
        assert level["bytes"] == sum(path.stat().st_size for path in workspace.glob("*.gguf"))
        assert "1 was up to date" in runner(*arguments, *options).out


def test_a_quantised_source_needs_permission(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    source = tools.quantize(tiny_model, tmp_path / "small.gguf", "Q8_0")
    arguments = ("run", source, "--imatrix", tiny_imatrix, "--levels", "Q4_K_M")
    refused = runner(*arguments)
    assert refused.code == 6
    assert "--allow-requantize" in refused.err
    assert runner(*arguments, "--allow-requantize").code == 0
    bare = tools.quantize(source, tmp_path / "bare.gguf", "Q4_K_M", "--allow-requantize", imatrix=tiny_imatrix)
    assert levels_in(tmp_path / "work" / "small") == {"Q4_K_M": digest(bare)}


def test_a_mixture_of_experts_with_its_imatrix(tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "moe-BF16.gguf", experts=4, tied=True)
    arguments = ("run", model, "-f", tiny_text, "-c", "128", "--chunks", "8", "--levels", "Q4_K_M,IQ3_XXS")
    assert runner(*arguments).code == 0
    workspace = tmp_path / "work" / "moe"
    imatrix = workspace / "imatrix.gguf"
    bare = {name: quantized(tools, model, name, imatrix=imatrix).digests[0] for name in ("Q4_K_M", "IQ3_XXS")}
    assert levels_in(workspace) == bare


def test_jobs_and_threads_change_no_byte(tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
    found = []
    for number, options in enumerate((["--jobs", "1", "-t", "1"], ["--jobs", "3", "-t", "2"])):
        arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_K_M,Q5_K_S,Q6_K", *options)
        assert runner(*arguments, "--work-dir", f"work{number}").code == 0
        found.append(levels_in(tmp_path / f"work{number}" / "tiny"))
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_experts_published_in_mxfp4_are_kept_with_the_option_that_is_offered(cli: CommandLine, tmp_path: Path) -> None:
    """As gpt-oss has them: there is no better original to point to."""
    made = write_llama_gguf(tmp_path / "moe-BF16.gguf", layers=1, experts=4)
    native = ("--tensor-type", "_exps=mxfp4", "--tensor-type", ".=bf16")
    assert cli("quantize", made, "--levels", "Q4_K_M", "--imatrix", "none", *native).code == 0
    source = (tmp_path / "work" / "moe" / "moe-Q4_K_M.gguf").rename(tmp_path / "oss.gguf")
    arguments = ("quantize", source, "--levels", "Q4_K_M", "--imatrix", "none")
    refused = cli(*arguments)
    assert refused.code == 6
    assert "is MXFP4, as the model was published, and would become" in refused.err
    assert "Keep such tensors with --tensor-type _exps=mxfp4" in refused.err
    kept = cli(*arguments, "--tensor-type", "_exps=mxfp4")
    assert kept.code == 0, kept.err
    types = {tensor.name: tensor.type_name for tensor in read_header(tmp_path / "work" / "oss" / "oss-Q4_K_M.gguf").tensors}
    assert {kind for name, kind in types.items() if "_exps" in name} == {"MXFP4"}
    assert types["blk.0.attn_k.weight"] == "Q4_K"
