"""How a level's file was made, as a file next to it: enough to make the same bytes again (``rebuild``).

It names no path of the machine: files by their bare names and SHA-256. Types and roundings are those of every tensor, so no
mixture rule of llama.cpp, no cost map and no option that only chooses types is needed to make it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from imatrix_runner import __version__
from imatrix_runner.engines.jobs import PassLevel, QuantizeOptions, TensorTarget
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import encode_json, read_json, write_json

SCHEMA = "imatrix-runner/recipe"
VERSION = 1
ENDING = ".recipe.json"
"""After the whole name of a level as one file: ``model-Q4_K_M.gguf.recipe.json``."""


class RecipeFile(msgspec.Struct, frozen=True):
    """A file by its bare name."""

    name: str
    n_bytes: int
    sha256: str


class RecipeLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tensor of the file: its ggml type; its name in the source, where that is another; its rounding, if not stock."""

    name: str
    type: str
    original: str = ""
    rounding: Rounding = STOCK

    def target(self) -> TensorTarget:
        return TensorTarget(self.name, self.original or self.name, self.type, self.rounding)


class RecipeOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """llama-quantize's options that change more of a file than types."""

    allow_requantize: bool = False
    keep_split: bool = False
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    override_kv: tuple[str, ...] = ()
    prune_layers: str = ""
    rounding: Rounding = STOCK

    def options(self) -> QuantizeOptions:
        return QuantizeOptions(
            allow_requantize=self.allow_requantize,
            keep_split=self.keep_split,
            include_weights=self.include_weights,
            exclude_weights=self.exclude_weights,
            override_kv=self.override_kv,
            prune_layers=self.prune_layers,
            rounding=self.rounding,
        )


class BuildRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """``level``: its name; ``files`` it consists of, in order; ``source`` and ``imatrix``: what it was made from; ``ftype``:
    what its metadata names; ``shards``: tensors in each; ``covariances``: their fingerprint, where error feedback used them;
    ``engine``: what computed, and ``program``: the version of this program."""

    schema: str = SCHEMA
    version: int = VERSION
    level: str
    files: tuple[RecipeFile, ...]
    source: tuple[RecipeFile, ...]
    imatrix: RecipeFile | None
    ftype: str
    options: RecipeOptions
    tensors: tuple[RecipeLine, ...]
    engine: str
    shards: tuple[int, ...] = ()
    covariances: str = ""
    program: str = __version__


def recipe_of_level(
    level: PassLevel,
    files: Sequence[RecipeFile],
    source: Sequence[RecipeFile],
    imatrix: RecipeFile | None,
    engine: str,
    covariances: str = "",
) -> BuildRecipe:
    """The recipe of a level that was made. ``covariances``: kept only if a tensor was rounded with error feedback."""
    job = level.job
    given = job.options
    options = RecipeOptions(
        given.allow_requantize,
        given.keep_split,
        given.include_weights,
        given.exclude_weights,
        given.override_kv,
        given.prune_layers,
        given.rounding,
    )
    lines = tuple(
        RecipeLine(each.name, each.type.lower(), each.original if each.original != each.name else "", each.rounding)
        for each in level.tensors
    )
    uses = any(line.rounding == "feedback" for line in lines)
    return BuildRecipe(
        level=level.name,
        files=tuple(files),
        source=tuple(source),
        imatrix=imatrix,
        ftype=job.ftype,
        options=options,
        tensors=lines,
        engine=engine,
        shards=job.shards,
        covariances=covariances if uses else "",
    )


def recipe_path(file: Path) -> Path:
    """Where the recipe of a level lies; ``file``: its name as one file, also where it is cut into shards."""
    return file.with_name(f"{file.name}{ENDING}")


def write_build_recipe(path: Path, recipe: BuildRecipe) -> bool:
    """Write a recipe, unless a file of the user's is there; returns whether it is written."""
    if path.exists():
        try:
            read_build_recipe(path)
        except InvalidDataError:
            return False
    write_json(path, recipe)
    return True


def read_build_recipe(path: Path) -> BuildRecipe:
    """Read a recipe. Raises :class:`InvalidDataError`."""
    found = read_json(path, _Head)
    if found.schema != SCHEMA:
        raise InvalidDataError(
            f"{path.name} is not the recipe of a level",
            "a mix's own recipe, or another program's file, does not say what it was made from"
            if found.level
            else "it names no level",
            f"Give the file that lies next to the level, named after it: model-Q4_K_M.gguf{ENDING}",
        )
    if found.version != VERSION:
        raise InvalidDataError(
            f"{path.name} was written by another version of imatrix-runner",
            f"recipe version {found.version}, this program knows {VERSION}",
            "Upgrade with: pip install -U imatrix-runner",
        )
    recipe = read_json(path, BuildRecipe)
    named = [*recipe.files, *recipe.source, *([recipe.imatrix] if recipe.imatrix is not None else [])]
    if not recipe.files or not recipe.source or not all(_is_bare(each.name) for each in named):
        raise InvalidDataError(
            f"{path.name} is not a whole recipe",
            "it names no files, or names them by paths",
            "It was edited or damaged: get it again.",
        )
    return recipe


class _Head(msgspec.Struct, frozen=True):
    schema: str = ""
    version: int = 0
    level: str = ""


def _is_bare(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not any(letter in name for letter in "/\\\0")


def as_bytes(recipe: BuildRecipe) -> bytes:
    return msgspec.json.format(encode_json(recipe), indent=2) + b"\n"
