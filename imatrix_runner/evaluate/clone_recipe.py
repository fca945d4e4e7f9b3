"""The recipe of a published GGUF for another model: the type of each tensor, as ``--tensor-type-file`` takes it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.other_files import FileDescription
from imatrix_runner.mixes.mix_recipe import pins_of
from imatrix_runner.models.ggml_types import is_plain, tensor_bytes, type_size
from imatrix_runner.models.hub.label_rules import FILE_TYPES
from imatrix_runner.models.model import Model

_SHOWN = 3
_DEFAULT = "Q8_0"
"""The level to begin with where a file states no type of its own; every tensor's type is named anyway."""


@dataclass(frozen=True)
class CloneRecipe:
    """``level``: the stock level to begin with, by the file's own file type; ``types``: tensor -> type, of every tensor of two
    or more dimensions; ``place``: the file."""

    place: str
    level: str
    types: Mapping[str, str]

    @property
    def as_tensor_types(self) -> str:
        """The file for ``--tensor-type-file``: a pattern that matches one tensor on each line."""
        return "".join(f"{pin}\n" for pin in pins_of(self.types))


def clone_recipe(described: FileDescription, place: str, model: Model) -> CloneRecipe:
    """The recipe of a file for ``model``. Raises :class:`InvalidDataError` if their tensors have other names, or if a row
    does not divide into the blocks of its type."""
    wanted = {name: tensor for name, tensor in described.tensors.items() if len(tensor.shape) > 1}
    mine = {tensor.name: tensor for tensor in model.tensors if len(tensor.shape) > 1}
    further, missing = ([name for name in one if name not in other] for one, other in ((wanted, mine), (mine, wanted)))
    if further or missing:
        what = "has not" if further else "has, and the file has not"
        named = further or missing
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        raise InvalidDataError(
            f"The recipe of {place} does not fit {model.name}",
            f"it is of other tensors: {', '.join(named[:_SHOWN])}{more}, which the model {what}",
            "Clone a file of a model with the same layers.",
        )
    if not any(tensor.is_quantised for tensor in wanted.values()):
        raise InvalidDataError(f"{place} has no recipe", "none of its tensors is quantised", "Name a quantised file.")
    for name, tensor in wanted.items():
        n_row = mine[name].shape[0]
        if type_size(tensor.type) is None:
            raise InvalidDataError(
                f"The recipe of {place} cannot be made here",
                f"{name} is of {tensor.type_name}, a type that llama.cpp does not have",
                "Clone another file, or make it with the fork of llama.cpp that it comes from.",
            )
        if tensor_bytes((n_row,), tensor.type) is None:
            raise InvalidDataError(
                f"The recipe of {place} does not fit {model.name}",
                f"a row of {name} has {n_row} numbers, which do not divide into blocks of {tensor.type_name}",
                "Clone a file of a model of the same shape, or choose a level.",
            )
    level = FILE_TYPES.get(described.first.integer("general.file_type") or 0, _DEFAULT)
    return CloneRecipe(place, _DEFAULT if is_plain(level) else level, {name: each.type_name for name, each in wanted.items()})
