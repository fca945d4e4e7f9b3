"""Draws tokens from logits: at a temperature, from the likeliest ones (top-p), with random numbers that only depend on the seed
and the prompt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.measures import Sampling

_LIKELY = 1024
"""Tokens that are sorted at first; all, where they have less than top-p of the probability."""


class Sampler:
    """Draws the tokens of one prompt's answer, one after another."""

    def __init__(self, sampling: Sampling, prompt: int) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.Philox(key=np.array([sampling.seed, prompt], np.uint64)))

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """One token from float32 [n_vocab]. Of equally likely ones the one with the lower number comes first."""
        weights = np.exp((logits - logits.max()).astype(np.float64) / self._sampling.temperature)
        wanted = self._sampling.top_p * float(weights.sum())
        tokens = np.arange(len(weights))
        if len(weights) > _LIKELY:
            least = np.partition(weights, -_LIKELY)[-_LIKELY]
            likely = np.flatnonzero(weights >= least)
            if float(weights[likely].sum()) >= wanted:
                tokens = likely
        order = tokens[np.argsort(-weights[tokens], kind="stable")]
        sums = np.cumsum(weights[order])
        n = int(np.searchsorted(sums, min(wanted, float(sums[-1])))) + 1
        place = int(np.searchsorted(sums[:n], self._random.random() * float(sums[n - 1]), side="right"))
        return int(order[min(place, n - 1)])
