"""Greedy answers of a level beside its source's, on somebody's own prompts: how long they agree, and where they part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnswerPair:
    """One prompt. ``agreement``: tokens until the two part; ``parted``: None where one whole answer equals the other.

    ``shared``: share of identical tokens, 2 M / T (M tokens in common, in order; T of both together).
    """

    prompt: str
    source: str
    level: str
    n_source: int
    n_level: int
    agreement: int
    shared: float
    parted: int | None


@dataclass(frozen=True)
class DomainResult:
    """A level on all prompts, answers of at most ``n_predict`` tokens. ``same``: share of answers that are the same to the last
    token; ``agreement``: mean and median number of tokens until they part (a whole answer counts as its length)."""

    level: str
    n_prompts: int
    n_predict: int
    same: float
    shared: float
    agreement_mean: float
    agreement_median: float
    pairs: tuple[AnswerPair, ...]
