"""``rebuild``: makes a level's file again from the recipe that lies next to it, or says why it cannot be the same."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.audit.rederive import Rederiver, named_matrix
from imatrix_runner.context.context import Context
from imatrix_runner.context.engine_choice import Machine, make_embedded
from imatrix_runner.context.requests import EnvironmentRequest
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.files.covariance_file import set_fingerprint, stored_covariances
from imatrix_runner.errors import InvalidDataError, UsageError, from_os_error
from imatrix_runner.events import Finished, Saved, Started, info
from imatrix_runner.files import sha256
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.quantize.build_recipe import BuildRecipe, RecipeFile, read_build_recipe

STEP = "rebuild"


@dataclass(frozen=True)
class RebuildRequest:
    """``source`` and ``imatrix``: where they are (None: next to the recipe, under the names that it has); ``out``: the folder
    that the file goes to. ``covariances``: the folder of those of a workspace, for levels with error feedback."""

    recipe: Path
    source: Path | None = None
    imatrix: Path | None = None
    out: Path = Path()
    covariances: Path | None = None
    threads: int | None = None
    environment: EnvironmentRequest = field(default_factory=EnvironmentRequest)


@dataclass(frozen=True)
class Rebuilt:
    """The files that were made, which are the recipe's."""

    recipe: BuildRecipe
    files: tuple[Path, ...]
    engine: str
    seconds: float


def rebuild(request: RebuildRequest, context: Context) -> Rebuilt:
    """Make a file again. Raises :class:`InvalidDataError` with the reason where source, matrix or result are not those of the
    recipe; nothing is left in the folder then."""
    began = time.monotonic()
    recipe = read_build_recipe(request.recipe)
    out = request.out.expanduser().absolute()
    for each in recipe.files:
        if (out / each.name).exists():
            raise UsageError(
                f"{out / each.name} exists",
                "a file that is made again overwrites nothing",
                "Name another folder with --out, or move the file away.",
            )
    source = _source(request, recipe, context)
    imatrix = _imatrix(request, recipe, context)
    covariances = _covariances(request, recipe)
    engine = make_embedded(Machine(None), context.runner(request.environment), "A rebuild")
    if engine.identity() != recipe.engine:
        context.sink(info(f"The recipe was made by {recipe.engine}, here computes {engine.identity()}."))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "making the folder", out) from error
    context.sink(Started(STEP, recipe.level, None, "weights"))
    rederiver = Rederiver(engine, source, out, context.sink, request.threads)
    targets = [line.target() for line in recipe.tensors]
    size = sum(each.n_bytes for each in recipe.files)
    name = recipe.imatrix.name if recipe.imatrix is not None else ""
    # The shards' common stem names the file that is written first.
    stem = (
        recipe.files[0].name
        if len(recipe.files) == 1
        else f"{recipe.files[0].name.rpartition('-of-')[0].rpartition('-')[0]}.gguf"
    )
    with (
        named_matrix(imatrix, name, out) as matrix,
        rederiver.make_tensors(
            recipe.ftype,
            recipe.options.options(),
            targets,
            matrix,
            stem,
            size,
            shards=recipe.shards,
            covariances=covariances,
        ) as made,
    ):
        _compare(recipe, made, engine)
        files = tuple(_keep(path, out / each.name) for path, each in zip(made, recipe.files, strict=True))
    seconds = time.monotonic() - began
    for file in files:
        context.sink(Saved(str(file), recipe.level, file.stat().st_size))
    context.sink(Finished(STEP, "done", "the same bytes", seconds))
    return Rebuilt(recipe, files, engine.identity(), seconds)


def _keep(made: Path, final: Path) -> Path:
    try:
        shutil.move(made, final)
    except OSError as error:
        raise from_os_error(error, f"keeping {final.name}", final) from error
    return final


def _source(request: RebuildRequest, recipe: BuildRecipe, context: Context) -> Model:
    first = recipe.source[0].name
    path = (request.source or request.recipe.parent / first).expanduser().absolute()
    if not path.is_file():
        raise _lacking(
            recipe, f"its source {first} is not at {path}", f"Name it with --source; its SHA-256 is {recipe.source[0].sha256}."
        )
    model = open_gguf(path, allow_requantize=True)
    if len(model.files) != len(recipe.source):
        raise _lacking(
            recipe, f"its source has {len(recipe.source)} files, {path.name} has {len(model.files)}", "Give the same files."
        )
    for file, said in zip(model.files, recipe.source, strict=True):
        _require(recipe, "source", file, said, context)
    return model


def _imatrix(request: RebuildRequest, recipe: BuildRecipe, context: Context) -> Path | None:
    said = recipe.imatrix
    if said is None:
        if request.imatrix is not None:
            raise _lacking(recipe, "it is made without imatrix", "Leave --imatrix out.")
        return None
    path = (request.imatrix or request.recipe.parent / said.name).expanduser().absolute()
    if not path.is_file():
        raise _lacking(
            recipe, f"its imatrix {said.name} is not at {path}", f"Name it with --imatrix; its SHA-256 is {said.sha256}."
        )
    _require(recipe, "imatrix", path, said, context)
    return path


def _covariances(request: RebuildRequest, recipe: BuildRecipe) -> Path | None:
    if not recipe.covariances:
        return None
    folder = request.covariances
    if folder is None or not folder.is_dir() or not stored_covariances(folder):
        raise _lacking(
            recipe,
            "it was rounded with error feedback, and the covariances of its inputs are not here",
            "Name the workspace that has them with --workspace; other roundings need none.",
        )
    if set_fingerprint(folder) != recipe.covariances:
        raise _lacking(
            recipe, f"the covariances in {folder} are others", "Name the workspace that it was made in with --workspace."
        )
    return folder


def _require(recipe: BuildRecipe, what: str, path: Path, said: RecipeFile, context: Context) -> None:
    digest = sha256(path, lambda _bytes: context.stop.check())
    if digest != said.sha256:
        raise _lacking(
            recipe,
            f"{path.name} is not its {what}: the SHA-256 is {digest[:16]}…, the recipe has {said.sha256[:16]}… ({said.name})",
            f"Give the {what} that it was made from, unchanged.",
        )


def _compare(recipe: BuildRecipe, made: tuple[Path, ...], engine: Engine) -> None:
    """Raise :class:`InvalidDataError` unless the files are the recipe's, with the reason that is known."""
    hashes = [sha256(path) for path in made]
    if hashes == [each.sha256 for each in recipe.files]:
        return
    if engine.identity() != recipe.engine:
        why = f"the library is another: it was made by {recipe.engine}, here computes {engine.identity()}"
        todo = "Install that version of llama-cpp-python, or audit the file to see which tensors differ."
    else:
        why = "source, matrix and library are the same, and the bytes are not: this processor or build computes otherwise"
        todo = "See docs/audit.md; audit the file to see which tensors differ."
    raise _lacking(recipe, why, todo)


def _lacking(recipe: BuildRecipe, why: str, todo: str) -> InvalidDataError:
    return InvalidDataError(f"{recipe.files[0].name} cannot be made again", why, todo)
