"""The exception for a worker's failures; the parent turns it into a ``RunnerError``."""

from __future__ import annotations

from imatrix_runner.engines.protocol import Failed


class Refusal(Exception):
    """Carries the three lines and the exit code of the error that the parent raises.

    ``todo`` is empty where llama-cpp-python has to be installed again: the parent adds the command.
    """

    def __init__(self, what: str, why: str, todo: str, exit_code: int) -> None:
        super().__init__(what, why, todo, exit_code)
        self.reply = Failed(what, why, todo, exit_code)

    @classmethod
    def missing(cls, why: str) -> Refusal:
        return cls("llama-cpp-python cannot be used", why, "", 3)

    @classmethod
    def mismatch(cls, why: str) -> Refusal:
        """The library differs from its bindings or from the expected layout: computing would read the wrong memory."""
        return cls("This version of llama-cpp-python cannot be used", why, "", 3)

    @classmethod
    def failed(
        cls, what: str, why: str, todo: str = "Read llama.cpp's messages in the log, or try --engine binaries."
    ) -> Refusal:
        return cls(what, why, todo, 5)

    @classmethod
    def invalid(cls, what: str, why: str, todo: str) -> Refusal:
        return cls(what, why, todo, 6)
