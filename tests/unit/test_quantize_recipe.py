"""Recipes against reality: what is foretold of a level is what the real llama-quantize then does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import DryRun, Fallback, Quantized, QuantizeOptions
from imatrix_runner.engines.levels import Level, resolve_levels
from imatrix_runner.imatrix.expected import ExpectedMatrix, expect
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.models.gguf_file import read_header, tensor_bytes, type_id
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Command, Runner
from imatrix_runner.quantize.recipe import Recipe, buffer_bytes, ignored_tensor_types, make_recipe
from imatrix_runner.quantize.usable_imatrix import NEVER_WEIGHED, NO_IMATRIX, expected_weights, usable_weights
from support.llama_tools import BareTools
from support.oracles import File, Oracle, quantized
from support.recipes import NO_OPTIONS, make, predict
from support.tiny_models import write_llama_gguf
from support.values import entry, matrix

# Their tables take seconds each: begun first, they run beside all the others.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ3_XXS", "IQ3_XS", "IQ3_M", "IQ3_S")


@dataclass(frozen=True)
class Foretold:
    """A level's recipe, and what llama-quantize made of it."""

    recipe: Recipe
    oracle: Oracle

    @property
    def succeeded(self) -> bool:
        return self.oracle.code == 0

    @property
    def file(self) -> File:
        (file,) = self.oracle.files
        return file


EveryType = Mapping[tuple[str, bool], Foretold]


@pytest.fixture(scope="module")
def every_type(engine: BinariesEngine, tools: BareTools, demo_model: Path, demo_imatrix: Path) -> EveryType:
    """Every type llama-quantize offers, made from the demo model: (type, with an imatrix) -> foretold and made."""
    types = sorted((kind.name for kind in engine.toolchain.types if not kind.alias_of), key=lambda name: name not in SLOW)
    wanted = [(name, weighed) for weighed in (True, False) for name in types]

    def one(key: tuple[str, bool]) -> Foretold:
        name, weighed = key
        imatrix = demo_imatrix if weighed else None
        (level,) = resolve_levels([name], engine.toolchain.types)
        recipe, _ = predict(engine, demo_model, level, imatrix)
        return Foretold(recipe, quantized(tools, demo_model, level.ftype, imatrix=imatrix))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def test_the_verdict_is_right_for_every_type(every_type: EveryType) -> None:
    foretold = {key: not made.recipe.failures for key, made in every_type.items()}
    assert foretold == {key: made.succeeded for key, made in every_type.items()}


def test_the_size_is_right_to_the_byte_for_every_type(every_type: EveryType) -> None:
    made = {key: made for key, made in every_type.items() if made.succeeded}
    assert {key: one.recipe.file_bytes for key, one in made.items()} == {key: one.file.size for key, one in made.items()}
    assert len(made) > 60


def test_every_tensor_gets_the_type_foretold(every_type: EveryType) -> None:
    for key, made in every_type.items():
        if made.succeeded:
            foretold = {(row.name, row.type, row.shape, row.n_bytes) for row in made.recipe.tensors}
            assert foretold == set(made.file.tensors), key


def test_exactly_the_low_types_need_an_imatrix(every_type: EveryType) -> None:
    """llama.cpp, src/llama-quant.cpp, tensor_requires_imatrix(); seen in dry runs of every type."""
    expected = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
    for weighed in (True, False):
        assert {name for (name, with_one), made in every_type.items() if with_one is weighed and made.recipe.needs_imatrix} == (
            expected
        )


def test_a_missing_imatrix_is_the_reason_given(every_type: EveryType) -> None:
    assert every_type["IQ2_XS", False].recipe.failures == (NO_IMATRIX,)
    assert every_type["IQ2_XS", True].recipe.failures == ()


def test_figures_of_a_recipe(every_type: EveryType) -> None:
    made = every_type["Q8_0", True]
    data = sum(n_bytes or 0 for _, _, _, n_bytes in made.file.tensors)
    assert made.recipe.data_bytes == data
    assert made.recipe.n_elements == sum(prod(shape) for _, _, shape, _ in made.file.tensors)
    assert made.recipe.bits_per_weight == pytest.approx(8 * data / made.recipe.n_elements)
    assert 8.5 <= made.recipe.bits_per_weight < 8.6
    assert (made.recipe.fallbacks, made.recipe.fallback_share) == ((), 0)
    assert {row.name for row in made.recipe.tensors if not row.changes} == {
        name for name, kind, _, _ in made.file.tensors if kind == "F32"
    }


