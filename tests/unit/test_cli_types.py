"""Sizes and lists of levels as people type them."""

from __future__ import annotations

import click
import pytest

from imatrix_runner.cli.types import SIZE, LevelNames


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 << 30),
        ("8 GB", 8 << 30),
        ("8g", 8 << 30),
        ("1.5G", 3 << 29),
        ("500MiB", 500 << 20),
        ("1T", 1 << 40),
        ("64K", 64 << 10),
        ("900B", 900),
        ("8589934592", 8 << 30),
        (8 << 30, 8 << 30),
    ],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert SIZE.convert(text, None, None) == n_bytes


@pytest.mark.parametrize(("text", "number"), [("8", "8"), (8, "8"), ("24.0", "24.0"), ("1024", "1024"), ("900000", "900000")])
def test_a_small_number_without_a_unit_is_not_taken_for_bytes(text: str | int, number: str) -> None:
    with pytest.raises(click.BadParameter, match=f"has no unit and would mean bytes; for GiB, write {number}GiB"):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize("text", ["", "0", "0GiB", "lots", "-8GiB", "8,5GiB", "8XB", "1e9", "8 GiB of it", "\u0668GiB ?"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        SIZE.convert(text, None, None)


def test_a_list_of_levels_keeps_the_two_sizes_of_a_mix_together() -> None:
    text = " Q4_K_M,MIX@ram:64GiB, vram:24GiB,,MIX@4GiB,"
    assert LevelNames().convert(text, None, None) == ("Q4_K_M", "MIX@ram:64GiB,vram:24GiB", "MIX@4GiB")
