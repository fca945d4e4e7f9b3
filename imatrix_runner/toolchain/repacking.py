"""Whether llama.cpp may keep weights in the processor's own formats here: AMX tiles, interleaved rows (``--repack``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Repacking:
    """``works``, or ``why`` not: what happened when a library or program computed with such weights, in a phrase.

    llama.cpp calls the formats extra buffer types; without them it uses the weights as they are in the file.
    """

    works: bool
    why: str = ""

    @property
    def mark(self) -> str:
        """The part of a fingerprint that marks results without such formats: other kernels round differently."""
        return "" if self.works else ", --no-repack"

    def line(self, who: str) -> str:
        """Return one sentence for people; ``who`` is the library or program."""
        return f"Repacked weights do not work here in {who} ({self.why}); weights as in the file do, but take longer"


REPACKS = Repacking(True)
