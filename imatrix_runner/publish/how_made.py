"""The files that lie next to a level and say how it was made: its recipe, and its attestation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from imatrix_runner.audit.attestation import ENDING, read_statement
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.publish.local_files import ReadyLevel, small_file
from imatrix_runner.publish.publish_plan import FileToPublish
from imatrix_runner.quantize.build_recipe import ENDING as RECIPE_ENDING
from imatrix_runner.quantize.build_recipe import as_bytes, read_build_recipe, recipe_path
from imatrix_runner.workspace import Workspace


def how_made(workspace: Workspace, level: ReadyLevel, paths: Sequence[str]) -> Iterator[FileToPublish]:
    """Yield what is about these very files, with their names in the repository (``paths``)."""
    first = workspace.root / level.files[0][0]
    digests = [digest for _, _, digest in level.files]
    names = [path.rpartition("/")[2] for path in paths]
    if (recipe := _recipe(recipe_path(workspace.level_file(level.name)), digests, names)) is not None:
        yield small_file(f"{paths[0]}{RECIPE_ENDING}", recipe)
    if (statement := _statement(first.with_name(f"{first.name}{ENDING}"), digests, names[0])) is not None:
        yield small_file(f"{paths[0]}{ENDING}", statement)


def _recipe(path: Path, digests: Sequence[str], names: Sequence[str]) -> bytes | None:
    try:
        recipe = read_build_recipe(path) if path.is_file() else None
    except InvalidDataError:
        return None  # another's file has this name
    if recipe is None or [each.sha256 for each in recipe.files] != list(digests):
        return None
    files = tuple(msgspec.structs.replace(each, name=name) for each, name in zip(recipe.files, names, strict=True))
    return as_bytes(msgspec.structs.replace(recipe, files=files))


def _statement(path: Path, digests: Sequence[str], name: str) -> bytes | None:
    try:
        statement = read_statement(path) if path.is_file() else None
    except InvalidDataError:
        return None  # another's file has this name
    if statement is None or [statement.file.sha256] != list(digests):
        return None
    content = msgspec.json.decode(path.read_bytes())
    content["subject"][0]["name"] = name
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
