"""Parts of choosing a mix that need no model: types, places of a text, comparisons, the recipe's files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.cost_jobs import TrialResult
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.mixes.compare_recipes import compare, kld_per_token
from imatrix_runner.mixes.measure_costs import places
from imatrix_runner.mixes.mix_recipe import (
    MeasuredRecipe,
    MixRecipe,
    as_json,
    as_tensor_types,
    pins_of,
    read_recipe,
    write_new,
)
from imatrix_runner.mixes.mix_tensors import ALWAYS, FAMILIES, allowed_types

RECIPE = MixRecipe(
    level="MIX-4.25bpw-IQ4_XS",
    ftype="IQ4_XS",
    types={"blk.0.attn_q.weight": "Q4_K", "blk.10.attn_q.weight": "IQ3_XXS"},
    n_bytes=1000,
    bits_per_weight=4.25,
    predicted_kld=0.02,
    measured=(MeasuredRecipe("mix", 1000, 0.01, 0.6, 0.05, 0.7, 0.01), MeasuredRecipe("IQ4_XS", 1000, 0.0166)),
    stock="IQ4_XS",
)


class TestTypes:
    def test_all_families_by_default(self) -> None:
        assert set(allowed_types("")) == {name for family in FAMILIES.values() for name in family} | {*ALWAYS}

    def test_a_family_and_a_type(self) -> None:
        assert allowed_types("k, iq4_xs") == (*FAMILIES["k"], "Q8_0", "IQ4_XS")

    def test_named_types_alone(self) -> None:
        assert allowed_types("q4_k,Q6_K") == ("Q4_K", "Q6_K")

    @pytest.mark.parametrize("text", ["Q4_K_M", "kk", "mxfp4", "k;iq"])
    def test_other_words_are_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="Invalid --types") as refused:
            allowed_types(text)
        assert "Q4_K" in refused.value.todo


class TestPlaces:
    @given(n_chunks=st.integers(6, 2000), n_ctx=st.sampled_from([64, 128, 256, 300, 512, 2048]))
    def test_probes_and_recipes_share_no_token(self, n_chunks: int, n_ctx: int) -> None:
        found = places(n_chunks, CollectOptions(n_ctx=n_ctx), 3072)
        probes = {
            token for chunk in found.probes for token in (chunk * found.probe_context, (chunk + 1) * found.probe_context - 1)
        }
        recipes = {token // n_ctx for token in probes} & {*found.recipes}
        assert not recipes
        assert found.probes
        assert len(found.recipes) >= 3
        assert max(found.recipes) < n_chunks
        assert len(found.probes) * found.probe_context <= max(3072, 2 * n_ctx)
        assert len({*found.recipes}) == len(found.recipes) <= n_chunks

    def test_a_long_text_has_32_of_each(self) -> None:
        found = places(480, CollectOptions(), 8192)
        assert (len(found.probes), found.probe_context, len(found.recipes)) == (32, 256, 32)

    def test_the_first_batch_is_spread_over_the_text(self) -> None:
        first = places(480, CollectOptions(), 8192).recipes[:4]
        assert max(first) - min(first) > 300

    def test_too_short_a_text(self) -> None:
        with pytest.raises(InvalidDataError, match="too short") as refused:
            places(5, CollectOptions(), 8192)
        assert "5 chunks" in refused.value.why


def result(kld: list[float], same: int = 90) -> TrialResult:
    n = len(kld)
    return TrialResult("a", tuple(range(n)), (100,) * n, tuple(kld), (same,) * n, (50.0,) * n, (49.0,) * n)


class TestComparison:
    def test_half_everywhere_is_surely_better(self) -> None:
        other = result([1.0, 2.0, 10.0, 0.5])
        found = compare(result([0.5, 1.0, 5.0, 0.25], same=95), other)
        assert (found.ratio, found.error, found.log_error) == (0.5, 0.0, 0.0)
        assert found.typical == pytest.approx(0.5)
        assert found.same_top == pytest.approx(0.05)
        assert found.is_better

    def test_one_lucky_chunk_is_not_enough(self) -> None:
        found = compare(result([1.0, 1.1, 1.0, 0.1]), result([1.0, 1.0, 1.1, 1.0]))
        assert found.ratio < 0.8
        assert not found.is_better

    def test_better_in_nearly_every_chunk_is_enough_although_one_decides_the_mean(self) -> None:
        found = compare(result([0.6] * 15 + [96.0]), result([1.0] * 15 + [100.0]))
        assert found.ratio + 2 * found.error > 1
        assert found.typical == pytest.approx(0.6, rel=0.05)
        assert found.is_better

    def test_better_in_most_chunks_but_worse_on_the_whole_is_not_better(self) -> None:
        assert not compare(result([0.6] * 15 + [130.0]), result([1.0] * 15 + [100.0])).is_better

    def test_stock_without_any_divergence_is_not_worse(self) -> None:
        assert not compare(result([0.0, 0.0]), result([0.0, 0.0])).is_better

    def test_the_errors_are_those_of_drawing_chunks_again(self) -> None:
        random = np.random.default_rng(3)
        other = random.gamma(2, 1, 400)
        mine = other * random.normal(0.7, 0.1, 400)
        found = compare(result([*mine]), result([*other]))
        draws = random.integers(0, 400, (4000, 400))
        drawn = mine[draws].sum(axis=1) / other[draws].sum(axis=1)
        assert found.error == pytest.approx(drawn.std(), rel=0.1)
        assert found.log_error == pytest.approx(np.log(mine / other)[draws].mean(axis=1).std(), rel=0.1)

    def test_mean_per_token(self) -> None:
        assert kld_per_token(result([1.0, 2.0])) == pytest.approx(0.015)


class TestFiles:
    def test_a_recipe_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.json"
        assert write_new(path, as_json(RECIPE))
        assert read_recipe(path) == RECIPE

    def test_a_file_of_the_user_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.json"
        path.write_text("mine")
        assert not write_new(path, as_json(RECIPE))
        assert path.read_text() == "mine"

    def test_each_pattern_matches_its_tensor_alone(self) -> None:
        names = ["blk.0.attn_q.weight", "blk.10.attn_q.weight", "blk.0.attn_qkv.weight", "xblk.0.attn_q.weight"]
        for pin, name in zip(pins_of(RECIPE.types), RECIPE.types, strict=True):
            pattern, _, kind = pin.partition("=")
            assert [each for each in names if re.search(pattern, each)] == [name]
            assert kind == RECIPE.types[name].lower()

    def test_tensor_types_for_llama_quantize(self) -> None:
        assert as_tensor_types(RECIPE).split() == [pin.encode() for pin in pins_of(RECIPE.types)]

    def test_another_version_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.json"
        path.write_bytes(as_json(RECIPE).replace(b'"version":1', b'"version":2'))
        with pytest.raises(InvalidDataError, match="another version"):
            read_recipe(path)

    def test_the_level_says_what_it_is(self) -> None:
        level = RECIPE.as_level()
        assert (level.name, level.ftype) == ("MIX-4.25bpw-IQ4_XS", "IQ4_XS")
        (mark,) = level.override_kv
        assert RECIPE.digest in mark
        assert len(mark.partition("str:")[2]) <= 127
