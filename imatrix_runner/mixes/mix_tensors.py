"""The tensors whose types a mix chooses, and the types that each may get. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from imatrix_runner.engines.cost_jobs import RoundedTensor
from imatrix_runner.errors import UsageError
from imatrix_runner.models.gguf_file import padded, tensor_bytes, type_id, type_size
from imatrix_runner.quantize.recipe import ALIGNMENT, Recipe, RecipeTensor
from imatrix_runner.quantize.resolve import FAIL, KEEP, bits
from imatrix_runner.quantize.usable_imatrix import NEVER_WEIGHED, UsableImatrix, requires_imatrix

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "k": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "iq": ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL"),
    "legacy": ("Q4_0", "Q4_1", "Q5_0", "Q5_1"),
}
"""The families of types that can be chosen by name. Q8_0 belongs to each: every backend runs it."""

ALWAYS = ("Q8_0",)

OTHERS = ("IQ1_S", "IQ1_M")
"""Types that a mix uses only where they are named: a probe at 2 bits says little about them."""

SOURCES = ("F32", "F16", "BF16")
"""Types of a source in which a tensor can be rounded in place."""


@dataclass(frozen=True)
class MixTensor:
    """A tensor of the output, its name in the model, and the types it may get, without the type that it has there. ``fixed``:
    an option of the user decides its type, the only one in ``types``. ``reached``: computing a text uses it."""

    name: str
    original: str
    shape: tuple[int, ...]
    source_type: str
    types: tuple[str, ...]
    fixed: bool = False
    reached: bool = True

    def padded_bytes(self, kind: str) -> int:
        """The bytes that it takes in a file as ``kind``, with padding."""
        number = type_id(kind)
        assert number is not None
        n_bytes = tensor_bytes(self.shape, number)
        assert n_bytes is not None
        return padded(n_bytes, ALIGNMENT)

    @property
    def choices(self) -> tuple[str, ...]:
        """The types that it may get, with its own unless an option decides."""
        return self.types if self.fixed else (*self.types, self.source_type)

    def rounded(self, kind: str) -> RoundedTensor:
        return RoundedTensor(self.original, kind)


def allowed_types(text: str) -> tuple[str, ...]:
    """Return the types that ``--types`` allows: families and types, separated by commas; empty text: all families.

    Raises :class:`UsageError` for any other word.
    """
    known = {name for family in FAMILIES.values() for name in family} | {*ALWAYS, *OTHERS}
    found: dict[str, None] = {}
    for word in filter(None, (part.strip() for part in (text or ",".join(FAMILIES)).split(","))):
        if word.lower() in FAMILIES:
            found |= dict.fromkeys((*FAMILIES[word.lower()], *ALWAYS))
        elif word.upper() in known:
            found[word.upper()] = None
        else:
            raise UsageError(
                f"Invalid --types {word!r}",
                f"expected families ({', '.join(FAMILIES)}) or types such as Q4_K",
                f"Choose among: {', '.join(sorted(known))}.",
            )
    return tuple(found)


def mix_tensors(
    recipe: Recipe,
    weights: UsableImatrix | None,
    fixed: Collection[str],
    allowed: Sequence[str],
    uncovered: str = FAIL,
) -> tuple[MixTensor, ...]:
    """Return the tensors that ``recipe``, any stock recipe of the model, quantises; those in ``fixed`` get only its type.
    ``uncovered``: the smallest type of tensors for which the imatrix has no data, ``keep`` for none, ``fail`` for any that can
    do without."""
    return tuple(
        MixTensor(
            tensor.name,
            tensor.original,
            tensor.shape,
            tensor.source_type,
            (tensor.type,) if tensor.name in fixed else _types(tensor, weights, allowed, uncovered),
            tensor.name in fixed,
        )
        for tensor in recipe.tensors
        if tensor.changes
    )


def _types(tensor: RecipeTensor, weights: UsableImatrix | None, allowed: Sequence[str], uncovered: str) -> tuple[str, ...]:
    has_weights = _has_weights(tensor, weights)
    least = 0.0 if uncovered == FAIL or _is_covered(tensor, weights) else bits(_safe(tensor, uncovered))
    return tuple(
        kind
        for kind in allowed
        if kind != tensor.source_type
        and _fits(kind, tensor.shape[0])
        and (has_weights or not requires_imatrix(tensor.original, kind, ""))
        and bits(kind) >= least
    )


def _safe(tensor: RecipeTensor, uncovered: str) -> str:
    return tensor.source_type if uncovered == KEEP else uncovered.upper()


def _is_covered(tensor: RecipeTensor, weights: UsableImatrix | None) -> bool:
    """Whether ``--uncovered`` leaves the tensor alone: the imatrix has data for it, or never has, or there is no imatrix."""
    if weights is None:
        return True
    return tensor.original not in weights.unseen and (tensor.original in NEVER_WEIGHED or _has_weights(tensor, weights))


def _fits(kind: str, n_per_row: int) -> bool:
    """Whether rows divide into the type's blocks."""
    number = type_id(kind)
    block = type_size(number) if number is not None else None
    return block is not None and n_per_row % block[0] == 0


def _has_weights(tensor: RecipeTensor, weights: UsableImatrix | None) -> bool:
    n_mat = tensor.shape[2] if len(tensor.shape) > 2 else 1
    return weights is not None and weights.sizes.get(tensor.original) == tensor.shape[0] * n_mat
