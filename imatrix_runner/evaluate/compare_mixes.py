"""Compares every measured mix, and every level of another rounding, with the stock levels measured on the same text, and
records the verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from imatrix_runner.context.context import Session
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.evaluate.measure import Measurer, Subject
from imatrix_runner.evaluate.measurements import content_of, levels_made, measured
from imatrix_runner.evaluate.mix_verdict import MeasuredSize, MixVerdict, against_stock
from imatrix_runner.events import info
from imatrix_runner.files import joint_sha256
from imatrix_runner.journal import StepRecord, differences
from imatrix_runner.mixes.mix_facts import is_mix_level, recipe_of
from imatrix_runner.mixes.rounding_facts import rounding_of_level
from imatrix_runner.steps import LEVEL_INPUT, step_id


def compare_mixes(measurer: Measurer, session: Session) -> tuple[MixVerdict, ...]:
    """Compare all mixes whose figures on this text are known. A mix without a stock level of its size gets no verdict; a line
    says which level is missing."""
    journal, held_out = session.journal, measurer.held_out
    made = levels_made(journal)
    mixes = {name: record for name, record in made.items() if is_mix_level(record) or rounding_of_level(record) != STOCK}
    sizes = {each.level: each for each in measured_here(measurer, session, made)}
    stock = [each for name, each in sizes.items() if name not in mixes]
    found: list[MixVerdict] = []
    for name in (name for name in sizes if name in mixes):
        chosen_against = _chosen_against(session, name, made[name])
        verdict = against_stock(sizes[name], stock, chosen_against)
        if verdict is None:
            missing = f"no stock level of about its size was measured on {held_out.name}"
            todo = f" Make and measure {chosen_against} too." if chosen_against else ""
            session.sink(info(f"{name} is not compared with stock: {missing}.{todo}"))
            continue
        inputs = {**measurer.held_out.whole_inputs, LEVEL_INPUT: content_of(made[name])}
        inputs["stock levels"] = joint_sha256([content_of(made[each.level]) for each in verdict.stock])
        journal.record(step_id("against", name), StepRecord.now(inputs, [], "levels are measured", 0.0, facts=verdict))
        found.append(verdict)
    return tuple(found)


def _chosen_against(session: Session, name: str, record: StepRecord) -> str:
    """The stock level that a mix, or a level of another rounding, was compared with before it was made; empty if not known."""
    if is_mix_level(record):
        recipe = recipe_of(session.workspace, name, record)
        return recipe.stock if recipe is not None else ""
    return name.removeprefix(f"{rounding_of_level(record).upper()}-")


def measured_here(measurer: Measurer, session: Session, made: Mapping[str, StepRecord]) -> Iterator[MeasuredSize]:
    """The levels whose figures are those of this text, chunks and source."""
    journal = session.journal
    for name, figures in measured(journal).items():
        record, step = made[name], step_id("evaluate", name)
        level = {LEVEL_INPUT: content_of(record)}
        if differences(journal[step], {**measurer.held_out.whole_inputs, **level}):
            continue
        n_chunks, n_tokens = figures.evaluation.n_chunks, figures.divergence.n_tokens
        tokens = measurer.scored(Subject(name, step, session.workspace.root / record.output.name, level, ""))[:n_tokens]
        paired = len(tokens) == n_tokens and n_chunks
        chunks = tokens["kld"].astype(np.float64).reshape(n_chunks, -1).mean(axis=1) if paired else None
        yield MeasuredSize(name, sum(output.stamp.size for output in record.outputs), figures.divergence.kld, chunks)
