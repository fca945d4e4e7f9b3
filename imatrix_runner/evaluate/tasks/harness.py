"""The parent's side of the child that knows lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, ToolchainError, UsageError
from imatrix_runner.evaluate.tasks.harness_messages import HarnessRequest, PreparedTasks, Scored, TaskProblem
from imatrix_runner.files import write_json
from imatrix_runner.process import Command, Outcome, Runner, relevant_lines
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import UnreadableError, from_json

_WORKER = "imatrix_runner.evaluate.tasks.harness_worker"
_ROOT = Path(__file__).resolve().parents[3]
_ENVIRONMENT = {
    # Tasks are programs of others: they get no token, and nobody hears of them.
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
_MOST_BYTES = 1 << 30

T = TypeVar("T", PreparedTasks, Scored)


@dataclass(frozen=True)
class Harness:
    """Starts the child; ``folder`` takes the files of its requests and results, ``log`` its output."""

    runner: Runner
    folder: Path
    log: Path | None

    def prepare(self, specs: Sequence[str], limit: int | None, *, allow_code: bool) -> PreparedTasks:
        """Write the requests of tasks to :attr:`requests`. Data sets that are not in the cache are downloaded, unless the
        command is offline."""
        request = HarnessRequest(tuple(specs), str(self.requests), str(self.folder / "prepared.json"), limit, allow_code)
        return self._ask(request, PreparedTasks, ChildNeeds.HUB | ChildNeeds.NETWORK, None)

    def score(
        self,
        specs: Sequence[str],
        limit: int | None,
        outcomes: dict[str, Path],
        on_progress: Callable[[int, int], None],
        *,
        allow_code: bool,
    ) -> Scored:
        """The scores of each subject, from the file of its outcomes (a JSON list). Without network."""
        files = {label: str(path) for label, path in outcomes.items()}
        out = str(self.folder / "scored.json")
        request = HarnessRequest(tuple(specs), str(self.requests), out, limit, allow_code, files)
        scored = self._ask(request, Scored, ChildNeeds.HUB, on_progress)
        if scored.changed:
            raise InvalidDataError(
                "The tasks cannot be scored",
                "each time they are loaded they ask something else: their choice of items or examples is not repeatable",
                "Give the task a fixed order, and examples chosen with a seed (fewshot_config: sampler: first_n).",
            )
        return scored

    @property
    def requests(self) -> Path:
        return self.folder / "requests.jsonl"

    def _ask(
        self, request: HarnessRequest, kind: type[T], needs: ChildNeeds, on_progress: Callable[[int, int], None] | None
    ) -> T:
        file, out = self.folder / "harness-request.json", Path(request.out)
        write_json(file, msgspec.to_builtins(request))
        out.unlink(missing_ok=True)
        env = {**_ENVIRONMENT, **(_OFFLINE if request.outcomes is not None else {})}
        command = Command((sys.executable, "-m", _WORKER, str(file)), cwd=_ROOT, env=env, needs=needs)
        outcome: Outcome = self.runner.run(command, log=self.log, on_text=_progress(on_progress))
        if not outcome.ok or not out.is_file():
            raise EngineError(
                "The process that loads the tasks failed",
                "; ".join((outcome.ending(), *relevant_lines(outcome.tail, 3))),
                f"Read the log: {self.log}" if self.log is not None else "Run the same command again.",
            )
        try:
            result: T = from_json(out.read_bytes(), kind)
        except UnreadableError as error:
            raise EngineError("The scores of the tasks could not be read", str(error), "Run the same command again.") from error
        if result.error is not None:
            raise _error(*result.error)
        return result


def _progress(on_progress: Callable[[int, int], None] | None) -> Callable[[str, str], None]:
    rest = ""

    def feed(stream: str, text: str) -> None:
        nonlocal rest
        if stream != "stdout" or on_progress is None:
            return
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            try:
                found = json.loads(line)
                on_progress(int(found["done"]), int(found["total"]))
            except (ValueError, TypeError, KeyError):  # a task's own output
                continue

    return feed


_CLASSES: dict[int, type[RunnerError]] = {kind.exit_code: kind for kind in (UsageError, ToolchainError, InvalidDataError)}


def _error(what: str, why: str, todo: str, exit_code: int) -> RunnerError:
    return _CLASSES.get(exit_code, EngineError)(what, why, todo)


def problem_error(problem: TaskProblem, label: str) -> RunnerError:
    """Why a task cannot be used, in three parts."""
    name, why = printable(label)[:200], printable(problem.why)[:500]
    if problem.kind == "unknown":
        return UsageError(
            f"There is no task {name}",
            why,
            "Give a name that `lm-eval ls tasks` lists, `mini`, or a YAML file of a task (docs/tasks.md).",
        )
    if problem.kind == "code":
        return UsageError(
            f"The task {name} runs programs that the model writes",
            why + ", and that was not allowed",
            "Allow it with --allow-code-execution: they run in a sandbox without network and files of this machine.",
        )
    if problem.kind == "code-refused":
        return ToolchainError(
            f"The task {name} cannot run programs here",
            why,
            "Leave it out, or run it on Linux with user namespaces, not in a restricted container.",
        )
    if problem.kind == "data":
        return InvalidDataError(
            f"The data of the task {name} cannot be had",
            why,
            "Run it once with network (without --offline), or give a YAML file of the task with a local JSONL (docs/tasks.md).",
        )
    if problem.kind == "unfit":
        return UsageError(f"The task {name} cannot be computed here", why, "Choose another task or variant of it.")
    return InvalidDataError(f"The task {name} cannot be loaded", why, "Correct its YAML file, or choose another task.")
