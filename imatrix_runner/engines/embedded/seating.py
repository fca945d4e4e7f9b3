"""Which prompts are answered side by side, and in how large a context. Pure.

llama.cpp's results can change in their last bits with the shape of what it computes, and a greedy choice turns a bit into
another word. So the shape that a prompt is answered in follows from its own length alone, whatever stands beside it in the
file: contexts come in few sizes, every size has its number of seats, and seats that stay empty are computed all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_CONTEXT = 256
"""llama.cpp pads a sequence's context to multiples of this."""

MOST_TOKENS = 8192
"""Of all seats together: 1 GiB of keys and values in a model like Llama-3-8B."""

MOST_SEATS = 16
"""Where the arithmetic of a batch begins to take longer than fetching the weights for it."""

LEAST_SEATS = 2
"""A single token of a single sequence is the one shape for which ggml's attention depends on the number of threads (ggml-cpu,
``ggml_compute_forward_flash_attn_ext_f16``: it cuts the keys into a piece per thread)."""


@dataclass(frozen=True)
class Group:
    """Prompts ``members`` (numbers from 0, at most ``seats``), answered together in contexts of ``n_ctx`` tokens each."""

    n_ctx: int
    seats: int
    members: tuple[int, ...]


def groups(sizes: Sequence[int]) -> list[Group]:
    """``sizes``: tokens of each prompt and its longest answer together. Small contexts first, prompts in their order."""
    by_context: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        by_context.setdefault(_context(size), []).append(number)
    return [
        Group(n_ctx, seats, tuple(numbers[at : at + seats]))
        for n_ctx, numbers in sorted(by_context.items())
        for seats in (_seats(n_ctx),)
        for at in range(0, len(numbers), seats)
    ]


def _context(size: int) -> int:
    """The smallest of 256, 512, 1024, … that holds ``size`` tokens."""
    n_ctx = LEAST_CONTEXT
    while n_ctx < size:
        n_ctx *= 2
    return n_ctx


def _seats(n_ctx: int) -> int:
    return max(LEAST_SEATS, min(MOST_SEATS, MOST_TOKENS // n_ctx))
