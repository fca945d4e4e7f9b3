"""The tiny models of :mod:`support.tiny_architectures`: llama-imatrix takes them all and measures what each is there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.imatrix.expected import expect, uncollected
from imatrix_runner.imatrix.formats import read
from imatrix_runner.imatrix.matrix import Matrix
from imatrix_runner.models.model import Model, open_gguf
from support.llama_tools import BareTools, digest
from support.tiny_architectures import ARCHITECTURES, DType, write_architecture

Measure = Callable[[str, DType], tuple[Model, Matrix]]

CHUNKS, CHUNK_SIZE = 4, 128
TOKENS = CHUNKS * CHUNK_SIZE

CHARACTERISTIC: dict[str, dict[str, tuple[int, int]]] = {
    "llama": {"blk.1.attn_k": (1, 256), "blk.1.ffn_down": (1, 256)},
    "qwen3": {"blk.1.attn_q": (1, 256), "blk.1.ffn_gate": (1, 256)},
    "gemma3": {"blk.0.attn_q": (1, 256), "blk.1.attn_q": (1, 256)},
    "phi3": {"blk.0.attn_qkv": (1, 256), "blk.1.ffn_up": (1, 256)},
    "qwen3moe": {"blk.0.ffn_gate_exps": (8, 256), "blk.1.ffn_down_exps": (8, 256), "blk.0.ffn_gate_inp": (1, 256)},
    "mixtral": {"blk.0.ffn_gate_exps": (8, 256), "blk.1.ffn_up_exps": (8, 256), "blk.1.ffn_down_exps": (8, 256)},
    "deepseek2": {
        "blk.0.attn_k_b": (1, 4 * 64),  # dense and 3-D: the columns of all heads in one row
        "blk.1.attn_v_b": (1, 4 * 256),
        "blk.0.attn_kv_a_mqa": (1, 256),
        "blk.0.ffn_down": (1, 256),
        "blk.1.ffn_down_shexp": (1, 256),
        "blk.1.ffn_down_exps": (8, 256),
    },
    "mamba": {"blk.0.ssm_in": (1, 256), "blk.0.ssm_x": (1, 512), "blk.1.ssm_dt": (1, 16), "blk.1.ssm_out": (1, 512)},
    "rwkv7": {"blk.0.time_mix_key": (1, 256), "blk.0.time_mix_w2": (1, 32), "blk.1.channel_mix_value": (1, 512)},
    "lfm2": {"blk.0.shortconv.in_proj": (1, 256), "blk.1.attn_q": (1, 256), "blk.2.shortconv.out_proj": (1, 256)},
    "jamba": {"blk.0.ssm_in": (1, 256), "blk.0.ffn_up": (1, 256), "blk.1.attn_q": (1, 256), "blk.1.ffn_up_exps": (4, 256)},
}
ABSENT = {
    "gemma3": "output",  # tied: no output weight
    "phi3": "blk.0.attn_q",
    "deepseek2": "blk.0.ffn_gate_exps",  # the leading dense layer
    "rwkv7": "blk.0.time_mix_v1",  # there, but layer 0 has no use for it
    "lfm2": "blk.0.attn_q",
    "jamba": "blk.0.attn_q",
}


@pytest.fixture(scope="module")
def measure(tools: BareTools, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    folder = tmp_path_factory.mktemp("architectures")

    def measured(name: str, dtype: DType) -> tuple[Model, Matrix]:
        model = write_architecture(name, folder / "model.gguf", dtype=dtype)
        assert model.stat().st_size < 20e6
        options = ("-c", str(CHUNK_SIZE), "--chunks", str(CHUNKS), "--process-output")
        tools.imatrix(model, tiny_text, folder / "imatrix.gguf", *options)
        return open_gguf(model, allow_requantize=False), read(folder / "imatrix.gguf").matrix

    return measured


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_llama_imatrix_measures_it(measure: Measure, name: str, dtype: DType) -> None:
    model, matrix = measure(name, dtype)
    _as_expected(model, matrix)
    for tensor, shape in CHARACTERISTIC[name].items():
        assert matrix.shape(f"{tensor}.weight") == shape
    assert name not in ABSENT or f"{ABSENT[name]}.weight" not in matrix.entries
    assert (matrix.chunk_count, matrix.chunk_size) == (CHUNKS, CHUNK_SIZE)
    for entry in matrix.entries.values():
        used = 2 if len(entry.counts) > 1 else 1  # each token goes to two experts
        assert entry.counts.sum() == used * TOKENS
        seen = entry.sums[entry.counts > 0]
        assert np.isfinite(seen).all()
        assert (seen > 0).all()


def test_blocks_that_are_never_computed_are_expected_to_have_no_data(measure: Measure) -> None:
    model, matrix = measure("glm4moe", "BF16")
    _as_expected(model, matrix)
    assert {name.split(".")[1] for name in matrix.entries if name.startswith("blk.")} == {"0", "1"}
    assert "NextN" in uncollected(model)["blk.2.ffn_up_exps.weight"]


def _as_expected(model: Model, matrix: Matrix) -> None:
    """What the header foretells has data, with as many values; and nothing has that it says has none."""
    expected = expect(model, process_output=True)
    assert {name: matrix.values_per_entry(name) for name in expected.sizes} == expected.sizes
    assert not expected.absent.keys() & matrix.entries.keys()


def test_columns_differ_in_importance(measure: Measure) -> None:
    sums = measure("llama", "F32")[1].entries["blk.0.attn_q.weight"].sums[0]
    assert sums.argmax() == 0  # the outlier channel
    assert np.percentile(sums, 90) > 3 * np.percentile(sums, 10)


def test_some_experts_see_few_tokens(measure: Measure) -> None:
    counts = measure("qwen3moe", "F32")[1].counts("blk.0.ffn_gate_exps.weight")
    assert counts.min() < TOKENS // 50
    assert counts.max() > TOKENS // 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_arguments_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    first = digest(write_architecture(name, tmp_path / "1.gguf"))
    assert digest(write_architecture(name, tmp_path / "2.gguf")) == first
    assert digest(write_architecture(name, tmp_path / "3.gguf", seed=2)) != first
