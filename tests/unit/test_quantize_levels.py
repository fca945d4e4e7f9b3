"""Level names: what the tools offer, what publishers call it, and what was probably meant."""

from __future__ import annotations

import pytest

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.levels import DEFAULT_LEVELS, PRESETS, Level, offered, preset_levels, resolve_levels
from imatrix_runner.errors import UsageError
from imatrix_runner.toolchain.probe import Toolchain
from support.values import quant_types

TYPES = quant_types("Q4_K_M", "Q3_K_L", "Q3_K_M", "IQ2_XS", "Q8_0", "F16", "COPY", aliases={"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M"})


def names(levels: tuple[Level, ...]) -> list[str]:
    return [level.name for level in levels]


@pytest.mark.parametrize(("preset", "count"), [("bartowski", 26), ("mradermacher-i1", 24), ("k-quants", 9)])
def test_the_real_tools_offer_every_level_of_a_preset(toolchain: Toolchain, preset: str, count: int) -> None:
    levels, missing = preset_levels(preset, toolchain.types)
    assert (len(levels), missing) == (count, ())
    assert len(set(levels)) == count


def test_all_means_every_quantisation_the_tools_offer(toolchain: Toolchain) -> None:
    levels, missing = preset_levels("all", toolchain.types)
    plain = {"F32", "F16", "BF16", "COPY"}
    assert missing == ()
    assert set(names(levels)) == {kind.name for kind in toolchain.types if not kind.alias_of} - plain
    assert len(levels) > 30


def test_every_preset_and_the_default_can_be_made_with_the_real_tools(toolchain: Toolchain) -> None:
    assert names(resolve_levels(DEFAULT_LEVELS, toolchain.types)) == list(DEFAULT_LEVELS)
    assert all(preset_levels(preset, toolchain.types)[0] for preset in PRESETS)


def test_a_preset_goes_on_without_what_is_not_offered() -> None:
    levels, missing = preset_levels("k-quants", TYPES)
    assert names(levels) == ["Q4_K_M", "Q3_K_L", "Q3_K_M"]
    assert missing == ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_S", "Q3_K_S", "Q2_K")


@pytest.mark.parametrize(
    ("variant", "base"),
    [("Q6_K_L", "Q6_K"), ("Q5_K_L", "Q5_K_M"), ("Q4_K_L", "Q4_K_M"), ("Q3_K_XL", "Q3_K_L"), ("Q2_K_L", "Q2_K")],
)
def test_a_variant_is_its_base_with_embeddings_and_output_at_eight_bits(toolchain: Toolchain, variant: str, base: str) -> None:
    assert resolve_levels([variant], toolchain.types) == (Level(variant, base, "q8_0", "q8_0"),)


def test_a_variant_needs_its_base() -> None:
    assert "Q4_K_L" in offered(TYPES)
    assert "Q6_K_L" not in offered(TYPES)


def test_a_fork_s_own_variant_wins_over_ours() -> None:
    levels = resolve_levels(["Q4_K_L"], quant_types("Q4_K_M", "Q4_K_L"))
    assert levels == (Level("Q4_K_L", "Q4_K_L"),)


def test_aliases_stand_for_the_type_they_name() -> None:
    assert names(resolve_levels(["Q3_K", "Q4_K"], TYPES)) == ["Q3_K_M", "Q4_K_M"]


def test_each_level_once_in_the_order_asked_for_whatever_the_case() -> None:
    asked = ["iq2_xs", " Q4_K_M ", "q4_k", "IQ2_XS", "Q8_0"]
    assert names(resolve_levels(asked, TYPES)) == ["IQ2_XS", "Q4_K_M", "Q8_0"]


def test_a_fork_s_type_is_a_level_as_soon_as_its_tools_offer_it() -> None:
    assert resolve_levels(["q3_k_hifi"], quant_types("Q3_K_HIFI")) == (Level("Q3_K_HIFI", "Q3_K_HIFI"),)
    with pytest.raises(UsageError, match="Unknown level 'Q3_K_HIFI'"):
        resolve_levels(["Q3_K_HIFI"], TYPES)


def test_an_unknown_level_suggests_near_ones_and_lists_all() -> None:
    with pytest.raises(UsageError, match="Unknown level 'Q4_KM'") as caught:
        resolve_levels(["Q8_0", "Q4_KM"], TYPES)
    assert "similar names are Q4_K_M" in caught.value.why
    assert all(name in caught.value.todo for name in ("IQ2_XS", "Q3_K_XL", "F16"))


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_levels(["zzzz"], TYPES)
    assert "near" not in caught.value.why


@pytest.mark.parametrize("asked", [[], ()])
def test_no_level_is_an_error(asked: list[str]) -> None:
    with pytest.raises(UsageError, match="No level to make"):
        resolve_levels(asked, TYPES)


def test_what_the_user_asks_for_wins_over_the_variant() -> None:
    variant = Level("Q4_K_L", "Q4_K_M", "q8_0", "q8_0")
    chosen = variant.apply(QuantizeOptions(token_embedding_type="q6_k", pure=True))
    assert (chosen.token_embedding_type, chosen.output_tensor_type, chosen.pure) == ("q6_k", "q8_0", True)
    plain = QuantizeOptions(output_tensor_type="f16")
    assert Level("Q4_K_M", "Q4_K_M").apply(plain) == plain
