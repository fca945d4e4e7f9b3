"""About how large levels will be, before a model is there to plan them exactly. Pure."""

from __future__ import annotations

from imatrix_runner.batch.batch_journal import PlannedLevel
from imatrix_runner.context.requests import LevelsRequest
from imatrix_runner.engines.levels import split_rounding, stock_base, usual_names
from imatrix_runner.errors import UsageError
from imatrix_runner.mixes.naming import usual_bits
from imatrix_runner.mixes.targets import BitsTarget, LikeTarget, MemoryTarget, SizeTarget, is_mix, parse_target

_VARIANT = 1.06
"""A publisher's variant against its stock level: 8-bit embeddings and output are 3 to 10 % of models of 7 to 70 billion."""
_USUAL_BITS = 4.9
"""Of levels that are not known here: those of Q4_K_M."""


def about_levels(request: LevelsRequest, n_params: int) -> tuple[PlannedLevel, ...]:
    """The levels of a request with their sizes in bytes, estimated from the number of the model's weights."""
    names = usual_names(request.names, request.preset)
    return tuple(PlannedLevel(name, _about(name, n_params)) for name in names)


def _about(name: str, n_params: int) -> int:
    if is_mix(name):
        return _about_mix(name, n_params)
    stock = split_rounding(name)[1]
    bits = usual_bits(stock)
    if bits is None:
        bits = (usual_bits(stock_base(stock)) or _USUAL_BITS) * _VARIANT
    return round(n_params * bits / 8)


def _about_mix(name: str, n_params: int) -> int:
    try:
        target = parse_target(name)
    except UsageError:
        return round(n_params * _USUAL_BITS / 8)  # refused, with its reason, when it is planned
    if isinstance(target, SizeTarget):
        return target.n_bytes
    if isinstance(target, MemoryTarget):
        return min(target.ram + target.vram, round(n_params * 2))
    bits = _USUAL_BITS
    if isinstance(target, BitsTarget):
        bits = target.bits_per_weight
    elif isinstance(target, LikeTarget):
        bits = usual_bits(stock_base(target.level)) or _USUAL_BITS
    return round(n_params * bits / 8)
