"""The split between GPU and memory: nothing is counted twice or forgotten, and llama.cpp's options say the same."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.mixes.offload import Offload, offload


def moe(n_layers: int = 6, dense: int = 1, tied: bool = False) -> dict[str, int]:
    """A file with experts in all layers but the first ``dense``; the sizes tell who is who."""
    sizes = {"token_embd.weight": 10_000, "output_norm.weight": 7}
    if not tied:
        sizes["output.weight"] = 3_000
    for n in range(n_layers):
        sizes |= {f"blk.{n}.attn_q.weight": 200, f"blk.{n}.attn_norm.weight": 1}
        if n < dense:
            sizes |= {f"blk.{n}.ffn_{kind}.weight": 400 for kind in ("gate", "up", "down")}
        else:
            sizes |= {f"blk.{n}.ffn_{kind}_exps.weight": 100_000 + n for kind in ("gate", "up", "down")}
            sizes |= {f"blk.{n}.ffn_gate_inp.weight": 5, f"blk.{n}.ffn_up_shexp.weight": 50, f"blk.{n}.ffn_up_exps.bias": 20}
    return sizes


def on_gpu(sizes: dict[str, int], flags: tuple[str, ...]) -> set[str]:
    """The tensors that llama.cpp puts on the GPU: by ``-ngl`` (the input layer never, the output layer first, blocks from the
    last), unless the pattern of ``-ot`` is found in the name."""
    options = dict(zip(flags[::2], flags[1::2], strict=True))
    pattern, _, buffer = options.get("-ot", "^$=CPU").partition("=")
    assert buffer == "CPU"
    numbers = {int(name.split(".")[1]) for name in sizes if name.startswith("blk.")}
    first = max(numbers) + 2 - int(options["-ngl"])

    def layer(name: str) -> int:
        return int(name.split(".")[1]) if name.startswith("blk.") else max(numbers) + 1

    return {name for name in sizes if name != "token_embd.weight" and layer(name) >= first and re.search(pattern, name) is None}


def agrees(sizes: dict[str, int], found: Offload) -> None:
    """Whether the bytes are those of the tensors that the flags place."""
    gpu = on_gpu(sizes, found.flags)
    copied = sizes["token_embd.weight"] if "output.weight" not in sizes and found.n_gpu_layers else 0
    assert found.vram_bytes == sum(sizes[name] for name in gpu) + copied
    assert found.ram_bytes == sum(sizes[name] for name in sizes if name not in gpu)


def test_all_but_experts_goes_first_then_experts_from_the_last_layer() -> None:
    sizes = moe()
    rest = sum(n_bytes for name, n_bytes in sizes.items() if "exps" not in name and name != "token_embd.weight")
    two = sum(n_bytes for name, n_bytes in sizes.items() if "exps" in name and name.startswith(("blk.4", "blk.5")))
    found = offload(sizes, rest + two + 500, reserve=500)
    assert found.flags == ("-ngl", "99", "-ot", r"blk\.(1|2|3)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU")
    assert found.experts_in_ram == (1, 2, 3)
    assert found.vram_bytes == rest + two
    agrees(sizes, found)
    less = offload(sizes, rest + two + 499, reserve=500)
    assert less.experts_in_ram == (1, 2, 3, 4)


def test_a_file_that_fits_needs_no_pattern() -> None:
    found = offload(moe(), 1 << 30)
    assert found.flags == ("-ngl", "99")
    assert found.ram_bytes == 10_000
    agrees(moe(), found)


def test_a_file_of_many_layers_gets_their_number() -> None:
    assert offload(moe(120), 1 << 30).flags == ("-ngl", "121")


def test_without_room_everything_stays_in_memory() -> None:
    for vram, reserve in ((0, 0), (3_000, 0), (1 << 30, 1 << 30), (100, 1 << 30)):
        found = offload(moe(), vram, reserve)
        assert found.flags == ("-ngl", "0")
        assert (found.vram_bytes, found.ram_bytes) == (0, sum(moe().values()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_without_experts_is_divided_by_layers(tied: bool) -> None:
    sizes = moe(dense=6, tied=tied)
    output = 7 + (10_000 if tied else 3_000)
    found = offload(sizes, output + 2 * 1_401)
    assert found.flags == ("-ngl", "3")
    assert (found.n_gpu_layers, found.n_layers) == (3, 7)
    agrees(sizes, found)


def test_where_the_rest_does_not_fit_no_expert_goes_to_the_gpu() -> None:
    sizes = moe()
    found = offload(sizes, 3_007 + 300)
    assert found.flags[:2] == ("-ngl", "2")
    assert found.experts_in_ram == (1, 2, 3, 4, 5)
    agrees(sizes, found)


def test_a_layer_is_not_taken_for_one_that_begins_alike() -> None:
    sizes = moe(13)
    rest = sum(n_bytes for name, n_bytes in sizes.items() if "exps" not in name and name != "token_embd.weight")
    found = offload(sizes, rest + 11 * 300_100)
    assert found.experts_in_ram == (1,)
    agrees(sizes, found)


def test_flags_are_quoted_for_a_shell() -> None:
    found = offload(moe(), 6_000)
    assert shlex.split(found.command_line) == [*found.flags]
    assert "-ot '" in found.command_line


@given(st.integers(1, 12), st.integers(0, 12), st.booleans(), st.integers(0, 5_000_000), st.integers(0, 500_000))
def test_bytes_are_those_of_the_flags(n_layers: int, dense: int, tied: bool, vram: int, reserve: int) -> None:
    sizes = moe(n_layers, dense, tied)
    found = offload(sizes, vram, reserve)
    agrees(sizes, found)
    assert found.vram_bytes <= max(0, vram - reserve)
