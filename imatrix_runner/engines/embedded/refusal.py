"""What a worker says when it will not or cannot go on; the parent turns it into an error of ours."""

from __future__ import annotations

from imatrix_runner.engines.embedded.install import install_hint
from imatrix_runner.engines.embedded.protocol import Failed


class Refusal(Exception):
    """Carries the three lines and the exit code of the error that the parent raises."""

    def __init__(self, what: str, why: str, todo: str, exit_code: int) -> None:
        super().__init__(what, why, todo, exit_code)
        self.answer = Failed(what, why, todo, exit_code)

    @classmethod
    def missing(cls, why: str) -> Refusal:
        return cls("llama-cpp-python cannot be used", why, install_hint(), 3)

    @classmethod
    def mismatch(cls, why: str) -> Refusal:
        """The library is not what its bindings, or we, take it for: computing would read the wrong memory."""
        return cls("This llama-cpp-python is not one we can compute with", why, install_hint(), 3)

    @classmethod
    def failed(
        cls, what: str, why: str, todo: str = "Read the log for what llama.cpp said, or try --engine binaries."
    ) -> Refusal:
        return cls(what, why, todo, 5)

    @classmethod
    def invalid(cls, what: str, why: str, todo: str) -> Refusal:
        return cls(what, why, todo, 6)
