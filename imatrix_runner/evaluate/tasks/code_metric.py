"""The metric of code tasks: programs that a model wrote, run with their tests in the sandbox.

It takes the place of ``evaluate``'s ``code_eval``, with the same arguments and results: tasks that use that one run here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from imatrix_runner.evaluate.tasks.sandbox import check_sandbox, run_sandboxed


class CodeNotAllowedError(Exception):
    """A program was to be run, and the user did not allow it."""


class CodeMetric:
    """Runs programs if ``allowed``; the first time, it checks the sandbox. Equal programs run once."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._checked = False
        self._known: dict[str, bool] = {}

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """For each problem its tests and its candidate programs: the shares that pass with ``k`` tries, and all results."""
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        rates: dict[int, list[float]] = {number: [] for number in k}
        for problem, (tests, candidates) in enumerate(zip(references, predictions, strict=True)):
            passed = [self.passes(f"{candidate}\n{tests}") for candidate in candidates]
            results[problem] = [(number, {"passed": each}) for number, each in enumerate(passed)]
            for number in k:
                if len(passed) >= number:
                    rates[number].append(_rate(len(passed), sum(passed), number))
        shares = {f"pass@{number}": sum(found) / len(found) for number, found in rates.items() if found}
        return shares, results

    def passes(self, program: str) -> bool:
        """Whether a program with its tests runs to its end. Raises :class:`CodeNotAllowedError`, or ``ToolchainError`` where no
        sandbox holds."""
        if not self._allowed:
            raise CodeNotAllowedError
        if not self._checked:
            check_sandbox()
            self._checked = True
        if program not in self._known:
            self._known[program] = run_sandboxed(program).passed
        return self._known[program]


def _rate(n: int, right: int, k: int) -> float:
    """The unbiased estimate of pass@k (Chen et al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
