"""What spoils a level of a pass: what llama-quantize refuses too, and never a level that it does not concern."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.errors import RunnerError
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import RunCommand
from support.llama_tools import BareTools, digest, leftovers, levels_in
from support.passes import NEED_WEIGHTS, NO_OPTIONS, SLOW, Passes, engine_of, set_floats, write_imatrix
from support.tiny_models import DType, write_llama_gguf

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

NAN, INF = math.nan, math.inf
ABORTING = ("IQ3_S", "IQ3_M")
"""What has tensors of IQ3_S; that search ends in an assertion where numbers are beyond all bounds."""

SOURCE = "the model has NaN or infinite numbers there"


@pytest.fixture(scope="module")
def passes(toolchain: Toolchain, tools: BareTools) -> Passes:
    return Passes(engine_of(toolchain), tools)


def small(path: Path, dtype: DType = "f32") -> Path:
    return write_llama_gguf(path, layers=2, ff=256, vocab=300, dtype=dtype)


class TestSource:
    @pytest.mark.parametrize("number", [NAN, INF, -INF], ids=str)
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    def test_a_number_that_is_none(self, dtype: DType, number: float, passes: Passes, tmp_path: Path) -> None:
        """It ends every level, also those that only copy."""
        model = set_floats(small(tmp_path / "m.gguf", dtype), "blk.1.ffn_up.weight", [number], first=60_001)
        made = passes.make(model, ("Q8_0", "Q4_K_M", "F16", "BF16", "F32", "COPY"), tmp_path)
        assert made.spoiled == dict.fromkeys(made.levels, ("blk.1.ffn_up.weight", SOURCE))
        assert passes.refused(made).keys() == made.levels.keys()

    def test_in_a_tensor_that_is_only_copied(self, passes: Passes, tmp_path: Path) -> None:
        model = set_floats(small(tmp_path / "m.gguf", "bf16"), "blk.0.attn_norm.weight", [NAN], first=255)
        made = passes.make(model, ("Q8_0", "COPY"), tmp_path)
        assert made.spoiled == dict.fromkeys(made.levels, ("blk.0.attn_norm.weight", SOURCE))
        assert passes.refused(made).keys() == made.levels.keys()

    def test_in_a_layer_that_is_pruned(self, passes: Passes, tmp_path: Path) -> None:
        model = set_floats(small(tmp_path / "m.gguf"), "blk.1.ffn_up.weight", [NAN])
        made = passes.make(model, ("Q8_0", "Q4_K_M", "COPY"), tmp_path, QuantizeOptions(prune_layers="1"))
        passes.same(made)


class TestResult:
    """Numbers that are too large for a type's scales."""

    @pytest.mark.parametrize("native_kernels", [True, False], ids=["native kernels", "ggml"])
    @pytest.mark.parametrize("weighed", [False, True], ids=["no imatrix", "imatrix"])
    @pytest.mark.parametrize("number", [7e4, 2e6, 1e38], ids=str)
    def test_too_large(self, number: float, weighed: bool, native_kernels: bool, passes: Passes, tmp_path: Path) -> None:
        """Each type has its own limit; what is within stays as it is."""
        model = set_floats(small(tmp_path / "m.gguf"), "blk.1.attn_q.weight", [number], first=9999)
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", model) if weighed else None
        names = passes.names(*SLOW, *NEED_WEIGHTS, *(ABORTING if number == 1e38 else ()))
        made = passes.make(model, names, tmp_path, imatrix=imatrix, native_kernels=native_kernels)
        refused = passes.refused(made)
        assert made.spoiled.keys() == refused.keys()
        assert {tensor for tensor, _ in made.spoiled.values()} == {"blk.1.attn_q.weight"}
        assert all("it has NaN or infinite numbers" in why for _, why in made.spoiled.values())
        assert "F16" in refused
        assert not {"F32", "BF16", "COPY"} & refused.keys()

    def test_in_the_command(self, runner: RunCommand, passes: Passes, tmp_path: Path) -> None:
        """The level fails with the tensor's name, the others are made, nothing else is left."""
        model = set_floats(small(tmp_path / "m-F32.gguf"), "blk.1.attn_q.weight", [1e38])
        ran = runner("run", model, "--imatrix", "none", "--levels", "Q8_0,BF16,Q4_K_M,COPY", "--json")
        assert ran.code == 100, ran.err
        workspace = tmp_path / "work" / "m"
        bare = {name: digest(passes.tools.quantize(model, tmp_path / name, name)) for name in ("BF16", "COPY")}
        assert levels_in(workspace) == bare
        assert leftovers(workspace) in ([], [".partial"])
        states = {level["level"]: level["status"] for level in ran.document["levels"]}
        assert states == {"Q8_0": "failed", "BF16": "done", "Q4_K_M": "failed", "COPY": "done"}
        assert "blk.1.attn_q.weight: quantised to q8_0 it has NaN or infinite numbers" in ran.err
        again = runner("run", model, "--imatrix", "none", "--levels", "Q8_0,BF16,Q4_K_M,COPY")
        assert again.code == 100
        assert levels_in(workspace) == bare

    @pytest.mark.parametrize("kernels", ["auto", "ggml"])
    def test_an_assertion_in_the_command(self, kernels: str, runner: RunCommand, tmp_path: Path) -> None:
        """With ggml's own kernels an assertion ends the worker, and with it only the level it concerns."""
        model = set_floats(small(tmp_path / "m-F32.gguf"), "blk.1.attn_q.weight", [1e38])
        ran = runner("run", model, "--imatrix", "none", "--levels", "IQ3_S,IQ3_M,BF16", "--kernels", kernels)
        assert ran.code == 100, ran.err
        assert levels_in(tmp_path / "work" / "m").keys() == {"BF16"}
        assert "blk.1.attn_q.weight: " in ran.err

    def test_a_source_in_the_command(self, runner: RunCommand, tmp_path: Path) -> None:
        model = set_floats(small(tmp_path / "m-F16.gguf", "f16"), "output.weight", [INF])
        ran = runner("run", model, "--imatrix", "none", "--levels", "Q8_0,BF16")
        assert ran.code == 100, ran.err
        assert f"output.weight: {SOURCE}" in ran.err
        assert levels_in(tmp_path / "work" / "m") == {}


