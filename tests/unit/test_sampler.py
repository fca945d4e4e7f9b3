"""Drawn tokens follow the distribution and the seed, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from imatrix_runner.engines.measures import Sampling
from imatrix_runner.engines.worker.generate.sampler import Sampler

LOGITS = np.log(np.array([0.05, 0.5, 0.3, 0.15], np.float32))


def drawn(sampling: Sampling, prompt: int = 0, n: int = 4000, logits: np.ndarray = LOGITS) -> np.ndarray:
    sampler = Sampler(sampling, prompt)
    return np.array([sampler.draw(logits) for _ in range(n)])


def test_shares_are_those_of_the_distribution() -> None:
    shares = np.bincount(drawn(Sampling(1.0, 1.0, 7)), minlength=4) / 4000
    assert shares == pytest.approx([0.05, 0.5, 0.3, 0.15], abs=0.03)


def test_top_p_leaves_out_the_unlikely_and_temperature_flattens() -> None:
    assert set(drawn(Sampling(1.0, 0.75, 7))) == {1, 2}
    assert set(drawn(Sampling(1.0, 0.4, 7))) == {1}
    shares = np.bincount(drawn(Sampling(8.0, 1.0, 7)), minlength=4) / 4000
    assert shares.max() - shares.min() < 0.12


def test_seed_and_prompt_decide() -> None:
    sampling = Sampling(1.0, 1.0, 7)
    assert np.array_equal(drawn(sampling), drawn(sampling))
    assert not np.array_equal(drawn(sampling), drawn(sampling, prompt=1))
    assert not np.array_equal(drawn(sampling), drawn(Sampling(1.0, 1.0, 8)))


def test_a_large_vocabulary_is_drawn_from_alike() -> None:
    logits = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    logits[123], logits[45_000] = 20, 19
    assert set(drawn(Sampling(0.5, 0.9, 1), n=200, logits=logits)) <= {123, 45_000}
    assert len(set(drawn(Sampling(5.0, 1.0, 1), n=200, logits=logits))) > 150
