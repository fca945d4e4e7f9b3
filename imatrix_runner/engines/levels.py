"""Levels and presets: the names users know, resolved against what the located tools offer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.roundings import ROUNDINGS, STOCK, Rounding
from imatrix_runner.errors import UsageError
from imatrix_runner.toolchain.quant_type import QuantType

DEFAULT_LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "IQ2_M")

# Publishers' variants: a base type with embeddings and output kept at 8 bits (bartowski's model cards).
_VARIANTS = {"Q6_K_L": "Q6_K", "Q5_K_L": "Q5_K_M", "Q4_K_L": "Q4_K_M", "Q3_K_XL": "Q3_K_L", "Q2_K_L": "Q2_K"}
_VARIANT_TYPE = "q8_0"

PLAIN_FTYPES = frozenset(("F32", "F16", "BF16", "COPY"))
"""Ftypes that are not quantisations; llama-quantize ignores ``--tensor-type`` for them."""

_PRESETS = {
    "bartowski": (
        *("Q8_0", "Q6_K_L", "Q6_K", "Q5_K_L", "Q5_K_M", "Q5_K_S", "Q4_1", "Q4_K_L", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL"),
        *("IQ4_XS", "Q3_K_XL", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K_L", "Q2_K", "IQ2_M"),
        *("IQ2_S", "IQ2_XS", "IQ2_XXS"),
    ),
    "mradermacher-i1": (
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "Q3_K_S", "IQ3_S"),
        *("IQ3_M", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q4_1", "Q5_K_S", "Q5_K_M", "Q6_K"),
    ),
    "k-quants": ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
}
PRESETS = (*_PRESETS, "all")


@dataclass(frozen=True)
class Level:
    """``name`` is the file's suffix, ``ftype`` llama-quantize's argument; the two types override those of two tensors.

    A mix also has ``pins``, a ``--tensor-type`` entry for every tensor that it rounds; ``exclude_weights``, the names of
    tensors that it rounds without the imatrix; and ``override_kv``, which say so in the file's metadata. A level whose numbers
    are not rounded as llama-quantize does has its ``rounding``, and says so in its metadata, too."""

    name: str
    ftype: str
    token_embedding_type: str = ""
    output_tensor_type: str = ""
    pins: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    override_kv: tuple[str, ...] = ()
    rounding: Rounding = STOCK

    def apply(self, options: QuantizeOptions) -> QuantizeOptions:
        """The run's options with this level's overrides; the user's explicit options take precedence."""
        return replace(
            options,
            token_embedding_type=options.token_embedding_type or self.token_embedding_type,
            output_tensor_type=options.output_tensor_type or self.output_tensor_type,
            pins=(*options.pins, *self.pins),
            exclude_weights=(*options.exclude_weights, *self.exclude_weights),
            override_kv=(*options.override_kv, *self.override_kv),
            rounding=self.rounding,
        )

    def rounded(self, rounding: Rounding) -> Level:
        """The same types, rounded otherwise: ``FEEDBACK-Q4_K_M``. The name ends with the stock level's, which programs and hubs
        read."""
        return self if rounding == self.rounding else replace(self, name=f"{rounding.upper()}-{self.name}", rounding=rounding)


def offered(types: Sequence[QuantType]) -> dict[str, Level]:
    """Every level that these tools can make, by upper-case name: their types, aliases, and the publishers' variants."""
    levels = {kind.name.upper(): Level((kind.alias_of or kind.name).upper(), kind.alias_of or kind.name) for kind in types}
    for name, base in _VARIANTS.items():
        if base in levels and name not in levels:
            levels[name] = Level(name, levels[base].ftype, _VARIANT_TYPE, _VARIANT_TYPE)
    return levels


def resolve_levels(names: Sequence[str], types: Sequence[QuantType]) -> tuple[Level, ...]:
    """The levels with these names, in order, without repeats. Raises :class:`UsageError` with similar names for an unknown."""
    known = offered(types)
    chosen: dict[str, Level] = {}
    for name in names:
        rounding, stock = split_rounding(name)
        level = known.get(stock)
        if level is None:
            near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.5)
            raise UsageError(
                f"Unknown level {name!r}",
                "the llama.cpp in use does not offer it" + (f"; similar names are {', '.join(near)}" if near else ""),
                f"Choose among: {', '.join(sorted(known))}.",
            )
        level = level.rounded(rounding)
        chosen[level.name] = level
    if not chosen:
        raise UsageError("No level to make", "the list of levels is empty", "Name some, for example --levels Q4_K_M,IQ3_XXS")
    return tuple(chosen.values())


def usual_names(names: Sequence[str], preset: str) -> tuple[str, ...]:
    """The names of the levels that a request of ``names`` and a ``preset`` (both may be empty) asks a usual llama.cpp for."""
    chosen = (*(_PRESETS.get(preset, ()) or (DEFAULT_LEVELS if preset else ())), *(name.upper() for name in names))
    return tuple(dict.fromkeys(chosen or DEFAULT_LEVELS))


def stock_base(name: str) -> str:
    """The stock level that a publisher's variant is made of (``Q4_K_L``: ``Q4_K_M``); other names stand for themselves."""
    return _VARIANTS.get(name.upper(), name.upper())


def split_rounding(name: str) -> tuple[Rounding, str]:
    """The rounding that a level's name asks for, and the name of the stock level, in upper case: ``feedback-q4_k_m``."""
    name = name.strip().upper()
    for rounding in ROUNDINGS:
        if rounding != STOCK and name.startswith(f"{rounding.upper()}-"):
            return rounding, name[len(rounding) + 1 :]
    return STOCK, name


def preset_levels(preset: str, types: Sequence[QuantType]) -> tuple[tuple[Level, ...], tuple[str, ...]]:
    """The levels of a preset that these tools offer, and the names of those they do not."""
    known = offered(types)
    names = _PRESETS.get(preset) or tuple(
        kind.name.upper() for kind in types if not kind.alias_of and kind.name.upper() not in PLAIN_FTYPES
    )
    there = [name for name in names if name in known]
    return resolve_levels(there, types), tuple(name for name in names if name not in known)
