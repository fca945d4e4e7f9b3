"""What the journal keeps of roundings: what a comparison with llama-quantize's depends on, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from imatrix_runner.engines.levels import Level
from imatrix_runner.engines.roundings import FEEDBACK, STOCK, Rounding
from imatrix_runner.journal import StepRecord
from imatrix_runner.quantize.level_facts import MadeFacts
from imatrix_runner.steps import Inputs

ROUNDING_KEY = "imatrix_runner.rounding"
"""The key under which a level says in its metadata that llama-quantize rounds otherwise."""


def marked(level: Level, covariances: str) -> Level:
    """The level with the mark of its rounding in the metadata. ``covariances``: the fingerprint of those that it uses."""
    said = f"{level.rounding}, covariances {covariances[:23]}" if level.rounding == FEEDBACK else level.rounding
    return replace(level, override_kv=(*level.override_kv, f"{ROUNDING_KEY}=str:{said}"))


class RoundingInputs(Inputs, frozen=True, kw_only=True):
    """What the comparison of a rounding with llama-quantize's depends on. ``rounding``: with the covariances that it uses;
    ``recipe``: the fingerprint of the level's types."""

    model_file: str
    imatrix: str
    rounding: str
    recipe: str
    options: str
    text: str
    engine: str


@dataclass(frozen=True)
class RoundingFacts:
    """A level whose rounding was compared with llama-quantize's, of the same types, on the calibration text: ``kld`` of both in
    nats a token, ``ratio`` with its standard ``error``, ``typical``: the geometric mean of the chunks' own ratios;
    ``same_top``: difference of the shares of tokens with the source's top token. ``kept_stock``: it was not surely better."""

    level: str
    stock: str
    kept_stock: bool
    kld: float
    stock_kld: float
    ratio: float
    error: float
    typical: float
    same_top: float


def rounding_of_level(record: StepRecord) -> Rounding:
    """How the numbers of a finished level are rounded."""
    return record.facts_as(MadeFacts).rounding or STOCK
