"""The recipe of a mix as files: ``recipe.json``, and the tensor types with which llama-quantize makes the same file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from imatrix_runner.engines.levels import Level
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import atomic_writer, encode_json, read_json
from imatrix_runner.mixes.rounding_facts import marked

VERSION = 1

METADATA_KEY = "imatrix_runner.mix"
"""The key under which a mix says in its metadata what it is: the digest of its types."""


class MeasuredRecipe(msgspec.Struct, frozen=True):
    """A candidate that was measured on the calibration text, in the loaded model. ``kld`` in nats a token; ``ratio`` to the
    stock level's, with its standard ``error``; ``typical``: geometric mean of the chunks' ratios; ``same_top``: difference of
    the shares of tokens with the source's top token."""

    name: str
    n_bytes: int
    kld: float
    ratio: float | None = None
    error: float | None = None
    typical: float | None = None
    same_top: float | None = None


class MixRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen types. ``types``: tensor of the output -> ggml type, of every tensor that is rounded; ``unweighted``: those,
    by their names in the model, that are rounded without the imatrix. ``ftype``: the preset that is written as the file's type.
    ``stock``: the stock level of about this size that it was compared with. ``rounding``: of its numbers, with the fingerprint
    of the ``covariances`` that it uses. ``taken``: the name of the candidate among those ``measured`` (empty in
    recipes from before it was stored)."""

    version: int = VERSION
    level: str
    ftype: str
    types: dict[str, str]
    unweighted: tuple[str, ...] = ()
    n_bytes: int
    bits_per_weight: float
    predicted_kld: float
    measured: tuple[MeasuredRecipe, ...]
    stock: str
    rounding: Rounding = STOCK
    covariances: str = ""
    taken: str = ""

    @property
    def digest(self) -> str:
        return recipe_digest(self.types, self.unweighted, self.rounding, self.covariances)

    @property
    def chosen(self) -> MeasuredRecipe | None:
        """The candidate that was taken; where its name was not stored, the best over all tokens and in the typical chunk."""
        if self.taken:
            return next((row for row in self.measured if row.name == self.taken), None)
        scores = [(row.ratio * row.typical, row) for row in self.measured if row.ratio is not None and row.typical is not None]
        return min(scores, key=lambda each: each[0])[1] if scores else None

    def as_level(self) -> Level:
        """The level: its types as exact ``--tensor-type`` patterns, and the mark in its metadata."""
        level = level_of(self.level, self.ftype, self.types, self.unweighted, self.digest)
        return level if self.rounding == STOCK else marked(replace(level, rounding=self.rounding), self.covariances)


def recipe_digest(
    types: Mapping[str, str], unweighted: Sequence[str] = (), rounding: Rounding = STOCK, covariances: str = ""
) -> str:
    lines = [*(f"{name} {kind}" for name, kind in sorted(types.items())), *sorted(unweighted)]
    lines += [f"{rounding} {covariances}".strip()] if rounding != STOCK else []
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def level_of(name: str, ftype: str, types: Mapping[str, str], unweighted: Sequence[str] = (), digest: str = "") -> Level:
    """``digest``: of the recipe, where it says more than types."""
    mark = f"{METADATA_KEY}=str:types by measured sensitivity, sha256 {digest or recipe_digest(types, unweighted)}"
    return Level(name, ftype, pins=pins_of(types), exclude_weights=tuple(unweighted), override_kv=(mark,))


def pins_of(types: Mapping[str, str]) -> tuple[str, ...]:
    """``--tensor-type`` entries that each match one tensor only."""
    return tuple(f"^{re.escape(name)}$={kind.lower()}" for name, kind in types.items())


def read_recipe(path: Path) -> MixRecipe:
    """Read a ``recipe.json``. Raises :class:`InvalidDataError`."""
    recipe = read_json(path, MixRecipe)
    if recipe.version != VERSION:
        raise InvalidDataError(
            f"{path} was written by another version of imatrix-runner",
            f"recipe version {recipe.version}, this program knows {VERSION}",
            "Move it away: the mix is chosen again.",
        )
    return recipe


def write_new(path: Path, content: bytes) -> bool:
    """Write a file unless one is there. Returns whether the file has this content now."""
    if path.exists():
        return path.read_bytes() == content
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        file.write(content)
    return True


def as_json(recipe: MixRecipe) -> bytes:
    return encode_json(recipe)


def as_tensor_types(recipe: MixRecipe) -> bytes:
    """The file for ``llama-quantize --tensor-type-file``."""
    return "".join(f"{pin}\n" for pin in pins_of(recipe.types)).encode()