class TestImatrix:
    @pytest.mark.parametrize("number", [NAN, INF], ids=str)
    def test_not_finite(self, number: float, passes: Passes, tmp_path: Path) -> None:
        """Of a tensor that is to be weighed or not: no level is made."""
        model = small(tmp_path / "m.gguf")
        imatrix = write_imatrix(tmp_path / "i.gguf", model)
        job = passes.plan(model, ("Q8_0", "Q4_K_M"), tmp_path, imatrix=imatrix)
        set_floats(imatrix, "blk.1.attn_k.weight.in_sum2", [number], first=3)
        with pytest.raises(RunnerError, match=r"non-finite|NaN or infinite"):
            passes.run(job)
        for level in job.levels:
            with pytest.raises(AssertionError, match="non-finite"):
                passes.tools.quantize(model, tmp_path / "bare.gguf", level.job.ftype, imatrix=imatrix)

    def test_not_finite_but_excluded(self, passes: Passes, tmp_path: Path) -> None:
        model = small(tmp_path / "m.gguf")
        imatrix = set_floats(write_imatrix(tmp_path / "i.gguf", model), "blk.1.attn_k.weight.in_sum2", [NAN])
        options = QuantizeOptions(exclude_weights=("blk.1.attn_k",))
        passes.same(passes.make(model, ("Q8_0", "Q4_K_M"), tmp_path, options, imatrix))

    def test_an_entry_of_another_size(self, passes: Passes, tmp_path: Path) -> None:
        """It spoils levels that change the tensor, whether or not they would look at the weights."""
        model = small(tmp_path / "m.gguf")
        imatrix = self._with_half_of("blk.1.attn_k.weight", model, tmp_path / "i.gguf")
        made = passes.make(model, ("Q8_0", "Q4_K_M", "F16", "F32", "COPY"), tmp_path, imatrix=imatrix)
        refused = passes.refused(made)
        assert refused.keys() == made.spoiled.keys() == {"Q8_0", "Q4_K_M", "F16"}
        for name, (tensor, why) in made.spoiled.items():
            assert tensor == "blk.1.attn_k.weight"
            assert why == "imatrix size 128 is different from tensor size 256 for blk.1.attn_k.weight"
            assert why in refused[name]

    def test_embeddings_of_another_size_have_none(self, passes: Passes, tmp_path: Path) -> None:
        model = small(tmp_path / "m.gguf")
        imatrix = self._with_half_of("token_embd.weight", model, tmp_path / "i.gguf")
        passes.same(passes.make(model, ("Q8_0", "Q4_K_M", "Q2_K"), tmp_path, NO_OPTIONS, imatrix))

    def _with_half_of(self, name: str, model: Path, path: Path) -> Path:
        matrix = read(write_imatrix(path, model)).matrix
        entries = {key: matrix.entries[key] for key in matrix.entries}
        entries[name] = MatrixEntry(entries[name].sums[:, ::2], entries[name].counts)
        write_gguf(Matrix(entries, 512, 7, ("random.txt",)), path)
        return path

    @pytest.mark.parametrize("excluded", [False, True], ids=["not collected", "excluded"])
    def test_weights_that_are_missing(self, excluded: bool, passes: Passes, tmp_path: Path) -> None:
        """In the pass itself, where a plan let it through: before ggml would abort the process."""
        model, name = small(tmp_path / "m.gguf"), ("blk.1.attn_q",)
        imatrix = write_imatrix(tmp_path / "i.gguf", model, without=() if excluded else name)
        options = QuantizeOptions(exclude_weights=name if excluded else ())
        made = passes.make(model, ("IQ2_XXS", "Q4_K_M", "Q2_K"), tmp_path, options, imatrix)
        words = "Missing importance matrix for tensor blk.1.attn_q.weight in a very low-bit quantization"
        assert made.spoiled == {"IQ2_XXS": ("blk.1.attn_q.weight", words)}
        assert words in passes.refused(made)["IQ2_XXS"]

    def test_missing_where_llama_cpp_does_not_look(self, passes: Passes, tmp_path: Path) -> None:
        """A low-bit type for the embeddings: llama-quantize is ended by an assertion."""
        model = small(tmp_path / "m.gguf")
        imatrix = write_imatrix(tmp_path / "i.gguf", model, without=("token_embd",))
        made = passes.make(model, ("Q4_0", "Q8_0"), tmp_path, QuantizeOptions(token_embedding_type="iq2_xxs"), imatrix)
        words = "Missing importance matrix for tensor token_embd.weight in a very low-bit quantization"
        assert made.spoiled == dict.fromkeys(("Q4_0", "Q8_0"), ("token_embd.weight", words))
        assert passes.refused(made).keys() == made.levels.keys()

    def test_missing_in_the_command(self, runner: RunCommand, passes: Passes, tmp_path: Path) -> None:
        model = small(tmp_path / "m.gguf")
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", model, without=("blk.1.attn_q",))
        ran = runner("run", model, "--imatrix", imatrix, "--levels", "IQ2_XXS,IQ3_XXS,Q4_K_M")
        assert ran.code == 100, ran.err
        assert "blk.1.attn_q.weight becomes IQ2_XXS" in ran.err
        bare = passes.tools.quantize(model, tmp_path / "bare.gguf", "Q4_K_M", imatrix=imatrix)
        assert levels_in(tmp_path / "work" / "m") == {"Q4_K_M": digest(bare)}


def test_a_quantised_source_without_permission(passes: Passes, tmp_path: Path) -> None:
    model = passes.tools.quantize(small(tmp_path / "m.gguf"), tmp_path / "small.gguf", "Q8_0")
    made = passes.make(model, ("Q4_K_M", "F16", "COPY"), tmp_path)
    refused = passes.refused(made)
    assert made.spoiled.keys() == refused.keys() == {"Q4_K_M", "F16"}
    assert all(why == "requantizing from type q8_0 is disabled" for _, why in made.spoiled.values())
