"""The header reader on what llama.cpp's own tools write: quantised files, split sets, dry remains of a killed run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import expected_file_size, read_header
from imatrix_runner.models.model import open_gguf
from imatrix_runner.toolchain.locate import locate
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.tiny_models import sample_text, write_llama_gguf


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    """The llama.cpp that the program itself would find."""
    found = locate(None, env=os.environ, cache=cache_dir()).toolchain
    if found is None:
        pytest.skip("no llama.cpp was found")
    return found


def call(tool: Path, *arguments: object) -> None:
    subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "details",
    [{}, {"experts": 4}, {"tied": True, "dtype": "f16"}, {"odd": True, "dtype": "f32"}],
    ids=lambda details: "-".join(details),
)
def test_tiny_models_are_real(toolchain: Toolchain, tmp_path: Path, details: dict[str, object]) -> None:
    model = write_llama_gguf(tmp_path / "tiny.gguf", layers=1, **details)  # type: ignore[arg-type]
    (tmp_path / "text.txt").write_text(sample_text(4000))
    imatrix, out = tmp_path / "imatrix.gguf", tmp_path / "q.gguf"
    call(
        toolchain.tool("llama-imatrix"),
        "-m",
        model,
        "-f",
        tmp_path / "text.txt",
        "-o",
        imatrix,
        "-c",
        64,
        "-b",
        64,
        "--chunks",
        4,
    )
    call(toolchain.tool("llama-quantize"), "--imatrix", imatrix, model, out, "Q4_K_M", 1)
    quantised, source = read_header(out), read_header(model)
    assert expected_file_size(quantised) == quantised.file_size
    assert {tensor.name: tensor.shape for tensor in quantised.tensors} == {
        tensor.name: tensor.shape for tensor in source.tensors
    }
    # Only a width that is no multiple of 256 makes ffn_down fall back from Q6_K to Q8_0.
    assert ("Q8_0" in {tensor.type_name for tensor in quantised.tensors}) == ("odd" in details)
    sums = {tensor.name: tensor.n_elements for tensor in read_header(imatrix).tensors}
    assert sums[f"blk.0.ffn_up{'_exps' if 'experts' in details else ''}.weight.in_sum2"] == 256 * int(
        str(details.get("experts", 1))
    )
    with pytest.raises(InvalidDataError, match="importance matrix"):
        open_gguf(imatrix, allow_requantize=True)


@pytest.mark.parametrize("option", [[], ["--no-tensor-first-split"]])
def test_split_sets(toolchain: Toolchain, tmp_path: Path, option: list[str]) -> None:
    whole = write_llama_gguf(tmp_path / "tiny-BF16.gguf")
    call(toolchain.tool("llama-gguf-split"), "--split", "--split-max-tensors", 8, *option, whole, tmp_path / "part-BF16")
    shards = sorted(tmp_path.glob("part-*.gguf"))
    assert len(shards) >= 3
    model, single = open_gguf(shards[-1], allow_requantize=False), open_gguf(whole, allow_requantize=False)
    assert model.files == tuple(shards)
    assert model.name == "part"
    assert {tensor.name for tensor in model.tensors} == {tensor.name for tensor in single.tensors}
    assert model.n_params == single.n_params


def test_a_failed_quantisation_is_recognised(toolchain: Toolchain, tmp_path: Path) -> None:
    """Quantising again without permission fails at the first such tensor, and leaves the header zeroed."""
    model = write_llama_gguf(tmp_path / "tiny.gguf", layers=1)
    first, second = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    call(toolchain.tool("llama-quantize"), model, first, "Q8_0", 1)
    with pytest.raises(subprocess.CalledProcessError):
        call(toolchain.tool("llama-quantize"), first, second, "Q4_K_M", 1)
    with pytest.raises(InvalidDataError, match="interrupted llama-quantize"):
        read_header(second)
