"""Until when a level is measured: the rule of ``--until-precise``. Pure.

Chunks are computed in batches that are spread over the text, so that those done are always a sample of all of it. At possible
ends, which follow from the text alone, the standard error of the mean KLD is compared with the mean. Tokens of a chunk are not
independent, so the error is the larger of two: that over tokens, which tables show, and that over the chunks' means.

A rule that stops when an error looks small enough prefers samples whose error is small by chance. What that costs was measured
on the demo model (``docs/measurements.md``). There are few possible ends, and none before :data:`LEAST_CHUNKS`, to keep it low.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from imatrix_runner.imatrix.chunks import spread_order

LEAST_CHUNKS = 8
"""Fewest chunks after which an error is believed."""

_GROWTH = 4
"""Each possible end comes after a quarter more chunks than the one before, so that the model is loaded few times."""

_ROUNDING = 1e-4
"""A mean KLD below this, in nats, is that of a source against itself; its error need not be smaller than a share of this."""


def spread_chunks(n_chunks: int, at_once: int) -> tuple[int, ...]:
    """The chunks of a text in the order in which they are measured: whole batches of ``at_once`` neighbours, spread over the
    text. A batch that is not whole comes last: a batch is computed with the same chunks as in the order of the text."""
    whole = n_chunks // at_once
    batches = [range(batch * at_once, (batch + 1) * at_once) for batch in spread_order(whole)]
    return tuple(chunk for batch in (*batches, range(whole * at_once, n_chunks)) for chunk in batch)


def possible_ends(n_chunks: int, at_once: int) -> Iterator[int]:
    """After how many chunks the error is compared: whole batches, and at last the whole text."""
    done = 0
    while done < n_chunks:
        wanted = max(LEAST_CHUNKS, done + max(1, done // _GROWTH))
        done = min(n_chunks, math.ceil(wanted / at_once) * at_once)
        yield done


def relative_error(kld: npt.NDArray[np.float64]) -> float:
    """The standard error of the mean KLD as a share of the mean. ``kld``: of each token, in nats, float64 [n_chunks, rows];
    infinite for fewer than two chunks."""
    n_chunks = len(kld)
    if n_chunks < 2:
        return math.inf
    of_tokens = float(kld.std(ddof=1)) / math.sqrt(kld.size)
    of_chunks = float(kld.mean(axis=1).std(ddof=1)) / math.sqrt(n_chunks)
    return max(of_tokens, of_chunks) / max(abs(float(kld.mean())), _ROUNDING)


def is_precise(kld: npt.NDArray[np.float64], share: float) -> bool:
    """Whether the error is below ``share`` of the mean. ``kld`` as for :func:`relative_error`."""
    return len(kld) >= LEAST_CHUNKS and relative_error(kld) < share


def precise_after(kld: npt.NDArray[np.float64], share: float, n_chunks: int, at_once: int) -> int | None:
    """The number of chunks, of the ``n_chunks`` of a text, with which a measurement ends; None if more must be measured than
    ``kld`` has. The answer does not change when more chunks are known."""
    for done in possible_ends(n_chunks, at_once):
        if done > len(kld):
            return None
        if done == n_chunks or is_precise(kld[:done], share):
            return done
    return None
