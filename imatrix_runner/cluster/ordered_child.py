"""A child process with a loaded model that gets one unit of work after another, from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from imatrix_runner.errors import EngineError, InterruptedRunError, RunnerError, from_os_error
from imatrix_runner.process import Orders

ResultT = TypeVar("ResultT")

OnUnit = Callable[[int, ResultT], None]
"""Called with the number of a finished unit, and its result."""

Serve = Callable[[Orders, OnUnit[ResultT]], None]
"""Runs the child to its end. Raises what the engine raises, and ``OSError``."""


class OrderedChild(Generic[ResultT]):
    """The child is started at once, and ends with :meth:`close`, or by an error, which then is that of all its units."""

    def __init__(self, serve: Serve[ResultT]) -> None:
        self._orders = Orders()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[ResultT]] = {}
        self._ended: RunnerError | None = None
        self._thread = threading.Thread(target=self._run, args=(serve,), daemon=True)
        self._thread.start()

    def run(self, number: int) -> ResultT:
        """Have one unit done. A second call waits for its turn in the child, which need not wait for the caller."""
        future: Future[ResultT] = Future()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._waiting[number] = future
            self._orders.give(number)
        return future.result()

    @property
    def current(self) -> int | None:
        """The unit that the child does; None if it has nothing to do."""
        with self._lock:
            return next(iter(self._waiting), None)

    def close(self) -> None:
        """End the child: it stops at its next batch."""
        self._orders.end()
        self._thread.join()

    def _run(self, serve: Serve[ResultT]) -> None:
        try:
            serve(self._orders, self._finished)
            ended: RunnerError = InterruptedRunError("The worker was closed", "its task is over", "Run the command again.")
        except RunnerError as error:
            ended = error
        except OSError as error:
            ended = from_os_error(error, "computing on a worker of the cluster")
        except BaseException as error:  # noqa: BLE001 - a bug: it has to reach the driver
            ended = EngineError("The worker failed", f"{type(error).__name__}: {error}", "Report it.")
        with self._lock:
            self._ended = ended
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(ended)

    def _finished(self, number: int, result: ResultT) -> None:
        with self._lock:
            future = self._waiting.pop(number)
        future.set_result(result)
