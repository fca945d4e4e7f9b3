"""Levels of one pass are llama-quantize's, byte for byte: every type, every kind of source, every option."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import PassedLevel, PassJob, QuantizeOptions
from imatrix_runner.engines.llama_cpp.flags import quantize_options
from imatrix_runner.engines.protocol import Passed
from imatrix_runner.toolchain.probe import Toolchain
from support.llama_tools import BareTools
from support.oracles import library_digests, quantized
from support.passes import NEED_WEIGHTS, NO_OPTIONS, REQUANTIZE, SLOW, Made, Passes, engine_of, in_one_worker
from support.tiny_models import DType, write_llama_gguf

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

PLAIN: tuple[DType, ...] = ("f32", "f16", "bf16")
QUANTISED = ("Q8_0", "Q4_K_M")
FEW = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_NL", "TQ1_0", "F16", "COPY")
"""Levels that are made in an instant, of every family."""


@pytest.fixture(scope="module")
def passes(toolchain: Toolchain, tools: BareTools) -> Passes:
    return Passes(engine_of(toolchain), tools)


@pytest.fixture(scope="module")
def sources(tools: BareTools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every precision a source may have."""
    folder = tmp_path_factory.mktemp("sources")
    found: dict[str, Path] = {
        dtype: write_llama_gguf(folder / f"tiny-{dtype}.gguf", layers=1, vocab=300, dtype=dtype) for dtype in PLAIN
    }
    return {**found, **{name: tools.quantize(found["f32"], folder / f"tiny-{name}.gguf", name) for name in QUANTISED}}


def allowed(source: str) -> QuantizeOptions:
    return REQUANTIZE if source in QUANTISED else NO_OPTIONS


def _made(job: PassJob, passed: Iterator[Passed]) -> Made:
    """What a worker reported of one pass; ``passed`` goes on with the next one's."""
    levels: dict[str, PassedLevel] = {}
    for reply in passed:
        if reply.level is not None:
            levels[reply.level.name] = reply.level
        if reply.figures is not None:
            return Made(job, levels, reply.figures)
    raise AssertionError("the pass did not come to its end")


@pytest.fixture(scope="module")
def slow(
    sources: dict[str, Path], passes: Passes, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Made]:
    """A pass of these types for every source, in one worker: their tables are computed once."""
    folder = tmp_path_factory.mktemp("slow")
    jobs = [passes.plan(path, SLOW, folder / source, allowed(source), tiny_imatrix) for source, path in sources.items()]
    replies = in_one_worker(passes.tools.toolchain, map(passes.for_worker, jobs), folder / "ours.json")
    passed = iter([reply for reply in replies if isinstance(reply, Passed)])
    return {source: _made(job, passed) for source, job in zip(sources, jobs, strict=True)}


