"""Splits a text into one to calibrate with and one to measure on, by whole passages chosen by their content alone."""

from __future__ import annotations

import hashlib

from imatrix_runner.documents.passages import passages

SHARE = 0.1
"""Share of a text's bytes that is held out."""
LEAST_BYTES = 20_000
"""Lower bound, in bytes, for the held-out text: about ten chunks of 512 tokens, which give a mean KLD to about 3 %."""
MOST_SHARE = 0.2
"""Upper bound for the held-out share, so that enough text is left to calibrate with."""


def split_text(text: str) -> tuple[str, str]:
    """Return the text to calibrate with and the text to measure on, each in the original order. The second is empty if the text
    is too short for both."""
    found = [passage for passage, _ in passages([text])]
    whole = sum(len(passage.encode()) for passage in found)
    wanted = max(LEAST_BYTES, SHARE * whole)
    if wanted > MOST_SHARE * whole:
        return text, ""
    held: set[int] = set()
    n_bytes = 0
    for number in sorted(range(len(found)), key=lambda number: (_chance(found[number]), number)):
        if n_bytes >= wanted:
            break
        held.add(number)
        n_bytes += len(found[number].encode())
    if n_bytes > MOST_SHARE * whole:  # one passage is most of the text
        return text, ""
    kept = [passage for number, passage in enumerate(found) if number not in held]
    held_out = [found[number] for number in sorted(held)]
    return "\n\n".join(kept) + "\n", "\n\n".join(held_out) + "\n"


def _chance(passage: str) -> bytes:
    """A pseudo-random value from the passage alone. Equal passages get the same value, so they rarely end up in both parts."""
    return hashlib.sha256(b"held out 1\n" + passage.encode()).digest()
