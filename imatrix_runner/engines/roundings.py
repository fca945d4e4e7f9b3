"""How numbers are rounded to a type: as llama-quantize does, or to other bytes of the same type. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

Rounding = Literal["stock", "refined", "feedback"]
"""``stock``: llama-quantize's bytes. ``refined``: its scales are searched further, for a lower error weighted by the imatrix.
``feedback``: columns are rounded in order, and the error of each is fed into those to come, weighted by the covariance of the
inputs (GPTQ, Frantar et al. 2022; LDLQ, Chee et al. 2023)."""

STOCK: Rounding = "stock"
REFINED: Rounding = "refined"
FEEDBACK: Rounding = "feedback"
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

REFINED_TYPES = frozenset(
    (
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"),
        *("IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    )
)
"""Types with a refined search."""

FEEDBACK_TYPES = REFINED_TYPES | {"IQ1_S", "IQ1_M"}
"""Types that are rounded with error feedback: from column to column, of IQ3 and IQ2 from point to point of their grids, of IQ1
from block to block."""


def rounding_of(kind: str, wanted: Rounding, *, has_covariance: bool) -> Rounding:
    """How a tensor is rounded to the type ``kind`` where ``wanted`` is asked for: the best that type and data allow.

    Without a covariance of its inputs (embeddings, experts that saw too few tokens) it is refined; other types stay stock.
    """
    name = kind.upper()
    if wanted == FEEDBACK and has_covariance and name in FEEDBACK_TYPES:
        return FEEDBACK
    return REFINED if wanted != STOCK and name in REFINED_TYPES else STOCK


def counted(roundings: Collection[Rounding]) -> dict[Rounding, int]:
    """How many tensors are rounded each way, without those that none is."""
    return {each: sum(one == each for one in roundings) for each in ROUNDINGS if each in roundings}
