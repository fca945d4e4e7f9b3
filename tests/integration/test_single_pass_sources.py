"""Levels of one pass are llama-quantize's, byte for byte: models of every shape, in one file or in many."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.toolchain.probe import Toolchain
from support.llama_tools import BareTools
from support.passes import REQUANTIZE, Made, Passes, change_keys, engine_of, set_floats, write_imatrix
from support.tiny_architectures import ARCHITECTURES, write_architecture
from support.tiny_models import DType, write_llama_gguf

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

SOME = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_S", "Q2_K", "MXFP4_MOE", "TQ1_0", "F16", "COPY")
SEARCHED = ("Q6_K", "Q4_K_M", "Q3_K_S", "Q5_1", "IQ4_NL")
"""Levels whose types look at the weights of every column."""

Digests = dict[str, list[str]]


@pytest.fixture(scope="module")
def passes(toolchain: Toolchain, tools: BareTools) -> Passes:
    return Passes(engine_of(toolchain), tools)


@pytest.mark.parametrize("weighed", [False, True], ids=["no imatrix", "imatrix"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture(name: str, weighed: bool, passes: Passes, tmp_path: Path) -> None:
    """Dense, mixtures, recurrent and hybrid ones, with 3-D tensors of experts and odd little ones that stay as they are."""
    model = write_architecture(name, tmp_path / "model.gguf", dtype="BF16")
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model) if weighed else None
    passes.same(passes.make(model, ("Q8_0", "Q4_K_M", "IQ3_S", "Q2_K", "MXFP4_MOE"), tmp_path, imatrix=imatrix))


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("moe") / "moe.gguf", experts=5, tied=True, ff=256, vocab=300, layers=1)


@pytest.fixture(scope="module")
def moe_imatrix(moe_model: Path) -> Path:
    return write_imatrix(moe_model.with_name("imatrix.gguf"), moe_model)


@pytest.fixture(scope="module")
def moe_bare(moe_model: Path, moe_imatrix: Path, passes: Passes, tmp_path_factory: pytest.TempPathFactory) -> Digests:
    return passes.bare(passes.plan(moe_model, SEARCHED, tmp_path_factory.mktemp("bare"), imatrix=moe_imatrix))


class TestExperts:
    """3-D tensors: every expert has weights of its own, and slabs do not care where one ends."""

    @pytest.mark.parametrize("native_kernels", [True, False], ids=["native kernels", "ggml"])
    @pytest.mark.parametrize("rows", [1, 100, 600])
    def test_slabs_of(
        self,
        rows: int,
        native_kernels: bool,
        moe_model: Path,
        moe_imatrix: Path,
        passes: Passes,
        moe_bare: Digests,
        tmp_path: Path,
    ) -> None:
        """256 rows make an expert: slabs within one, across a border, across two."""
        plan = passes.plan(moe_model, SEARCHED, tmp_path / "made", imatrix=moe_imatrix, native_kernels=native_kernels)
        for threads in (1, 2, 5):
            made = passes.run(replace(plan, threads=threads, buffer_bytes=12 * threads * rows * 256))
            assert made.spoiled == {}
            assert made.figures.threads == threads
            assert made.digests == moe_bare
            shutil.rmtree(tmp_path / "made")

    def test_weights_matter(self, moe_model: Path, passes: Passes, moe_bare: Digests, tmp_path: Path) -> None:
        """So that the test above means something: another imatrix gives other bytes."""
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", moe_model, seed=6)
        digests = passes.make(moe_model, SEARCHED, tmp_path, imatrix=imatrix).digests
        assert all(digests[name] != moe_bare[name] for name in SEARCHED)


SHAPES: dict[str, dict[str, object]] = {
    "odd": {"odd": True},
    "tied": {"tied": True},
    "odd mixture": {"odd": True, "experts": 3, "tied": True},
    "rows of 32": {"extra": {"a.weight": (5, 32), "b.weight": (1, 32), "c.weight": (3, 7, 32)}},
    "rows without a block": {"extra": {"a.weight": (5, 33), "b.weight": (1, 1), "c.weight": (2, 3, 5), "d.weight": (1000, 1)}},
    "long rows": {"extra": {"a.weight": (3, 300_032), "b.weight": (2, 1 << 20), "c.bias": (300_000,)}},
    "one expert": {"extra": {"blk.0.a_exps.weight": (1, 16, 256)}},
    "many experts of one row": {"extra": {"blk.0.a_exps.weight": (33, 1, 256)}},
}


@pytest.mark.parametrize("weighed", [False, True], ids=["no imatrix", "imatrix"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: DType, weighed: bool, passes: Passes, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "m.gguf", layers=1, vocab=300, dtype=dtype, **SHAPES[shape])  # type: ignore[arg-type]
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model) if weighed else None
    made = passes.make(model, SOME, tmp_path, imatrix=imatrix)
    passes.same(made)


@pytest.mark.parametrize("native_kernels", [True, False], ids=["native kernels", "ggml"])
@pytest.mark.parametrize("weighed", [False, True], ids=["no imatrix", "imatrix"])
def test_numbers_of_every_kind(native_kernels: bool, weighed: bool, passes: Passes, tmp_path: Path) -> None:
    """Zeros of either sign, numbers without a normal form, outliers, steps, blocks that are all one number."""
    model = write_llama_gguf(tmp_path / "m.gguf", layers=1, dtype="f32")
    draw = np.random.default_rng(3)
    normal = draw.standard_normal(256 * 256)
    wild = {
        "attn_q": np.where(draw.random(normal.size) < 0.9, -0.0, normal),
        "attn_k": normal[: 128 * 256] * 1e-40,
        "attn_v": np.where(draw.random(128 * 256) < 0.01, 3e4, 1e-3 * normal[: 128 * 256]),
        "attn_output": np.repeat(normal[::64], 64),
        "ffn_gate": np.tile(np.round(normal * 3), 2),
        "ffn_up": np.tile(normal, 2) * 10.0 ** draw.integers(-12, 3, 2 * normal.size),
        "ffn_down": np.tile(np.where(np.arange(normal.size) % 512 < 256, 1e-6, -1e-6), 2),
    }
    for name, values in wild.items():
        set_floats(model, f"blk.0.{name}.weight", values)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model) if weighed else None
    names = (
        passes.names("IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M", "IQ2_XS") if weighed else ("Q8_0", *SEARCHED, "Q4_0", "TQ2_0", "Q1_0")
    )
    made = passes.make(model, names, tmp_path, imatrix=imatrix, native_kernels=native_kernels)
    passes.same(made)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("whole") / "m.gguf", layers=3, ff=256, vocab=300)


@pytest.fixture(scope="module")
def shards(whole: Path, tools: BareTools, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tools.split(whole, tmp_path_factory.mktemp("shards") / "m", 11)


class TestShards:
    @pytest.mark.parametrize(
        "options",
        [
            QuantizeOptions(),
            QuantizeOptions(keep_split=True),
            QuantizeOptions(keep_split=True, prune_layers="1"),
            QuantizeOptions(keep_split=True, override_kv=("general.name=str:another",), pure=True),
            QuantizeOptions(prune_layers="0", tensor_types=("attn_v=q8_0",)),
        ],
        ids=["one file", "keep", "keep and prune", "keep and override", "prune"],
    )
    def test_of_a_source(
        self, options: QuantizeOptions, whole: Path, shards: list[Path], passes: Passes, tmp_path: Path
    ) -> None:
        assert len(shards) == 3
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", whole)
        made = passes.make(shards[0], ("Q4_K_M", "Q5_0", "Q8_0", "F32", "COPY"), tmp_path, options, imatrix)
        assert len(made.files("Q4_K_M")) == (3 if options.keep_split else 1)
        passes.same(made)

    def test_a_file_for_every_tensor(self, whole: Path, tools: BareTools, passes: Passes, tmp_path: Path) -> None:
        shards = tools.split(whole, tmp_path / "shards" / "m", 1)
        made = passes.make(shards[0], ("Q4_K_M", "IQ4_NL"), tmp_path, QuantizeOptions(keep_split=True))
        assert len(made.files("Q4_K_M")) == len(shards) == len(read_header(whole).tensors)
        passes.same(made)


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A metadata entry as it lies in a GGUF."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def odd_entries() -> Iterator[bytes]:
    """Every type GGUF has, arrays of every type, long, empty and of nothing but empty texts."""
    numbers = ["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"]
    kinds = {**dict(enumerate(numbers)), 10: "<Q", 11: "<q", 12: "<d"}
    for kind, code in kinds.items():
        value = struct.pack(code, 1)
        yield entry(f"odd.scalar.{kind}", kind, value)
        for count in (0, 1, 3, 5000):
            yield entry(f"odd.array.{kind}.{count}", 9, struct.pack("<IQ", kind, count) + value * count)
    texts = ["", "ä\0b", "x" * 70_000]
    for number, text in enumerate(texts):
        yield entry(f"odd.text.{number}", 8, struct.pack("<Q", len(text.encode())) + text.encode())
    for count in (0, 1, 40_000):
        words = b"".join(struct.pack("<Q", len(word)) + word for word in (b"w%d" % n * (n % 3) for n in range(count)))
        yield entry(f"odd.texts.{count}", 9, struct.pack("<IQ", 8, count) + words)
    yield entry("odd.not.utf8", 8, struct.pack("<Q", 2) + b"\xff\xfe")


class TestMetadata:
    def test_of_every_type_and_much_of_it(self, passes: Passes, tmp_path: Path) -> None:
        model = change_keys(write_llama_gguf(tmp_path / "m.gguf", layers=1), raw=[*odd_entries()])
        assert model.stat().st_size > 2_500_000
        passes.same(passes.make(model, ("Q4_0", "Q5_K_S", "COPY"), tmp_path))

    @pytest.mark.parametrize("alignment", [8, 64, 4096])
    def test_alignment(self, alignment: int, passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """llama-quantize keeps the key and aligns to 32 all the same."""
        monkeypatch.setattr("gguf.gguf_writer.GGUF_DEFAULT_ALIGNMENT", alignment)
        model = write_llama_gguf(tmp_path / "m.gguf", layers=1, odd=True, metadata={"general.alignment": alignment})
        assert read_header(model).alignment == alignment
        passes.same(passes.make(model, ("Q4_0", "Q5_K_S", "COPY"), tmp_path))

    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    def test_no_file_type(self, dtype: DType, passes: Passes, tmp_path: Path) -> None:
        """COPY then writes the type that llama.cpp guesses."""
        model = change_keys(write_llama_gguf(tmp_path / "m.gguf", layers=1, dtype=dtype), without=["general.file_type"])
        passes.same(passes.make(model, ("Q4_0", "Q5_K_S", "COPY"), tmp_path))

    @pytest.mark.parametrize("name", ["Q8_0", "Q3_K_M", "IQ4_NL", "MXFP4_MOE"])
    def test_no_file_type_of_a_quantised_source(self, name: str, passes: Passes, tiny_model: Path, tmp_path: Path) -> None:
        model = change_keys(passes.tools.quantize(tiny_model, tmp_path / "m.gguf", name), without=["general.file_type"])
        passes.same(passes.make(model, ("Q4_0", "COPY"), tmp_path, REQUANTIZE))

    def test_a_source_that_was_quantised_with_an_imatrix(
        self, passes: Passes, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
    ) -> None:
        """Its notes on that are replaced where they are, or kept."""
        model = passes.tools.quantize(tiny_model, tmp_path / "m.gguf", "Q6_K", imatrix=tiny_imatrix)
        for imatrix in (None, write_imatrix(tmp_path / "other.gguf", tiny_model)):
            made = passes.make(model, ("Q4_0", "Q5_K_S", "COPY"), tmp_path / str(imatrix is None), REQUANTIZE, imatrix)
            passes.same(made)


@pytest.fixture(scope="module")
def legacy(tools: BareTools, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's imatrix in the legacy format."""
    return tools.merge([tiny_imatrix], tmp_path_factory.mktemp("legacy") / "imatrix.dat", "-c", "128", "--output-format", "dat")


