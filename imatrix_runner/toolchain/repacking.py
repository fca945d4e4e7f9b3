"""Whether llama.cpp may keep weights in the processor's own formats here: AMX tiles, interleaved rows (``--repack``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Repacking:
    """``works``, or ``why`` not: what happened when a library or program multiplied with such weights, in a phrase.

    llama.cpp calls the formats extra buffer types; without them it computes with the weights as they are in the file.
    """

    works: bool
    why: str = ""

    @property
    def mark(self) -> str:
        """What distinguishes results without such formats (other kernels round otherwise), for fingerprints."""
        return "" if self.works else ", --no-repack"

    def line(self, who: str) -> str:
        """One sentence for people; ``who`` is what computes."""
        return f"Repacked weights do not work here in {who} ({self.why}); those left as in the file do, and take longer"


REPACKS = Repacking(True)