@pytest.mark.parametrize("level", ["Q4_K_M", "Q3_K_XL", "Q4_0", "Q2_K", "Q6_K", "TQ1_0", "MXFP4_MOE", "F16"])
@pytest.mark.parametrize(
    "shape",
    [{"odd": True}, {"tied": True, "dtype": "f16"}, {"experts": 4, "ff": 256}, {"dtype": "f32", "metadata": {"a.key": "é"}}],
    ids=["odd", "tied", "experts", "f32"],
)
def test_other_architectures_are_foretold_to_the_byte(
    engine: BinariesEngine, tmp_path: Path, shape: dict[str, object], level: str
) -> None:
    model = write_llama_gguf(tmp_path / "m.gguf", layers=1, vocab=300, **shape)  # type: ignore[arg-type]
    made = make(engine, model, level, tmp_path / "o.gguf", None)
    assert isinstance(made.outcome, Quantized), made.outcome
    assert made.recipe.failures == ()
    assert made.recipe.file_bytes == made.out.stat().st_size
    assert made.recipe.fallbacks == made.outcome.fallbacks


def test_the_share_of_fallbacks_is_that_of_their_weights(engine: BinariesEngine, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "m.gguf", layers=2, odd=True)
    recipe, _ = predict(engine, model, Level("Q4_K_M", "Q4_K_M"), None)
    down = sum(row.n_elements for row in recipe.tensors if "ffn_down" in row.name)
    assert [fallback.tensor for fallback in recipe.fallbacks] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert recipe.fallback_share == pytest.approx(down / recipe.n_elements)


@pytest.mark.parametrize(
    ("tensor", "options"),
    [
        ("output.weight", QuantizeOptions(output_tensor_type="q4_k")),
        ("token_embd.weight", QuantizeOptions(token_embedding_type="iq4_xs")),
    ],
)
def test_a_type_forced_on_a_shape_it_cannot_hold_is_foretold_to_fail(
    engine: BinariesEngine, tmp_path: Path, tensor: str, options: QuantizeOptions
) -> None:
    """These two options skip llama.cpp's fallback, and its own dry run does not notice."""
    model = write_llama_gguf(tmp_path / "m.gguf", hidden=288, layers=1, vocab=300)
    made = make(engine, model, "Q8_0", tmp_path / "o.gguf", None, options)
    assert not made.succeeded
    assert made.recipe.file_bytes is None
    (failure,) = made.recipe.failures
    assert tensor in failure.why
    assert "rows of 288" in failure.why
    assert "blocks of 256" in failure.why
    assert "-type q8_0" in failure.todo


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (QuantizeOptions(), lambda _name: True),
        (QuantizeOptions(include_weights=("attn_q", "ffn_up")), lambda name: "attn_q" in name or "ffn_up" in name),
        (QuantizeOptions(exclude_weights=("blk.1.", "ffn")), lambda name: "blk.1." not in name and "ffn" not in name),
        (QuantizeOptions(exclude_weights=("blk",)), lambda _name: False),
    ],
    ids=["all", "include", "exclude", "none left"],
)
def test_included_and_excluded_weights_are_those_llama_quantize_uses(
    engine: BinariesEngine,
    demo_model: Path,
    demo_imatrix: Path,
    tmp_path: Path,
    options: QuantizeOptions,
    kept: Callable[[str], bool],
) -> None:
    made = make(engine, demo_model, "Q4_K_S", tmp_path / "o.gguf", demo_imatrix, options)
    assert isinstance(made.outcome, Quantized)
    expected = {name for name in read(demo_imatrix).matrix.entries if kept(name)}
    assert (set(made.weights.sizes) if made.weights else set()) == expected
    assert read_header(made.out).integer("quantize.imatrix.entries_count") == (len(expected) or None)
    assert made.recipe.file_bytes == made.out.stat().st_size
    assert set(made.recipe.weightless) == set(made.outcome.without_weights) - set(NEVER_WEIGHED)