class TestImatrices:
    """Values and metadata are read as llama-quantize reads them, whatever the file is like."""

    LEVELS = ("Q4_K_M", "Q4_0", "IQ4_NL")

    def _same(self, imatrix: Path, like: Path, model: Path, passes: Passes, folder: Path) -> Made:
        """``like``: an imatrix that is as it should be, to plan with."""
        made = passes.run(passes.given(passes.plan(model, self.LEVELS, folder, imatrix=like), imatrix))
        passes.same(made)
        return made

    def test_legacy(self, legacy: Path, tiny_model: Path, tiny_imatrix: Path, passes: Passes, tmp_path: Path) -> None:
        made = self._same(legacy, tiny_imatrix, tiny_model, passes, tmp_path)
        assert read_header(made.files("Q4_0")[0]).metadata["quantize.imatrix.chunks_count"] == 20

    @pytest.mark.parametrize("cut", [1, 8, 30], ids="without the last {} bytes".format)
    def test_legacy_with_a_trailer_that_is_cut(
        self, cut: int, legacy: Path, tiny_model: Path, tiny_imatrix: Path, passes: Passes, tmp_path: Path
    ) -> None:
        """Chunks and dataset may be missing; what is there of them counts."""
        data = legacy.read_bytes()
        trailer = len(data) - data.rindex(b"words.txt") + 8
        short = tmp_path / "short.dat"
        short.write_bytes(data[: len(data) - trailer + {1: 2, 8: 6, 30: trailer - 1}[cut]])
        self._same(short, tiny_imatrix, tiny_model, passes, tmp_path)

    def test_legacy_with_odd_names(self, tiny_model: Path, tiny_imatrix: Path, passes: Passes, tmp_path: Path) -> None:
        """They end at a NUL, and of two entries with one name the later counts; 0 calls divide nothing."""
        imatrix = tmp_path / "odd.dat"
        name, random = b"blk.0.attn_q.weight", np.random.default_rng(1)
        entries = [(name, 3), (name + b"\0tail", 7), (b"", 1), (b"blk.0.attn_k.weight", 0), (b"blk.0.attn_v.weight", 16777217)]
        values = [(key, calls, random.random(256, np.float32).tobytes()) for key, calls in entries]
        parts = [struct.pack("<i", len(key)) + key + struct.pack("<ii", calls, 256) + data for key, calls, data in values]
        imatrix.write_bytes(struct.pack("<i", len(parts)) + b"".join(parts) + struct.pack("<ii", 5, 4) + b"a\0bc")
        made = self._same(imatrix, tiny_imatrix, tiny_model, passes, tmp_path)
        assert read_header(made.files("Q4_0")[0]).metadata["quantize.imatrix.entries_count"] == 4

    def test_counts_of_experts(self, moe_model: Path, moe_imatrix: Path, passes: Passes, tmp_path: Path) -> None:
        """One saw nothing, one counts as 0, and one is rounded up."""
        imatrix = Path(shutil.copy(moe_imatrix, tmp_path / "i.gguf"))
        set_floats(imatrix, "blk.0.ffn_down_exps.weight.counts", [0.0, 0.49, 2.5, 7.0])
        self._same(imatrix, moe_imatrix, moe_model, passes, tmp_path)

    def test_names_are_cut_and_kept_as_bytes(
        self, tools: BareTools, tiny_model: Path, tiny_text: Path, tiny_imatrix: Path, passes: Passes, tmp_path: Path
    ) -> None:
        """A long dataset that is no UTF-8, and a file name whose 127th byte is half a letter."""
        text = tmp_path / ("d" * 90) / ("t" * 90) / "words.txt"
        text.parent.mkdir(parents=True)
        shutil.copy(tiny_text, text)
        imatrix = tmp_path / f"x{'ä' * 80}.gguf"
        tools.imatrix(tiny_model, text, imatrix, "-c", "128", "--chunks", "1")
        data = imatrix.read_bytes()
        start = data.index(str(text).encode())
        imatrix.write_bytes(data[:start] + b"/t\xff\xfe" + data[start + 4 :])
        made = self._same(imatrix, tiny_imatrix, tiny_model, passes, tmp_path)
        assert b"/t\xff\xfe" in made.files("Q4_0")[0].read_bytes()
