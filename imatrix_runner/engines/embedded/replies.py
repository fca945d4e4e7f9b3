"""A worker's replies, decoded from what it prints."""

from __future__ import annotations

from collections.abc import Callable

from imatrix_runner.engines import protocol
from imatrix_runner.engines.jobs import PassedLevel, PassFigures
from imatrix_runner.errors import EngineError
from imatrix_runner.untrusted import UnreadableError


class Replies:
    """Splits a worker's stdout into replies, keeps them, and passes each on to ``on_reply``."""

    def __init__(self, on_reply: Callable[[protocol.Reply], object] | None = None) -> None:
        self._on_reply = on_reply
        self._rest = ""
        self._kept: list[protocol.Reply] = []
        self.failed: protocol.Failed | None = None

    def feed(self, stream: str, text: str) -> None:
        if stream != "stdout":
            return
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > protocol.MOST_BYTES:
            raise _not_a_reply(f"a line of more than {protocol.MOST_BYTES} bytes", self._rest)
        for line in lines:
            try:
                reply = protocol.decode_reply(line)
            except UnreadableError as error:
                raise _not_a_reply(str(error), line) from error
            if isinstance(reply, protocol.Failed):
                self.failed = reply
            elif self._on_reply is not None:
                self._on_reply(reply)
            self._kept.append(reply)

    def in_order(self, kinds: tuple[type[protocol.Reply], ...]) -> list[protocol.Reply]:
        """The replies of some kinds, in order."""
        return [reply for reply in self._kept if isinstance(reply, kinds)]

    @property
    def passed(self) -> list[PassedLevel]:
        """The levels of a pass that have ended, as reported."""
        return [reply.level for reply in self._kept if isinstance(reply, protocol.Passed) and reply.level is not None]

    @property
    def prepared(self) -> list[protocol.Prepared]:
        """What is left of a pass that was prepared; the last one ends it."""
        return [reply for reply in self._kept if isinstance(reply, protocol.Prepared)]

    @property
    def figures(self) -> list[PassFigures]:
        return [reply.figures for reply in self._kept if isinstance(reply, protocol.Passed) and reply.figures is not None]

    def only(self, kind: type[protocol.ReplyT]) -> protocol.ReplyT:
        """The one expected reply of a kind. Raises :class:`EngineError` if there is none, or more than one."""
        found = [reply for reply in self._kept if isinstance(reply, kind)]
        if len(found) != 1:
            raise EngineError(
                "The worker ended without a reply", f"{len(found)} instead of one", "Report it; use --engine binaries."
            )
        return found[0]


def _not_a_reply(why: str, line: str) -> EngineError:
    return EngineError(
        "The worker's reply could not be read",
        f"{why}: {line[:200]!r}",
        "Use --engine binaries. The likely cause is another program that prints to this worker's stdout; if there is none, "
        "report it.",
    )
