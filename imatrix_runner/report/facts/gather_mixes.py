"""Describes mixes: how their types were chosen, from their recipes, and what rounding each tensor costs, from the cost map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.mix_verdict import MixVerdict
from imatrix_runner.events import Sink, warning
from imatrix_runner.files import sha256
from imatrix_runner.imatrix.statistics import locate
from imatrix_runner.journal import Journal, StepRecord, command_line
from imatrix_runner.mixes.cost_map import CostMap, read_cost_map
from imatrix_runner.mixes.mix_facts import MixFacts, is_mix_level, levels_of_targets, recipe_of
from imatrix_runner.mixes.mix_recipe import MixRecipe, as_tensor_types
from imatrix_runner.mixes.rounding_facts import RoundingFacts
from imatrix_runner.mixes.sensitivity import COMMON_ERROR
from imatrix_runner.report.document import KeptStock, ReportCosts, ReportFile, ReportMix, ReportTensorCost
from imatrix_runner.report.facts.gather_model import last_part
from imatrix_runner.safe_text import printable
from imatrix_runner.steps import MODEL_INPUT
from imatrix_runner.workspace import Workspace

_PIN: Final = "--tensor-type"
_FILE: Final = "--tensor-type-file"


def describe_mixes(
    workspace: Workspace,
    journal: Journal,
    levels: Mapping[str, StepRecord],
    verdicts: Mapping[str, MixVerdict],
    sink: Sink,
) -> dict[str, ReportMix]:
    """Return the mixes among ``levels`` by name. ``verdicts``: comparisons with measured stock levels that still hold."""
    chosen = levels_of_targets(journal)
    return {
        name: _mix(
            workspace,
            _recipe(workspace, name, record, sink),
            tuple(target for target, facts in chosen.items() if facts.level == name),
            verdicts.get(name),
        )
        for name, record in levels.items()
        if is_mix_level(record)
    }


def describe_kept_stock(journal: Journal, source: str) -> tuple[KeptStock, ...]:
    """Return the targets and the levels of other roundings for which a stock level of this source was kept."""
    records = {target: record for target, record in journal.of_kind("mix").items() if record.inputs.get(MODEL_INPUT) == source}
    chosen = {target: record.facts_as(MixFacts) for target, record in records.items()}
    mixes = [KeptStock(target, facts.stock) for target, facts in chosen.items() if facts.kept_stock]
    compared = [record for record in journal.of_kind("rounding").values() if record.inputs.get(MODEL_INPUT) == source]
    roundings = [record.facts_as(RoundingFacts) for record in compared]
    return (*mixes, *(KeptStock(facts.level, facts.stock) for facts in roundings if facts.kept_stock))


def _recipe(workspace: Workspace, name: str, record: StepRecord, sink: Sink) -> MixRecipe | None:
    try:
        return recipe_of(workspace, name, record)
    except InvalidDataError as error:
        sink(warning(f"The report does not say how the types of {name} were chosen: {error.sentence()}"))
        return None


def _mix(workspace: Workspace, recipe: MixRecipe | None, targets: tuple[str, ...], verdict: MixVerdict | None) -> ReportMix:
    if recipe is None:
        return ReportMix(targets=targets, stock="", digest="", held_out=verdict)
    level, won = workspace.level_file(recipe.level), recipe.chosen
    ratio = Estimate(won.ratio, won.error) if won is not None and won.ratio is not None and won.error is not None else None
    return ReportMix(
        targets=targets,
        stock=recipe.stock,
        digest=recipe.digest,
        types=dict(Counter(recipe.types.values()).most_common()),
        unweighted=recipe.unweighted,
        ratio=ratio,
        typical=won.typical if won is not None else None,
        same_top=won.same_top if won is not None else None,
        recipe=_file(level.with_suffix(".recipe.json"), workspace.kept_recipe(recipe.level).read_bytes()),
        tensor_types=_file(level.with_suffix(".tensor-types.txt"), as_tensor_types(recipe)),
        held_out=verdict,
    )


def _file(path: Path, content: bytes) -> ReportFile | None:
    """A file that was laid next to the level; None if it is gone, or if it is another one."""
    if not path.is_file() or path.read_bytes() != content:
        return None
    return ReportFile(path.name, len(content), sha256(path))


def with_types_file(record: StepRecord, mix: ReportMix | None, workspace: Workspace) -> StepRecord:
    """The record of a level, whose command names one file of types in place of an option for every tensor of a mix; unchanged
    without that file."""
    if mix is None or mix.tensor_types is None:
        return record
    pins = {*(workspace.root / mix.tensor_types.name).read_text(encoding="utf-8").split("\n")}
    commands = [_with_file(words, pins, mix.tensor_types.name) for words in record.commands]
    return replace(record, command=command_line(commands))


def _with_file(words: Sequence[str], pins: Collection[str], file: str) -> list[str]:
    """A command with ``--tensor-type-file`` where the first of the ``pins`` stands, and without them."""
    found: list[str] = []
    for at, word in enumerate(words):
        if word == _PIN and at + 1 < len(words) and words[at + 1] in pins:
            found += () if _FILE in found else (_FILE, file)
        elif not (at and words[at - 1] == _PIN and word in pins):
            found.append(word)
    return found


def describe_costs(workspace: Workspace, source: str, sink: Sink) -> ReportCosts | None:
    """Return the cost map of the workspace; None if there is none, or if it is another model's."""
    try:
        found = read_cost_map(workspace.cost_map) if workspace.cost_map.is_file() else None
    except InvalidDataError as error:
        sink(warning(f"The report does not show what rounding costs: {error.sentence()}"))
        return None
    return _costs(found) if found is not None and found.model == source else None


def _costs(found: CostMap) -> ReportCosts | None:
    tensors = tuple(
        ReportTensorCost(*locate(printable(tensor.name)), tensor.sensitivity, measured=bool(tensor.probes))
        for tensor in found.tensors
        if tensor.sensitivity is not None
    )
    if not tensors:
        return None
    return ReportCosts(printable(last_part(found.text)), found.text_sha256, found.n_ctx, COMMON_ERROR, tensors)
