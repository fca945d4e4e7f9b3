"""What measuring costs takes before it begins: which trials, how many tokens, how many weights to round. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from imatrix_runner.engines.cost_jobs import Trial
from imatrix_runner.files import human_seconds
from imatrix_runner.mixes.measure_costs import Places
from imatrix_runner.mixes.mix_tensors import MixTensor
from imatrix_runner.models.tensor_patterns import component
from imatrix_runner.quantize.plan import MixingStep
from imatrix_runner.quantize.resolve import bits

LOW_BITS, HIGH_BITS = 3.44, 6.56
"""Bits per weight near which tensors are probed (Q3_K and Q6_K). Of all pairs of types these predict the others best on the
demo model (docs/measurements.md): the one is far above the background of what any change does, and the other shows it."""

HARM_CHUNKS = 16
"""Chunks on which kinds of tensors are tried without the imatrix."""

_EVERY = 4
_RECIPES = 6
"""Whole recipes that are tried for a target at most: four candidates, the best without the imatrix where it harms, and the
stock level; with ``--quality high`` one more."""
_STARTS = 2
"""How often the source computes the recipes' chunks for a target, to compare with."""
_NEIGHBOURS = 6
"""Types of each tensor that ``--quality high`` probes at most, three near each of two solutions."""

_LIKE_IMATRIX, _NOT_COLLECTED = "at the speed of the imatrix", "no imatrix was collected here with this engine"
_LIKE_BEFORE, _NOT_ROUNDED = "at the speed of the last time", "this engine has not rounded for a mix here yet"


def planned_probes(tensors: Sequence[MixTensor], unreached: Collection[str]) -> tuple[Trial, ...]:
    """One tensor at a time, at a type of few bits; of each kind of tensor every fourth, and those outside the blocks, also
    at a type of more bits: the exponent of the cost hardly differs between tensors. ``unreached``: names in the model of those
    that computing a text never reaches, which are left out."""
    seen: dict[str, int] = {}
    found: list[Trial] = []
    for tensor in tensors:
        if tensor.original.startswith("blk.") and tensor.original in unreached:
            continue
        kinds, kind = _probed_types(tensor.types), component(tensor.original)
        number = seen.setdefault(kind, len(seen))  # kinds begin in different layers, so that every layer has some
        seen[kind] += 1
        both = number % _EVERY == 0 or not tensor.original.startswith("blk.")
        found += [probe_of(tensor, each) for each in (kinds if both else kinds[:1])]
    return tuple(found)


def probe_of(tensor: MixTensor, kind: str) -> Trial:
    return Trial(f"{tensor.original}={kind}", (tensor.rounded(kind),))


def measuring_step(
    tensors: Sequence[MixTensor],
    where: Places,
    n_ctx: int,
    *,
    n_probes: int,
    n_rounded: int,
    n_targets: int,
    thorough: bool,
    weighted: bool,
) -> MixingStep:
    """The work for ``n_targets`` mixes, of which ``n_probes`` trials and ``n_rounded`` weights (counted once for each type) are
    still to be done. Recipes are computed in chunks of ``n_ctx`` tokens. ``thorough``: with ``--quality high``; ``weighted``:
    there is an imatrix, which may harm some tensors."""
    kinds = {component(tensor.original) for tensor in tensors}
    probe_tokens, recipe_tokens = len(where.probes) * where.probe_context, len(where.recipes) * n_ctx
    n_probes += _NEIGHBOURS * len(tensors) * n_targets if thorough else 0
    n_recipes = (_RECIPES + thorough) * n_targets
    n_tokens = (n_probes + bool(n_probes)) * probe_tokens + (n_recipes + _STARTS * n_targets) * recipe_tokens
    if weighted:
        n_harm = 1 + 2 * len(kinds)  # the first block is tried apart
        n_recipes += n_harm
        n_tokens += (n_harm + 1) * min(HARM_CHUNKS * n_ctx, recipe_tokens)
    return MixingStep(n_rounded, n_probes, n_recipes, n_tokens)


def describe_work(step: MixingStep, n_mixes: int) -> str:
    """What choosing takes, in a sentence: work as numbers, and time where this machine's speed is known."""
    mixes = "a mix" if n_mixes == 1 else f"{n_mixes} mixes"
    recipes = f"{step.n_recipes} whole recipes"
    trials = f"{step.n_probes:,} probes of tensors and {recipes}" if step.n_probes else recipes
    computing = f"{trials} with {step.n_tokens:,} tokens{_time(step.trial_seconds, _LIKE_IMATRIX, _NOT_COLLECTED)}"
    if not step.n_rounded:
        return f"Choosing the types of {mixes} takes at most {computing}."
    rounding = f"{step.n_rounded / 1e6:,.1f} M weights to round{_time(step.rounding_seconds, _LIKE_BEFORE, _NOT_ROUNDED)}"
    return f"Choosing the types of {mixes} takes {rounding}, and at most {computing}."


def _time(seconds: float | None, how: str, why_not: str) -> str:
    return f" ({human_seconds(seconds)} {how})" if seconds is not None else f" (time not known: {why_not})"


def _probed_types(types: Sequence[str]) -> tuple[str, ...]:
    """The type nearest to few bits, and the one nearest to more that has at least one bit more."""
    if not types:
        return ()
    low = min(types, key=lambda kind: (abs(bits(kind) - LOW_BITS), kind))
    rest = [kind for kind in types if bits(kind) >= bits(low) + 1]
    return (low, min(rest, key=lambda kind: (abs(bits(kind) - HIGH_BITS), kind))) if rest else (low,)