def test_a_tensor_that_cannot_do_without_its_weights_is_foretold_to_fail(
    engine: BinariesEngine, demo_model: Path, demo_imatrix: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(exclude_weights=("blk.1.attn_k",))
    made = make(engine, demo_model, "Q2_K_S", tmp_path / "o.gguf", demo_imatrix, options)
    assert not made.succeeded
    (failure,) = made.recipe.failures
    assert failure.why.startswith("blk.1.attn_k.weight becomes Q2_K, which requires imatrix data")
    assert "--exclude-weights leave it out" in failure.why
    assert "--uncovered q4_k" in failure.todo


def test_a_misfit_is_foretold_to_fail(engine: BinariesEngine, demo_model: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    whole = read(demo_imatrix).matrix
    changed = {**whole.entries, "blk.0.attn_q.weight": entry([1, 2, 3], 1), "token_embd.weight": entry([1], 1)}
    write_gguf(replace(whole, entries=dict(sorted(changed.items()))), tmp_path / "i.gguf")
    made = make(engine, demo_model, "Q4_K_M", tmp_path / "o.gguf", tmp_path / "i.gguf")
    assert not made.succeeded
    (failure,) = made.recipe.failures
    assert failure.why == "the imatrix has 3 values for blk.0.attn_q.weight, the model needs 256"


@pytest.mark.parametrize("level", ["Q4_K_M", "Q8_0"])
def test_pruned_layers_are_renumbered_and_keep_their_own_weights(
    engine: BinariesEngine, demo_model: Path, demo_imatrix: Path, tmp_path: Path, level: str
) -> None:
    options = QuantizeOptions(prune_layers="0,2", exclude_weights=("blk.3.attn_q",))
    made = make(engine, demo_model, level, tmp_path / "o.gguf", demo_imatrix, options)
    assert isinstance(made.outcome, Quantized)
    header = read_header(made.out)
    assert [row.name for row in made.recipe.tensors] == [tensor.name for tensor in header.tensors]
    assert header.integer("llama.block_count") == 2
    assert made.recipe.file_bytes == made.out.stat().st_size
    # The old layer 3 is the new layer 1. llama-quantize names tensors anew, the recipe tells them by the model's names.
    assert made.recipe.weightless == ("blk.3.attn_q.weight",)
    assert "blk.1.attn_q.weight" in made.outcome.without_weights


def test_overridden_metadata_counts_in_the_size(engine: BinariesEngine, demo_model: Path, tmp_path: Path) -> None:
    name = read_header(demo_model).text("general.name")
    assert name is not None
    overrides = (f"general.name=str:{name} and more", "new.flag=bool:true", "new.number=int:7", "new.ratio=float:0.5")
    options = QuantizeOptions(override_kv=overrides)
    made = make(engine, demo_model, "Q8_0", tmp_path / "o.gguf", None, options)
    assert made.recipe.file_bytes == made.out.stat().st_size
    assert read_header(made.out).text("general.name") == f"{name} and more"


@pytest.mark.parametrize("name", ["i.gguf", "long-" * 30 + ".gguf"])
@pytest.mark.parametrize("datasets", [("x",), ("d" * 200, "y"), ()])
def test_names_of_any_length_count_as_llama_quantize_cuts_them(
    engine: BinariesEngine, demo_model: Path, demo_imatrix: Path, tmp_path: Path, name: str, datasets: tuple[str, ...]
) -> None:
    write_gguf(replace(read(demo_imatrix).matrix, datasets=datasets), tmp_path / name)
    made = make(engine, demo_model, "Q8_0", tmp_path / "o.gguf", tmp_path / name)
    assert made.recipe.file_bytes == made.out.stat().st_size


def test_a_legacy_imatrix_counts_like_any_other(
    engine: BinariesEngine, demo_model: Path, demo_imatrix: Path, tmp_path: Path
) -> None:
    legacy = tmp_path / "imatrix.dat"
    tool = str(engine.toolchain.tool("llama-imatrix"))
    arguments = ("-m", "unused", "--in-file", str(demo_imatrix), "-o", str(legacy), "--output-format", "dat", "-c", "64")
    assert Runner().run(Command((tool, *arguments))).ok
    made = make(engine, demo_model, "Q4_K_M", tmp_path / "o.gguf", legacy)
    assert made.recipe.failures == ()
    assert made.recipe.file_bytes == made.out.stat().st_size


def test_a_split_source_becomes_one_file_of_the_size_foretold(engine: BinariesEngine, demo_model: Path, tmp_path: Path) -> None:
    tool = str(engine.toolchain.tool("llama-gguf-split"))
    split = Command((tool, "--split", "--split-max-tensors", "20", str(demo_model), str(tmp_path / "split")))
    assert Runner().run(split).ok
    made = make(engine, tmp_path / "split-00001-of-00002.gguf", "Q4_K_M", tmp_path / "o.gguf", None)
    assert made.recipe.file_bytes == made.out.stat().st_size


@pytest.mark.parametrize("allowed", [True, False])
def test_a_quantised_source_is_judged_by_what_would_change(engine: BinariesEngine, tmp_path: Path, allowed: bool) -> None:
    source = make(engine, write_llama_gguf(tmp_path / "m.gguf", layers=1), "Q8_0", tmp_path / "q8.gguf", None).out
    made = make(engine, source, "Q4_0", tmp_path / "o.gguf", None, QuantizeOptions(allow_requantize=allowed))
    assert made.succeeded is allowed
    assert (not made.recipe.failures) is allowed


def test_while_the_imatrix_is_still_to_be_made_what_is_expected_of_it_counts(demo_model: Path) -> None:
    model = open_gguf(demo_model, allow_requantize=False)
    types = {tensor.name: tensor.type_name.lower() for tensor in model.tensors} | {"blk.0.attn_q.weight": "iq2_xs"}
    dry = DryRun(types, (), needs_imatrix=True)
    level = Level("IQ2_XS", "IQ2_XS")

    def failures(expected: ExpectedMatrix | None, options: QuantizeOptions = NO_OPTIONS) -> list[str]:
        weights = expected_weights(expected, options) if expected is not None else None
        recipe = make_recipe(level, model.header, model.tensors, dry, weights, options)
        assert recipe.needs_imatrix
        return [failure.why for failure in recipe.failures]

    assert failures(expect(model)) == []
    assert failures(None) == [NO_IMATRIX.why]
    (why,) = failures(expect(model), QuantizeOptions(exclude_weights=("attn_q",)))
    assert why.startswith("blk.0.attn_q.weight becomes IQ2_XS")


def test_a_fork_s_type_has_an_unknown_size_and_no_failure(demo_model: Path) -> None:
    header = read_header(demo_model)
    types = {tensor.name: tensor.type_name.lower() for tensor in header.tensors} | {"blk.0.attn_q.weight": "q3_k_hifi"}
    dry = DryRun(types, (Fallback("blk.0.attn_k.weight", "q3_k_hifi", "q4_0"),), needs_imatrix=False)
    recipe = make_recipe(Level("Q3_K_HIFI", "Q3_K_HIFI"), header, header.tensors, dry, None, QuantizeOptions())
    assert (recipe.file_bytes, recipe.data_bytes, recipe.bits_per_weight) == (None, None, None)
    assert recipe.failures == ()
    assert recipe.fallback_share > 0


def test_usable_weights_tell_what_goes_into_the_metadata() -> None:
    weights = usable_weights(matrix(datasets=("a", "b"), chunk_count=7), Path("/x/i.gguf"), QuantizeOptions())
    assert (weights.file_name, weights.dataset, weights.chunks) == ("i.gguf", "a", 7)
    assert weights.sizes == {"blk.0.attn_q.weight": 4}
    assert usable_weights(matrix(datasets=()), Path("i.gguf"), QuantizeOptions()).dataset is None


@pytest.mark.parametrize("ftype", ["F16", "BF16", "F32", "COPY", "bf16"])
def test_tensor_types_are_ignored_for_plain_types_only(ftype: str) -> None:
    options = QuantizeOptions(tensor_types=("ffn=q8_0",))
    assert ignored_tensor_types(Level(ftype, ftype), options)
    assert not ignored_tensor_types(Level(ftype, ftype), QuantizeOptions())
    assert not ignored_tensor_types(Level("Q4_K_M", "Q4_K_M"), options)


def test_memory_is_bounded_by_the_largest_tensor_or_the_option(demo_model: Path) -> None:
    tensors = read_header(demo_model).tensors
    largest = max(tensor.n_elements for tensor in tensors)
    program = buffer_bytes((), None)
    assert buffer_bytes(tensors, None) == program + 8 * largest
    assert buffer_bytes(tensors, 1) == program + (1 << 20)


def test_the_sizes_of_types_come_from_their_blocks() -> None:
    number = type_id("q4_K")
    assert number is not None
    assert tensor_bytes((256, 2), number) == 2 * 144
    assert tensor_bytes((255, 2), number) is None
