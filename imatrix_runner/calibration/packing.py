"""Documents laid out so that every chunk begins with the beginning of one. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from imatrix_runner.calibration.mixing import Document

_AHEAD = 64
"""So far ahead a document is looked for that fills the room left in a chunk."""


@dataclass
class Layout:
    """Documents in their places. ``cuts``: number in ``documents`` -> tokens kept of that document, whose end is left out so
    that it ends with its chunk. ``loose`` chunks begin in the middle of a document, as nothing could be cut to fit."""

    documents: list[Document] = field(default_factory=list)
    cuts: dict[int, int] = field(default_factory=dict)
    loose: int = 0


def lay_out(
    documents: Sequence[Document], n_ctx: int, budget: int | None, cut_quality: Callable[[Document, int], int]
) -> Layout:
    """Fill chunks of ``n_ctx`` tokens, each from the beginning of a document, up to ``budget`` tokens (None: all documents).

    A document longer than a chunk goes on in the next. The room behind it is filled with the largest of the next documents that
    fits whole; where none does, with the beginning of one that is too long: of those that ``cut_quality`` puts highest at that
    length (0: it cannot be cut there) the shortest.
    """
    layout = Layout()
    waiting = deque(documents)
    position = 0

    def place(document: Document, keep: int | None = None) -> None:
        nonlocal position
        if keep is not None and keep < document.size:
            layout.cuts[len(layout.documents)] = keep
        layout.documents.append(document)
        position += min(document.size, keep if keep is not None else document.size)

    while waiting and (budget is None or position < budget):
        used = position % n_ctx
        room = n_ctx - used if used else n_ctx
        left = budget - position if budget is not None else None
        if used == 0 and (left is None or waiting[0].size <= left):
            place(waiting.popleft())
            continue
        ahead = list(waiting)[:_AHEAD]
        whole = [document for document in ahead if document.size <= room]
        if whole:
            best = max(whole, key=lambda document: document.size)
            waiting.remove(best)
            place(best)
            continue
        length = room if used or left is None else left  # the last document of a budget may fill several chunks
        rated = [(cut_quality(document, length), -document.size) for document in ahead]
        fitting = [number for number, document in enumerate(ahead) if document.size > length and rated[number][0]]
        if fitting:
            best = ahead[max(fitting, key=lambda number: rated[number])]
            waiting.remove(best)
            place(best, length)
            continue
        layout.loose += 1
        place(waiting.popleft())
    return layout
