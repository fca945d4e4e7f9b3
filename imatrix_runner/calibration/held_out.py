"""Part of a text set aside to measure on: whole passages, chosen by their content, so that a text is always cut alike."""

from __future__ import annotations

import hashlib

from imatrix_runner.calibration.passages import passages

SHARE = 0.1
"""Of a text's bytes, how much is set aside."""
LEAST_BYTES = 20_000
"""That are set aside at least: about ten chunks of 512 tokens, from which a mean KLD is known to about 3 %."""
MOST_SHARE = 0.2
"""Of a text, beyond which too little would be left to calibrate with."""


def split_text(text: str) -> tuple[str, str]:
    """Return the part to calibrate with and the part to measure on, each in the text's own order; the second is empty for a
    text that is too short for both."""
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
    aside = [found[number] for number in sorted(held)]
    return "\n\n".join(kept) + "\n", "\n\n".join(aside) + "\n"


def _chance(passage: str) -> bytes:
    """A number that depends on the passage alone; equal passages get the same, so that none is in both parts by chance."""
    return hashlib.sha256(b"held out 1\n" + passage.encode()).digest()
