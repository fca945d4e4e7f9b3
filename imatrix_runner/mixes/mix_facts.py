"""What the journal keeps of mixes: what their types depend on, what every target led to, and their recipes."""

from __future__ import annotations

from dataclasses import dataclass

from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.mixes.mix_recipe import METADATA_KEY, MixRecipe, read_recipe
from imatrix_runner.quantize.level_facts import LevelInputs
from imatrix_runner.steps import Inputs
from imatrix_runner.workspace import Workspace


class MixInputs(Inputs, frozen=True, kw_only=True):
    """What the types of a mix depend on. ``target``: what was asked for, and the bytes that follow from it."""

    model_file: str
    imatrix: str
    target: str
    options: str
    text: str
    engine: str


@dataclass(frozen=True)
class MixFacts:
    """A chosen mix: the ``level`` that it led to, which is the stock level ``stock`` where no candidate was better.
    ``stock_kld``: of that stock level on the calibration text, in nats (None in journals from before it was stored)."""

    level: str
    stock: str
    kept_stock: bool
    stock_kld: float | None = None


def levels_of_targets(journal: Journal) -> dict[str, MixFacts]:
    """What every target (``MIX@4GiB``) led to."""
    return {target: record.facts_as(MixFacts) for target, record in journal.of_kind("mix").items()}


def text_input(sha256: str, n_ctx: int) -> str:
    """The text that mixes are measured on, as one of their inputs."""
    return f"sha256:{sha256} in chunks of {n_ctx}"


def klds_of_stock(journal: Journal, *, model: str, imatrix: str, text: str) -> dict[str, float]:
    """The KLD on the calibration text of the stock levels that mixes with these inputs were compared with, by name."""
    found: dict[str, float] = {}
    for record in journal.of_kind("mix").values():
        inputs, facts = record.inputs_as(MixInputs), record.facts_as(MixFacts)
        same = (inputs.model_file, inputs.imatrix, inputs.text) == (model, imatrix, text)
        if same and facts.stock_kld is not None:
            found[facts.stock] = facts.stock_kld
    return found


def is_mix_level(record: StepRecord) -> bool:
    """Whether a finished level is a mix: its metadata says so, even if its target has led to another level since."""
    return f"{METADATA_KEY}=" in record.inputs_as(LevelInputs).options


def recipe_of(workspace: Workspace, name: str, record: StepRecord) -> MixRecipe | None:
    """The recipe of a finished mix; None if its file is gone or is that of another one. Raises :class:`InvalidDataError` for a
    file that is damaged."""
    path = workspace.kept_recipe(name)
    recipe = read_recipe(path) if path.is_file() else None
    return recipe if recipe is not None and recipe.digest in record.inputs_as(LevelInputs).options else None


def digests_of_mixes(workspace: Workspace) -> dict[str, str]:
    """The digest of every mix that was chosen in a workspace, by the name of its level."""
    recipes = [read_recipe(path) for path in sorted(workspace.mixes.glob("*.recipe.json"))]
    return {recipe.level: recipe.digest for recipe in recipes}
