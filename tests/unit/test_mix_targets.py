"""Targets of mixes as people type them, and the names that mixes get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.ftypes import _OFFERED
from imatrix_runner.errors import ToolchainError, UsageError
from imatrix_runner.mixes.naming import _PRESETS, mix_name, nearest_preset
from imatrix_runner.mixes.targets import (
    BitsTarget,
    KldTarget,
    LikeTarget,
    MemoryTarget,
    SizeTarget,
    SpeedTarget,
    Target,
    is_mix,
    parse_target,
    split_names,
)

GIB = 1 << 30
ALL = tuple(name for name, _, help_text in _OFFERED if not help_text.startswith("alias"))


@pytest.mark.parametrize(
    ("name", "target", "spelling"),
    [
        ("MIX@4GiB", SizeTarget(4 * GIB), "MIX@4GiB"),
        ("mix@4096mib", SizeTarget(4 * GIB), "MIX@4GiB"),
        ("MIX@1.5g", SizeTarget(3 * GIB // 2), "MIX@1.5GiB"),
        ("MIX@4900000000", SizeTarget(4_900_000_000), "MIX@4900000000B"),
        ("MIX@4.25bpw", BitsTarget(4.25), "MIX@4.25bpw"),
        ("Mix@ 4.0 BPW ", BitsTarget(4.0), "MIX@4bpw"),
        ("mix@like:q4_k_m", LikeTarget("Q4_K_M"), "MIX@like:Q4_K_M"),
        ("MIX@LIKE: IQ3_XXS", LikeTarget("IQ3_XXS"), "MIX@like:IQ3_XXS"),
        ("MIX@kld:0.02", KldTarget(0.02), "MIX@kld:0.02"),
        ("mix@KLD:2e-2", KldTarget(0.02), "MIX@kld:0.02"),
        ("MIX@ram:64GiB,vram:24GiB", MemoryTarget(64 * GIB, 24 * GIB), "MIX@ram:64GiB,vram:24GiB"),
        ("MIX@VRAM:24g, RAM:64g", MemoryTarget(64 * GIB, 24 * GIB), "MIX@ram:64GiB,vram:24GiB"),
        ("MIX@vram:24GiB", MemoryTarget(0, 24 * GIB), "MIX@vram:24GiB"),
        ("MIX@ram:64GiB", MemoryTarget(64 * GIB, 0), "MIX@ram:64GiB"),
        ("mix@SPEED: 20.0", SpeedTarget(20.0), "MIX@speed:20"),
    ],
)
def test_targets(name: str, target: Target, spelling: str) -> None:
    assert parse_target(name) == target
    assert target.spelling == spelling
    assert parse_target(spelling) == target
    assert is_mix(name)


SIZES = st.integers(1, 1 << 46)


@given(
    st.one_of(
        st.builds(SizeTarget, SIZES),
        st.builds(BitsTarget, st.floats(1e-3, 32)),
        st.builds(KldTarget, st.floats(1e-9, 1e9)),
        st.builds(LikeTarget, st.sampled_from(ALL)),
        st.builds(MemoryTarget, SIZES, st.integers(0, 1 << 46)),
        st.builds(SpeedTarget, st.floats(1e-3, 1e6)),
    )
)
def test_a_spelling_is_read_back(target: Target) -> None:
    assert parse_target(target.spelling) == target
    assert split_names(f"Q8_0,{target.spelling},{target.spelling.lower()}")[1:] == (target.spelling, target.spelling.lower())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MIX", "it does not say for which size or quality"),
        ("MIX@", "it does not say for which size or quality"),
        ("MIX@12", "'12' has no unit and would mean bytes; for GiB, write 12GiB"),
        ("MIX@0", "'0' is not a size such as 4GiB or 500MiB"),
        ("MIX@0GiB", "'0gib' is not a size such as 4GiB or 500MiB"),
        ("MIX@-4GiB", "'-4gib' is not a size such as 4GiB or 500MiB"),
        ("MIX@small", "'small' is not a size such as 4GiB or 500MiB"),
        ("MIX@Q4_K_M", "'q4_k_m' is not a size such as 4GiB or 500MiB"),
        ("MIX@0bpw", "'0' is not a number of bits such as 4.25bpw"),
        ("MIX@bpw", "'' is not a number of bits such as 4.25bpw"),
        ("MIX@4,25bpw", "'4,25' is not a number of bits such as 4.25bpw"),
        ("MIX@33bpw", "no model has more than 32 bits per weight"),
        ("MIX@like:", "'' is not the name of a level such as Q4_K_M"),
        ("MIX@like:MIX@4GiB", "'MIX@4GIB' is not the name of a level such as Q4_K_M"),
        ("MIX@kld:", "'' is not a KLD such as 0.02"),
        ("MIX@kld:0", "'0' is not a KLD such as 0.02"),
        ("MIX@kld:nan", "'nan' is not a KLD such as 0.02"),
        ("MIX@kld:1e-99999", "'1e-99999' is not a KLD such as 0.02"),
        ("MIX@size:4GiB", "'size' is not one of like, kld, ram, vram and speed"),
        ("MIX@speed:0", "'0' is not a number of tokens per second such as 20"),
        ("MIX@ram:4GiB,ram:8GiB", "ram is given twice"),
        ("MIX@ram:4GiB,8GiB", "'8gib' is not ram:SIZE or vram:SIZE"),
        ("MIX@ram:64", "'64' has no unit and would mean bytes; for GiB, write 64GiB"),
        ("MIX@vram:", "'' is not a size such as 4GiB or 500MiB"),
    ],
)
def test_targets_that_are_not_understood(name: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(name)
    assert (caught.value.what, caught.value.why) == (f"Invalid mix {name!r}", why)
    assert caught.value.todo.startswith("For example: MIX@4GiB")
    assert is_mix(name)


@given(st.text(max_size=20))
def test_any_text_is_a_target_or_a_usage_error(text: str) -> None:
    try:
        target = parse_target(f"MIX@{text}")
    except UsageError:
        return
    assert parse_target(target.spelling) == target


@pytest.mark.parametrize("name", ["Q4_K_M", "MIXED", "MIXTRAL@4GiB", "", "@4GiB", "MIX-4.25bpw-IQ4_XS"])
def test_other_names_are_no_mixes(name: str) -> None:
    assert not is_mix(name)


# Names


@pytest.mark.parametrize(
    ("bits", "others", "name"),
    [
        (4.2512, (), "MIX-4.25bpw-IQ4_XS"),
        (4.0, ("MIX-4.25bpw-IQ4_XS",), "MIX-4.00bpw-IQ4_XS"),
        (4.2512, ("MIX-4.25bpw-IQ4_XS",), "MIX-4.251bpw-IQ4_XS"),
        (4.2512, ("mix-4.25bpw-iq4_xs", "MIX-4.251bpw-IQ4_XS"), "MIX-4.2512bpw-IQ4_XS"),
        (4.25, ("MIX-4.25bpw-IQ4_XS", "MIX-4.250bpw-IQ4_XS", "MIX-4.2500bpw-IQ4_XS"), "MIX-4.2500bpw-2-IQ4_XS"),
        (4.25, tuple(f"MIX-4.25{rest}-IQ4_XS" for rest in ("bpw", "0bpw", "00bpw", "00bpw-2")), "MIX-4.2500bpw-3-IQ4_XS"),
        (4.25, ("MIX-4.25bpw-Q4_K_S",), "MIX-4.25bpw-IQ4_XS"),
    ],
)
def test_names(bits: float, others: tuple[str, ...], name: str) -> None:
    assert mix_name(bits, "IQ4_XS", others) == name


@pytest.mark.parametrize(
    ("elements", "bits", "preset"),
    [
        ({"IQ4_XS": 60, "Q5_K": 30, "Q6_K": 10}, 4.6, "IQ4_XS"),
        ({"q4_K": 80, "q6_K": 20, "F32": 1}, 4.9, "Q4_K_M"),
        ({"q4_K": 80, "q6_K": 20}, 4.6, "Q4_K_S"),
        ({"Q3_K": 50, "Q2_K": 10, "Q5_K": 40}, 4.2, "Q3_K_L"),
        # Half of it is Q2_K, but it is as large as Q3_K_L: its other types count.
        ({"Q2_K": 50, "IQ4_XS": 40, "Q6_K": 10}, 4.2, "IQ4_XS"),
        ({"IQ2_S": 90, "Q6_K": 10}, 2.95, "IQ2_M"),
        ({"Q8_0": 1}, 8.5, "Q8_0"),
        # No preset has a main type that occurs.
        ({"NVFP4": 1, "F32": 0}, 4.5, "IQ4_XS"),
    ],
)
def test_presets(elements: dict[str, int], bits: float, preset: str) -> None:
    assert nearest_preset(elements, bits, ALL) == preset


def test_only_file_types_of_the_library_are_chosen() -> None:
    offered = ("q4_k_m", "Q6_K", "COPY", "Q4_K")
    assert nearest_preset({"IQ4_XS": 1}, 4.25, offered) == "Q4_K_M"
    with pytest.raises(ToolchainError, match="A mix cannot be named"):
        nearest_preset({"IQ4_XS": 1}, 4.25, ("COPY", "Q4_K"))


def test_every_file_type_but_aliases_has_a_row() -> None:
    """Of those that llama.cpp offers."""
    assert {*_PRESETS} == {*ALL}