class TestTypes:
    """All in one pass of one process."""

    @pytest.mark.parametrize("weighed", [False, True], ids=["no imatrix", "imatrix"])
    @pytest.mark.parametrize("source", [*PLAIN, *QUANTISED])
    def test_every_type_from(
        self, source: str, weighed: bool, sources: dict[str, Path], passes: Passes, tiny_imatrix: Path, tmp_path: Path
    ) -> None:
        """But for those whose tables take seconds; they follow."""
        names = passes.names(*SLOW, *(() if weighed else NEED_WEIGHTS))
        assert len(names) >= (29 if weighed else 27)
        imatrix = tiny_imatrix if weighed else None
        made = passes.make(sources[source], names, tmp_path, allowed(source), imatrix)
        passes.same(made)
        again = passes.make(sources[source], names, tmp_path / "ggml", allowed(source), imatrix, native_kernels=False)
        assert again.digests == made.digests
        computed = {cost.type for cost in made.figures.types}
        assert {"q2_K", "q3_K", "q5_1", "iq3_s", "q1_0", "q2_0", "tq1_0"} <= computed
        assert ("f16" in computed) == (source != "f16")

    def test_slow_types_from_every_source(self, slow: dict[str, Made], passes: Passes) -> None:
        """As llama.cpp's own ``llama_model_quantize`` makes them."""
        assert not any(made.spoiled for made in slow.values())
        jobs = [level.job for made in slow.values() for level in made.job.levels]
        assert len(jobs) == len(SLOW) * len(slow)
        ours = [digests for made in slow.values() for digests in made.digests.values()]
        assert ours == [[theirs] for theirs in library_digests(passes.tools, jobs)]

    def test_slow_types_are_the_program_s(self, slow: dict[str, Made], passes: Passes) -> None:
        passes.same(slow["bf16"])
        assert {*slow["bf16"].levels["IQ2_XXS"].without_weights} == {"output.weight", "token_embd.weight"}

    @pytest.mark.parametrize(
        "name", ["Q4_1", "Q5_K_M", "Q3_K_S", "Q2_K", "Q6_K", "IQ3_S", "IQ4_NL", "MXFP4_MOE", "Q1_0", "Q2_0"]
    )
    def test_a_source_of(self, name: str, passes: Passes, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
        """Every way to widen; what is of the wanted type already is taken as it is."""
        source = passes.tools.quantize(tiny_model, tmp_path / "source.gguf", name, "--pure")
        made = passes.make(source, [*FEW, name], tmp_path, REQUANTIZE, tiny_imatrix)
        passes.same(made)


OPTIONS = {
    "pure": QuantizeOptions(pure=True),
    "leave the output": QuantizeOptions(leave_output_tensor=True),
    "output type": QuantizeOptions(output_tensor_type="Q8_0"),
    "output type without a block": QuantizeOptions(output_tensor_type="f32"),
    "embedding type": QuantizeOptions(token_embedding_type="q5_k"),
    "pure with two types": QuantizeOptions(pure=True, output_tensor_type="q6_k", token_embedding_type="bf16"),
    "tensor types": QuantizeOptions(tensor_types=("FFN_Down=Q8_0", "n_(q|k)=q5_k", "ffn_down=q2_k", r"blk\.[13]\.ffn_up=bf16")),
    "pins last": QuantizeOptions(tensor_types=("ffn_down=q8_0",), pins=("ffn_down=q2_k", "attn_q=q6_k")),
    "include": QuantizeOptions(include_weights=("ffn_", "attn_q")),
    "exclude": QuantizeOptions(exclude_weights=("attn_v", "blk.1.")),
    "exclude all": QuantizeOptions(exclude_weights=("blk", "output")),
    "prune the first": QuantizeOptions(prune_layers="0"),
    "prune the last": QuantizeOptions(prune_layers="3"),
    "prune two": QuantizeOptions(prune_layers="2,1"),
    "prune what is not there": QuantizeOptions(prune_layers="7"),
    "prune with types": QuantizeOptions(prune_layers="1", tensor_types=(r"blk\.1\.=q6_k",), exclude_weights=("blk.2.",)),
    "buffer": QuantizeOptions(max_buffer_size=1),
    "split of one": QuantizeOptions(keep_split=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that those in the middle get other types than the first and the last."""
    return write_llama_gguf(tmp_path_factory.mktemp("deep") / "deep.gguf", layers=4, ff=256, vocab=300)


@pytest.fixture(scope="module")
def deep_imatrix(tools: BareTools, deep_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep-imatrix") / "imatrix.gguf"
    words = Path(tiny_text.name)
    tools.imatrix(deep_model, words, path, "-c", "128", "--chunks", "4", "--process-output", folder=tiny_text.parent)
    return path


class TestOptions:
    """Each for several levels at once."""

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_levels_with(
        self, options: QuantizeOptions, passes: Passes, deep_model: Path, deep_imatrix: Path, tmp_path: Path
    ) -> None:
        made = passes.make(deep_model, ("Q4_K_M", "Q3_K_L", "Q5_0", "F16", "COPY"), tmp_path, options, deep_imatrix)
        passes.same(made)

    def test_none_of_these_is_without_effect(self, tools: BareTools, deep_model: Path, deep_imatrix: Path) -> None:
        """So that the test above means something; on a buffer's size the bytes must not depend."""
        given = {"none": NO_OPTIONS, **OPTIONS}
        found = {
            name: quantized(tools, deep_model, "Q4_K_M", *quantize_options(options), imatrix=deep_imatrix).digests[0]
            for name, options in given.items()
        }
        assert {name for name in OPTIONS if found[name] == found["none"]} == {"buffer"}
        assert len(set(found.values())) == len(OPTIONS)

    def test_tensor_types_from_a_file(self, passes: Passes, deep_model: Path, deep_imatrix: Path, tmp_path: Path) -> None:
        types = tmp_path / "types.txt"
        types.write_text("ffn_down=q8_0\tATTN_V=q6_k\r\n\n attn_k=f32 ", encoding="utf-8")
        options = QuantizeOptions(tensor_type_file=types, tensor_types=("ffn_down=q5_k",))
        passes.same(passes.make(deep_model, ["Q4_K_M", "IQ4_XS"], tmp_path, options, deep_imatrix))

    @pytest.mark.parametrize(
        "override",
        [
            "general.name=str:änother=name",
            f"my.text=str:{'x' * 127}",
            "my.empty=str:",
            "llama.context_length=int:512",
            "my.negative=int:-7 and more",
            "my.nothing=int:x",
            "my.large=int:99999999999999999999",
            "my.smallest=int:-9223372036854775808",
            "my.float=float: 1.5e-3x",
            "my.large=float:1e39",
            "my.infinite=float:-inf",
            "my.no=float:nan",
            "my.true=bool:true",
            "general.file_type=int:7",
            "general.quantization_version=int:1",
            "tokenizer.ggml.tokens=str:an array before",
            "tokenizer.ggml.add_bos_token=bool:false",
            "quantize.imatrix.file=str:mine",
            "llama.rope.freq_base=float:500000",
        ],
        ids=lambda text: text[:32],
    )  # fmt: skip
    def test_one_override(self, override: str, passes: Passes, deep_model: Path, deep_imatrix: Path, tmp_path: Path) -> None:
        options = QuantizeOptions(override_kv=(override,))
        passes.same(passes.make(deep_model, ["Q4_0", "COPY"], tmp_path, options, deep_imatrix))

    def test_all_at_once(self, passes: Passes, deep_model: Path, deep_imatrix: Path, tmp_path: Path) -> None:
        options = QuantizeOptions(
            leave_output_tensor=True,
            token_embedding_type="q6_k",
            tensor_types=("attn_(q|k)=q5_0",),
            include_weights=("blk.0", "blk.3", "ffn"),
            prune_layers="1",
            keep_split=True,
            override_kv=("general.name=str:a", "my.key=bool:true", "general.name=str:b", "llama.block_count=int:4"),
        )
        passes.same(passes.make(deep_model, FEW, tmp_path, options, deep_imatrix))
